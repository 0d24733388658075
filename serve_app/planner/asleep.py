"""What a model of a swap group takes: of its GPU while it is awake and asleep, and of host memory.

A member that sleeps leaves a part of its memory on the GPU (CUDA's context, its graphs, what is not
torch's), and has its weights in pinned host memory.
"""

from __future__ import annotations

from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError
from serve_app.planner import choose, hardware
from serve_app.planner.hardware import CONTEXT_BYTES, GPU
from serve_app.planner.loading import load_known
from serve_app.planner.vllm.memory import GPUMemory, Plan

PINNED = 1.2
"""Host memory of a sleeping model over the size of its weights: torch rounds each pinned block up
to a power of two. On an H100 16.7 GiB for 14.0 of an 8B (benchmarks/results/swaps-h100.json)."""


def plan_of(config: ModelConfig, gpu: GPU) -> Plan | None:
    """A member's plan; None where its metadata is not at hand."""
    if (model := load_known(config)) is None:
        return None
    try:
        return choose.plan_on(model, choose.arguments_of(config), gpu)
    except ConfigError:
        return None  # told as the model's own


def host_bytes(config: ModelConfig) -> int:
    """Host memory for a member's weights while it sleeps; 0 where its metadata is not at hand."""
    gpu, _ = hardware.find(config.resources.accelerator_type or "H100")
    planned = plan_of(config, gpu)
    return int(planned.tightest.weights * PINNED) if planned else 0


def awake_bytes(planned: GPUMemory) -> int:
    """What a member has of the GPU while it is awake."""
    return CONTEXT_BYTES + planned.taken


def left_bytes(planned: GPUMemory) -> int:
    """What a member leaves on the GPU while it sleeps.

    An 8B left 0.82 GiB on an H100, and this is 0.80; with CUDA graphs 1.52, and this is 1.7.
    """
    return CONTEXT_BYTES + planned.non_torch + planned.cudagraph

"""A replica's part of a GPU: what its engine is told of it, and when the engine may start."""

from __future__ import annotations

import logging
import math
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError, UserError
from serve_app.planner import choose, shares
from serve_app.planner.hardware import CONTEXT_BYTES, GIB
from serve_app.planner.loading import load_model
from serve_app.planner.vllm.share import KEY, Share
from serve_app.replica.start import gpu
from serve_app.replica.start import turn as starts
from serve_app.replica.start.plugin import PHASE, START_FOLDER

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Part:
    """This replica's part of its GPU."""

    device: gpu.Device
    budget: int
    """Bytes that it may take of the GPU."""
    arguments: dict[str, Any]
    """What vLLM is told of it, beside what the config sets."""


def of(config: ModelConfig, device: gpu.Device | None = None) -> Part | None:
    """The part of the GPU that Ray has given this replica; None for a replica with whole GPUs.

    Reads the model's metadata, from the hub if they are not on this machine.

    Raises:
        UserError: the model does not fit its part, or there is no GPU.
    """
    if not config.resources.part_of_gpu:
        return None
    device = device or gpu.given()
    if device is None:
        raise UserError(
            f"resources.{config.resources.part_of_gpu} needs an NVIDIA GPU, and its driver does "
            "not answer on this node; mend it, or set device: cpu"
        )
    part: Share = choose.arguments_of(config)[KEY]
    budget = part.bytes_of(device.kind)
    try:
        model = load_model(config)
    except ConfigError:
        raise
    except UserError as error:
        logger.warning(f"what {part} leaves for the KV cache is measured, not planned: {error}")
        utilization = part.utilization(device.kind)
        return Part(device, budget, {"gpu_memory_utilization": utilization} | _set(config))
    arguments = shares.engine_arguments(config, model, device.kind)
    told = ", ".join(f"{key} {value}" for key, value in arguments.items())
    logger.info(f"{part} of {device.kind.name}, {budget / GIB:.2f} GiB: {told}")
    return Part(device, budget, arguments)


def _set(config: ModelConfig) -> dict[str, Any]:
    keys = ("gpu_memory_utilization", "kv_cache_memory_bytes")
    return {key: config.engine[key] for key in keys if config.engine.get(key) is not None}


def turn(part: Part, config: ModelConfig) -> AbstractContextManager[None]:
    """Wait for the GPU, in this thread; within the ``with`` block no other engine starts on it."""
    phase = Path(os.environ[START_FOLDER]) / PHASE
    arguments = part.arguments | _set(config)
    # What vLLM itself wants to be free (vllm/v1/worker/utils.py:516), and the context before it.
    wanted = math.ceil(part.device.kind.memory_bytes * float(arguments["gpu_memory_utilization"]))
    return starts.turn(
        part.device,
        CONTEXT_BYTES + wanted,
        model=config.model,
        limit_s=config.start_timeout_s,
        tell=phase.write_text,
    )

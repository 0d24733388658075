"""A replica's part of a GPU: what its engine is told of it, and when the engine may start."""

from __future__ import annotations

import asyncio
import contextlib
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
from serve_app.replica.front_ends import FrontEnds
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
    measures: bool = False
    """Whether vLLM measures what is left for its KV cache, because the planner cannot tell."""

    @property
    def held(self) -> int | None:
        """Bytes that this replica holds; None where the driver does not tell, as in a container
        whose processes have other numbers outside."""
        return gpu.held_by(os.getpid(), self.device.holders())

    @property
    def taken(self) -> int:
        """The same, or what it may hold at most."""
        return self.held or self.budget

    def described(self, memory: dict[str, Any]) -> dict[str, Any]:
        """The ``memory`` of :mod:`serve_app.replica.start.memory`, and of which GPU it is."""
        return memory | {
            "gpu": self.device.uuid,
            "gpu_gib": round(self.device.kind.memory_gib, 2),
            "part_gib": round(self.budget / GIB, 2),
        }


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
        given = {"gpu_memory_utilization": utilization} | _set(config)
        return Part(device, budget, given, measures="kv_cache_memory_bytes" not in given)
    arguments = shares.engine_arguments(config, model, device.kind)
    told = ", ".join(f"{key} {value}" for key, value in arguments.items())
    logger.info(f"{part} of {device.kind.name}, {budget / GIB:.2f} GiB: {told}")
    guessed = not model.shape.known and config.engine.get("kv_cache_memory_bytes") is None
    return Part(device, budget, arguments, measures=guessed)


def _set(config: ModelConfig) -> dict[str, Any]:
    keys = ("gpu_memory_utilization", "kv_cache_memory_bytes")
    return {key: config.engine[key] for key in keys if config.engine.get(key) is not None}


def turn(part: Part, config: ModelConfig) -> AbstractContextManager[None]:
    """Wait for the GPU, in this thread; within the ``with`` block its part is kept for the engine.

    An engine that measures what its neighbours leave starts alone.
    """
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
        alone=part.measures,
    )


WATCH_S = 10.0
"""Seconds between two looks at what an engine holds of its GPU."""


async def watch(part: Part, front_ends: FrontEnds) -> None:
    """Tell the gateways for ever whether the engine holds more of the GPU than its part.

    Nothing keeps it from that but its plan: CUDA gives memory to whoever asks.
    """
    while True:
        with contextlib.suppress(Exception):  # the driver does not answer
            over = max(0, (await asyncio.to_thread(lambda: part.held) or 0) - part.budget)
            if over and not front_ends.over_plan:
                logger.warning(
                    f"this engine holds {over / GIB:.2f} GiB of its GPU beyond its part of "
                    f"{part.budget / GIB:.2f} GiB: a neighbour may find no memory; make its part "
                    "larger, or set a smaller engine.kv_cache_memory_bytes"
                )
            front_ends.over_plan = over
        await asyncio.sleep(WATCH_S)

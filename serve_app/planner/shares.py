"""Models with a part of a GPU: the fraction that Ray reserves, and what vLLM is told of it.

Ray only counts fractions. The replica computes vLLM's numbers on its machine, of the GPU that it
has been given (:func:`engine_arguments`), by the same plan that ``serve-app plan`` shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from serve_app.cluster import placement
from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError
from serve_app.planner import choose, hardware
from serve_app.planner.hardware import GIB, GPU
from serve_app.planner.model.checkpoint import Model

_UNIT = 10_000
"""Ray counts a resource in ten-thousandths."""


def fraction(config: ModelConfig, types: Callable[[], Iterable[str]] = set) -> float | None:
    """The fraction of a GPU that Ray is to reserve; None for a model with whole GPUs.

    ``gpu_memory_gib`` is a fraction of the smallest GPU that the replica may get: then parts that
    Ray puts on one GPU have their memory on any of them.

    Args:
        types: asks the cluster for its types of GPU by Ray's names; only for a config that gives
            GiB and names none.

    Raises:
        ConfigError: that GPU has less memory, or is not known.
    """
    resources = config.resources
    if resources.gpu_memory_gib is None:
        return resources.gpu_share
    named = [resources.accelerator_type] if resources.accelerator_type else sorted(types())
    sizes = [size for name in named if (size := _smallest(name))]
    if not named or len(sizes) < len(named):
        unknown = next((f" of {name}" for name in named if name and not _smallest(name)), "")
        raise ConfigError(
            f"resources.gpu_memory_gib is {resources.gpu_memory_gib:g}, but Ray reserves a "
            f"fraction of a GPU, and the memory{unknown or ' of the GPUs here'} is not known; "
            + ("set gpu_share" if unknown else "set resources.accelerator_type, or gpu_share")
        )
    least = min(sizes, key=lambda gpu: gpu.memory_bytes)
    if resources.gpu_memory_gib * GIB > least.memory_bytes:
        raise ConfigError(
            f"resources.gpu_memory_gib is {resources.gpu_memory_gib:g}, and {least.name} has "
            f"{least.memory_gib:.1f}; lower it"
        )
    return fraction_of(config, least)


def about(config: ModelConfig) -> float:
    """The fraction, also where it is not known of which GPU: then all of it."""
    try:
        return fraction(config) or 1.0
    except ConfigError:
        return 1.0


def fraction_of(config: ModelConfig, gpu: GPU) -> float | None:
    """The same of a GPU of this type."""
    resources = config.resources
    if resources.gpu_memory_gib is None:
        return resources.gpu_share
    part = resources.gpu_memory_gib * GIB / gpu.memory_bytes
    return min(_UNIT, math.ceil(part * _UNIT)) / _UNIT


def _smallest(name: str) -> GPU | None:
    """The smallest GPU that Ray calls so; None where the planner knows none."""
    found = [gpu for gpu in hardware.gpus().values() if gpu.ray_name]
    alike = [gpu for gpu in found if name in (gpu.ray_name, str(gpu.ray_name).partition("-")[0])]
    return next((gpu for gpu in found if gpu.ray_name == name), None) or next(iter(alike), None)


def placed(config: ModelConfig, types: Callable[[], Iterable[str]] = set) -> placement.Placement:
    """A model's placement in a cluster with these types of GPU; raises as :func:`fraction`."""
    return placement.of(config, fraction(config, types))


def engine_arguments(config: ModelConfig, model: Model, gpu: GPU) -> dict[str, Any]:
    """What a replica with a part of ``gpu`` tells vLLM, beside what its config sets.

    With the size of the KV cache given, vLLM measures nothing, so that it does not matter what a
    neighbour takes or returns meanwhile. Where the planner only guesses, vLLM measures.

    Raises:
        ConfigError: the model does not fit its part; which part would do.
    """
    plan = choose.plan_on(model, choose.arguments_of(config), gpu)
    arguments: dict[str, Any] = {"gpu_memory_utilization": plan.engine.gpu_memory_utilization}
    if model.shape.known:
        if not plan.fits:
            raise ConfigError(f"'{config.model}' does not fit: {'; '.join(plan.reasons)}")
        if plan.groups:
            arguments["kv_cache_memory_bytes"] = plan.tightest.kv_cache
    return {key: value for key, value in arguments.items() if config.engine.get(key) is None}

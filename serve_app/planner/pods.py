"""What a replica's pod takes of a machine beside its GPUs, and what comes with these.

``plan`` names machines by it, ``render`` makes the pods by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from serve_app.config.settings import ModelConfig
from serve_app.planner import asleep, front_ends
from serve_app.planner.hardware import GIB, Instance
from serve_app.planner.vllm import offload
from serve_app.planner.vllm.defaults import parallelism
from serve_app.planner.vllm.memory import FRONT_END_BYTES

KEPT_CPU_M = 1000
KEPT_MEMORY_MIB = 2048
"""What a node's DaemonSets take, if nothing else is known: thousandths of a core, and MiB."""

BASE_GIB = 8
"""Host memory of the raylet, Serve's proxy, the API server and the engine's first front end."""

_PER_GPU_GIB = 12
"""Least host memory of one rank: CUDA context, Python, and pinned buffers while loading."""


def fits(
    instance: Instance,
    gpus: int,
    models: Sequence[ModelConfig],
    kept_cpu_m: int = KEPT_CPU_M,
    kept_memory_mib: int = KEPT_MEMORY_MIB,
) -> bool:
    """Whether ``gpus`` of the machine come with cores and memory for a replica of each model."""
    cpu, memory = share(instance, gpus, kept_cpu_m, kept_memory_mib)
    cores, gib = of_all(models, gpus, cpu)
    return cpu >= cores and memory >= gib


def of_all(models: Sequence[ModelConfig], gpus: int, cores: int) -> tuple[int, int]:
    """The cores and GiB of one pod with a replica of each model, where it has so many cores."""
    gib = BASE_GIB + sum(memory_gib(model, gpus, cores) - BASE_GIB for model in models)
    return sum(cpus(model, gpus) for model in models), gib


def share(
    instance: Instance,
    gpus: int,
    kept_cpu_m: int = KEPT_CPU_M,
    kept_memory_mib: int = KEPT_MEMORY_MIB,
) -> tuple[int, int]:
    """The whole cores and GiB that go with ``gpus`` of a machine's GPUs."""
    cpu = (instance.allocatable_cpu_m - kept_cpu_m) * gpus / instance.gpus / 1000
    mib = (instance.allocatable_memory_mib - kept_memory_mib) * gpus / instance.gpus
    # The log shipper in the same pod needs a part of it.
    return math.floor(cpu - 0.1), math.floor(mib / 1024 - 0.25)


def cpus(model: ModelConfig, gpus: int) -> int:
    """A pod's cores: one for each GPU's busy worker, the replica's own, one for Ray."""
    return gpus + own_cpus(model) + (1 if gpus > 1 else 0)


def own_cpus(model: ModelConfig) -> int:
    """A replica's own cores; ``frontends: auto`` takes what a pod has."""
    asked = 1 if model.frontends == "auto" else model.frontends
    return max(asked, math.ceil(model.resources.num_cpus))


def memory_gib(model: ModelConfig, gpus: int, cores: int) -> int:
    """A pod's host memory where it has so many cores."""
    size = parallelism(model.engine)
    engines = max(1, gpus // (size.tensor * size.pipeline))
    pinned = math.ceil(offload.asked(model.engine, gpus, engines) / GIB)
    asked = max(math.ceil(model.resources.memory_gib or 0), _PER_GPU_GIB * gpus + pinned)
    return asked + BASE_GIB + front_ends_gib(model, cores, gpus)


def front_ends_gib(model: ModelConfig, cores: int, gpus: int) -> int:
    """Memory of the front ends beyond the first, as many as such a pod may have."""
    most = front_ends.most_on(model, front_ends.Node(cores, gpus))
    return math.ceil((most - 1) * FRONT_END_BYTES / GIB)


def of_group(members: Mapping[str, ModelConfig]) -> ModelConfig:
    """The first model of a swap group, with all that the group's one pod needs.

    Each model sleeps in host memory of the size of its weights.
    """
    first = next(iter(members.values()))
    together = {
        "num_cpus": sum(own_cpus(member) for member in members.values()),
        "memory_gib": sum(_asleep_gib(member) for member in members.values()),
        "swap_group": first.resources.swap_group,
    }
    resources = first.resources.model_copy(update=together)
    return first.model_copy(update={"resources": resources, "replicas": 1, "autoscaling": None})


def _asleep_gib(model: ModelConfig) -> float:
    """Host memory of a model in a swap group: that of any replica, and its weights."""
    if model.resources.device == "cpu":
        return model.resources.memory_gib or 8
    asked = model.resources.memory_gib or 0
    return max(asked, _PER_GPU_GIB + asleep.host_bytes(model) / GIB)

"""GPUs and EC2 instances, from two tables kept as package data.

``data/gpus.json`` has what CUDA reports of a GPU and the properties that vLLM decides by;
``data/ec2_gpu_instances.csv`` has the machines. ``data/README.md`` names the sources.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from serve_app.errors import ConfigError, UserError, did_you_mean

MIB = 1 << 20
GIB = 1 << 30

CONTEXT_BYTES = 527 * MIB
"""Memory of the CUDA context of one process (measured on an H200): no part of what vLLM counts."""

_CUDA_SHARE = 0.97
"""CUDA's total is below the driver's; the least among the GPUs of data/gpus.json."""


@dataclass(frozen=True)
class GPU:
    """A GPU type. ``memory_bytes`` is CUDA's total, which is below the nameplate."""

    name: str
    ec2_name: str | None
    ec2_memory_mib: int
    memory_bytes: int
    capability: int
    """Compute capability times ten: 90 for Hopper."""
    ray_name: str | None
    """Its name in ``resources.accelerator_type``."""
    bandwidth: float = 0.0
    """Bytes per second of its memory, as published; 0 where it is not known here."""
    measured: bool = False
    """Whether the planner's constants were measured on it."""

    @property
    def supports_bf16(self) -> bool:
        return self.capability >= 80  # vllm/platforms/cuda.py: supported_dtypes

    @property
    def memory_gib(self) -> float:
        return self.memory_bytes / GIB


@dataclass(frozen=True)
class Instance:
    """An EC2 instance type. CPU in thousandths of a core, memory in MiB, as Kubernetes allots."""

    name: str
    gpu: GPU
    gpus: int
    allocatable_cpu_m: int
    allocatable_memory_mib: int
    efa: int
    """Network interfaces for multi-node traffic; 0 where it has none."""


@dataclass(frozen=True)
class Machine:
    """What one machine has for engines."""

    gpus: tuple[GPU, ...]
    cores: int
    free_memory_bytes: int
    """Host memory that a new process can have."""


def _read(name: str) -> str:
    return resources.files("serve_app").joinpath("data", name).read_text()


@cache
def gpus() -> dict[str, GPU]:
    """Every GPU type by name, smallest memory first."""
    rows = json.loads(_read("gpus.json"))["gpus"]
    found = [
        GPU(
            name=row["name"],
            ec2_name=row.get("ec2_name"),
            ec2_memory_mib=row.get("ec2_memory_mib", 0),
            memory_bytes=int(row["memory_gib"] * GIB),
            capability=row["capability"],
            ray_name=row.get("ray_name"),
            bandwidth=row["bandwidth_gb_s"] * 1e9,
            measured=row.get("measured", False),
        )
        for row in rows
    ]
    return {gpu.name: gpu for gpu in sorted(found, key=lambda gpu: gpu.memory_bytes)}


@cache
def instances() -> dict[str, Instance]:
    """Every EC2 type with at least one whole GPU that vLLM's image runs on, fewest GPUs first."""
    by_ec2 = {(gpu.ec2_name, gpu.ec2_memory_mib): gpu for gpu in gpus().values() if gpu.ec2_name}
    found = []
    for row in csv.DictReader(_read("ec2_gpu_instances.csv").splitlines()):
        gpu = by_ec2.get((row["gpu"], int(row["gpu_mem_mib_each"])))
        # Fractional GPUs (g6f) have no nvidia.com/gpu to ask for; the image is for amd64.
        if gpu is None or int(row["gpu_count"]) < 1 or row["arch"] != "amd64":
            continue
        found.append(
            Instance(
                name=row["instance_type"],
                gpu=gpu,
                gpus=int(row["gpu_count"]),
                allocatable_cpu_m=int(row["allocatable_cpu_m"]),
                allocatable_memory_mib=int(row["allocatable_mem_mib"]),
                efa=int(row["efa"] or 0),
            )
        )
    found.sort(key=lambda i: (i.gpus, i.allocatable_memory_mib, i.name))
    return {instance.name: instance for instance in found}


def find(name: str) -> tuple[GPU, Instance | None]:
    """The GPU that a user names: a GPU type, Ray's name for one, or an EC2 instance type.

    Raises:
        UserError: there is no such name; the error has the closest one.
    """
    instance = instances().get(name.lower())
    if instance is not None:
        return instance.gpu, instance
    names = {gpu.name.lower(): gpu for gpu in gpus().values()}
    names |= {gpu.ray_name.lower(): gpu for gpu in gpus().values() if gpu.ray_name}
    names |= {"a100": gpus()["A100-80G"]} | {"a100-40gb": gpus()["A100-40G"]}
    key = name.lower().removeprefix("nvidia-").replace("_", "-").replace("-80gb", "-80g")
    if key in names:
        return names[key], None
    if elsewhere := _not_on_ec2(name):
        raise UserError(elsewhere)
    known = [*gpus(), *instances()]
    raise UserError(
        f"'{name}' is neither a GPU nor an EC2 GPU instance"
        f"{did_you_mean(name, known)} (GPUs: {', '.join(gpus())})"
    )


_LIKE = {"3090": "A10G", "4090": "L4", "5090": "RTX-PRO-4500", "A6000": "L40S", "6000 ADA": "L40S"}
"""GPUs of workstations, and one of the table that is of their generation and about their size."""


def _not_on_ec2(name: str) -> str | None:
    """A sentence on a GPU that is well known but not in the table."""
    spelled = name.upper().replace("-", " ").replace("_", " ")
    if re.search(r"\bMI ?\d{3}", spelled):
        return (
            f"{name} is made by AMD, and only NVIDIA's GPUs are planned for; vLLM needs its ROCm "
            "build there, which serve_app is not tested with"
        )
    for model, like in _LIKE.items():
        if model in spelled:
            return (
                f"{name} is in no EC2 machine, so its sizes are not kept here; {like} "
                f"({gpus()[like].memory_gib:.1f} GiB) is nearly the same: --gpu {like}"
            )
    return None


def of_driver(name: str, memory: int, capability: int) -> GPU:
    """The GPU of this name and size in bytes by NVIDIA's driver, else one made of what it says."""
    words = set(re.split(r"[^A-Za-z0-9]+", name.upper()))
    for known in gpus().values():
        called = re.sub(r"-\d+G$", "", known.name).upper().split("-")
        if words.issuperset(called) and _CUDA_SHARE - 0.01 < known.memory_bytes / memory < 1.01:
            return known
    short = name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    return GPU(short, None, 0, int(memory * _CUDA_SHARE), capability, None)


def refuse_misnamed(accelerator: str | None) -> None:
    """Refuse an accelerator that is no name of Ray's, where it is clear which one is meant.

    Raises:
        ConfigError: an EC2 type, or Ray's name in other letters; with Ray's name.
    """
    asked = accelerator or ""
    instance = instances().get(asked.lower())
    if instance is not None and instance.gpu.ray_name:
        raise ConfigError(
            f"resources.accelerator_type is '{asked}', a machine of EC2; name its GPU as Ray does, "
            f"'{instance.gpu.ray_name}'"
        )
    for name in (gpu.ray_name for gpu in gpus().values()):
        if name and asked != name and asked.lower() == name.lower():
            raise ConfigError(f"resources.accelerator_type is '{asked}', but Ray writes '{name}'")


def with_accelerator(accelerator: str, where: str) -> tuple[Instance, ...]:
    """The instances with an accelerator, by Ray's name for it, fewest GPUs first.

    Raises:
        ConfigError: no EC2 type has it; the error has the closest name.
    """
    names = {gpu.ray_name: [gpu] for gpu in gpus().values() if gpu.ray_name}
    names["A100"] = [*names["A100-40G"], *names["A100-80G"]]
    if accelerator not in names:
        try:
            refuse_misnamed(accelerator)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        raise ConfigError(
            f"{where}: no EC2 instance has the accelerator '{accelerator}'"
            f"{did_you_mean(accelerator, names)} (known: {', '.join(names)})"
        )
    return tuple(i for i in instances().values() if i.gpu in names[accelerator])


def either_size(name: str | None) -> tuple[str, str] | None:
    """What a name means that stands for two sizes of a GPU, and what to say instead."""
    if (name or "").upper() != "A100":
        return None
    return "A100 may be either size, and is planned as the one with 80 GB", (
        "say A100-40G or A100-80G"
    )


def max_gpus_per_node(gpu: GPU) -> int:
    """GPUs in the largest machine that has this type; 8 where EC2 has none."""
    return max((i.gpus for i in instances().values() if i.gpu is gpu), default=8)

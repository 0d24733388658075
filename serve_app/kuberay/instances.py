"""The EC2 machines with NVIDIA GPUs, and which of them a pod fits on.

The table is generated from Karpenter's instance-type documentation (v1.14, AL2023, default
kubelet reservations). GPU memory is what the EC2 API reports; CUDA sees slightly less.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from serve_app.errors import ConfigError, did_you_mean

# Ray's name of an accelerator -> the GPU's name in EC2 (and in Karpenter's labels), and its
# memory in MiB where the name alone is not enough. Source: ray/util/accelerators.
_RAY_NAMES: dict[str, tuple[str, int | None]] = {
    "T4": ("t4", None),
    "V100": ("v100", None),
    "A10G": ("a10g", None),
    "L4": ("l4", None),
    "L40S": ("l40s", None),
    "A100": ("a100", None),
    "A100-40G": ("a100", 40960),
    "A100-80G": ("a100", 81920),
    "H100": ("h100", None),
    "H200": ("h200", None),
    "B200": ("b200", None),
    "B300": ("b300", None),
    "RTX-PRO-6000": ("rtx-pro-server-6000", None),
}


@dataclass(frozen=True)
class Instance:
    """One EC2 instance type; memory in MiB, CPU in thousandths of a core."""

    name: str
    gpu: str
    gpus: int
    gpu_memory_mib: int
    vcpus: int
    allocatable_cpu_m: int
    allocatable_memory_mib: int
    efa: int
    local_nvme_gb: int
    arch: str

    @property
    def family(self) -> str:
        return self.name.split(".")[0]


@cache
def table() -> tuple[Instance, ...]:
    """Every type with at least one whole GPU, smallest first."""
    text = files("serve_app").joinpath("data/ec2_gpu_instances.csv").read_text()
    rows = [
        Instance(
            name=row["instance_type"],
            gpu=row["gpu"],
            gpus=int(row["gpu_count"]),
            gpu_memory_mib=int(row["gpu_mem_mib_each"]),
            vcpus=int(row["vcpu"]),
            allocatable_cpu_m=int(row["allocatable_cpu_m"]),
            allocatable_memory_mib=int(row["allocatable_mem_mib"]),
            efa=int(row["efa"] or 0),
            local_nvme_gb=int(row["local_nvme_gb"] or 0),
            arch=row["arch"],
        )
        for row in csv.DictReader(text.splitlines())
    ]
    # The image is for amd64; the fractional GPUs of g6f have no nvidia.com/gpu to ask for.
    whole = [row for row in rows if row.gpus and row.arch == "amd64"]
    return tuple(sorted(whole, key=lambda row: (row.gpus, row.allocatable_memory_mib, row.name)))


@cache
def by_name() -> dict[str, Instance]:
    return {instance.name: instance for instance in table()}


def with_accelerator(accelerator: str, where: str) -> tuple[Instance, ...]:
    """The types that carry an accelerator, by Ray's name for it, smallest first.

    Raises:
        ConfigError: no EC2 type has it, with the closest name that one has.
    """
    found = _RAY_NAMES.get(accelerator)
    if found is None:
        raise ConfigError(
            f"{where}: no EC2 instance has the accelerator '{accelerator}'"
            f"{did_you_mean(accelerator, _RAY_NAMES)} (known: {', '.join(_RAY_NAMES)})"
        )
    gpu, memory = found
    return tuple(row for row in table() if row.gpu == gpu and memory in (None, row.gpu_memory_mib))

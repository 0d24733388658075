"""What this machine has for engines: GPUs as NVIDIA's driver names them, cores, free memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from serve_app.errors import UserError
from serve_app.planner import hardware
from serve_app.planner.hardware import GPU, MIB, Machine

_QUERY = "index,uuid,name,memory.total,compute_cap"
_PATIENCE_S = 60.0
"""Seconds for ``nvidia-smi``, which wakes idle GPUs one after the other."""


def look() -> Machine:
    """This machine, as this process may use it (CUDA_VISIBLE_DEVICES, cgroups).

    Raises:
        UserError: the driver is there and does not answer.
    """
    return Machine(
        gpus=gpus(),
        cores=len(os.sched_getaffinity(0)),
        free_memory_bytes=free_memory_bytes(),
    )


def gpus() -> tuple[GPU, ...]:
    """The GPUs that this process may use; raises as :func:`look` does."""
    return gpus_in(_nvidia_smi(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def free_memory_bytes() -> int:
    """Host memory that is free or can be freed at once, within this process's cgroups."""
    return _memory_bytes("MemAvailable", _held)


def memory_bytes() -> int:
    """Host memory in all, within this process's cgroups."""
    return _memory_bytes("MemTotal", lambda group: 0)


def may_have_others() -> bool:
    """Whether GPUs may be here that ``nvidia-smi`` does not list: AMD's, or NVIDIA's without it."""
    return any(map(os.path.exists, ("/dev/kfd", "/dev/nvidiactl", "/dev/dxg")))


def _nvidia_smi() -> str:
    """The GPUs as the driver's own tool lists them; empty without a driver.

    Neither NVML's Python binding nor torch is a dependency of ours on every machine.
    """
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    except FileNotFoundError:
        return ""
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"nvidia-smi does not answer ({error}); mend the GPU's driver") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["no reason given"]
        if "No devices were found" in said[0]:
            return ""
        raise UserError(f"nvidia-smi fails ({said[0].rstrip('.')}); mend the GPU's driver")
    return done.stdout


def gpus_in(listing: str, visible: str | None) -> tuple[GPU, ...]:
    """The GPUs of ``nvidia-smi``'s listing that ``CUDA_VISIBLE_DEVICES`` (None: unset) leaves.

    Raises:
        UserError: a line without a memory size, as for GPUs that share the host's memory.
    """
    found: dict[str, GPU] = {}
    for line in filter(str.strip, listing.splitlines()):
        index, uuid, name, memory, capability = (part.strip() for part in line.split(","))
        try:
            gpu = hardware.of_driver(name, int(memory) * MIB, round(10 * float(capability)))
        except ValueError:
            raise UserError(
                f"nvidia-smi does not tell the memory of GPU {index} ({name}); write a config file "
                "instead of naming models"
            ) from None
        found[index] = gpu
        if _is_visible(index, uuid, visible):
            continue
        del found[index]
    return tuple(found.values())


def _is_visible(index: str, uuid: str, visible: str | None) -> bool:
    """As CUDA reads the variable: what follows an invalid entry does not count."""
    if visible is None:
        return True
    for entry in (part.strip() for part in visible.split(",")):
        if entry == index or (entry.startswith("GPU-") and uuid.startswith(entry)):
            return True
        if not entry.isdigit() and not entry.startswith("GPU-"):
            return False
    return False


def _memory_bytes(field: str, held: Callable[[Path], int]) -> int:
    """Host memory by a field of /proc/meminfo, within this process's cgroups.

    ``held`` is what of a cgroup's limit is not to be counted.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return min([int(fields[field].split()[0]) * 1024, *_left_in_cgroups(held)])


def _left_in_cgroups(held: Callable[[Path], int]) -> list[int]:
    """What each cgroup (v2) around this process allows; empty where none limits it."""
    left = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if not line.startswith("0::/"):
            continue
        folder = Path("/sys/fs/cgroup") / line.removeprefix("0::/")
        for group in (folder, *folder.parents):
            try:
                limit = (group / "memory.max").read_text().strip()
                if limit != "max":
                    left.append(int(limit) - held(group))
            except (OSError, ValueError):
                continue
    return left


def _held(group: Path) -> int:
    """Bytes that a cgroup holds and cannot give back: without clean files."""
    used = int((group / "memory.current").read_text())
    for line in (group / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            used -= int(line.split()[1])
    return used

"""The GPU that Ray has given this replica, as NVIDIA's driver sees it: memory, and who holds it.

Everything that is asked of the driver (NVML) is here. NVML makes no CUDA context.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from serve_app.planner import hardware
from serve_app.planner.hardware import GPU

LOCKS = "/tmp"
"""The folder of the lock files of a node's GPUs: not TMPDIR, which a model's ``env`` may set for
itself alone."""


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU, in bytes; None where the driver does not tell."""

    pid: int
    held: int | None


class Device(Protocol):
    """One GPU. Sizes are in bytes."""

    uuid: str
    kind: GPU
    """Its type, with CUDA's total."""

    def free(self) -> int: ...

    def holders(self) -> list[Holder]: ...


def given() -> Device | None:
    """The first GPU that this process may use; None without NVIDIA's driver."""
    from vllm.third_party import pynvml

    try:
        return _Nvidia(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except pynvml.NVMLError:
        return None


class _Nvidia:
    def __init__(self, nvml: Any, visible: str | None) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        first = (visible or "0").split(",")[0].strip()
        by_index = first.isdigit()
        self._handle = (
            nvml.nvmlDeviceGetHandleByIndex(int(first))
            if by_index
            else nvml.nvmlDeviceGetHandleByUUID(first)
        )
        self.uuid = str(nvml.nvmlDeviceGetUUID(self._handle))
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(self._handle)
        self.kind = hardware.of_driver(
            str(nvml.nvmlDeviceGetName(self._handle)),
            int(nvml.nvmlDeviceGetMemoryInfo(self._handle).total),
            10 * major + minor,
        )

    def free(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).free)

    def holders(self) -> list[Holder]:
        """Most first. In a container the driver may name pids of the host, or none."""
        found = []
        for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            held = process.usedGpuMemory
            found.append(Holder(int(process.pid), None if held is None else int(held)))
        return sorted(found, key=lambda holder: -(holder.held or 0))


def name_of(pid: int) -> str:
    """Whose a process is, in words: a model's name for an engine of ours, else its command."""
    for one in _with_parents(pid):
        # Ray's title for a replica: ray::ServeReplica:APPLICATION:DEPLOYMENT
        if found := re.search(r"ray::ServeReplica:(.+):ModelServer", _command(one)):
            return f"'{found[1]}'"
    command = _command(pid).split()
    return os.path.basename(command[0]) if command else "a process of another container"


def held_by(pid: int, holders: list[Holder]) -> int | None:
    """The bytes that a process and its children hold; None where the driver does not tell."""
    held = [one.held for one in holders if pid in _with_parents(one.pid)]
    told = [size for size in held if size is not None]
    return sum(told) if told else None


def _with_parents(pid: int) -> Iterator[int]:
    while pid > 1:
        yield pid
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        pid = int(stat.rpartition(")")[2].split()[1])


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    return ""

"""The lock that an engine of a swap group holds while it is on the GPU.

A group has as many slots as models may be awake, each a file on the members' node. EngineCore's
process, which has the GPU's memory, locks one before it loads or wakes, and unlocks it when it is
asleep. The kernel unlocks it when the process dies, however it does. So two engines are never in
one slot, whatever anybody believes.

The lock is POSIX's (``fcntl.lockf``), which belongs to the process alone: with ``flock``, a process
that EngineCore has forked would keep it.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve_app.replica.start import gpu

TURN_ENV = "SERVE_APP_TURN"
"""Environment variable of an engine that starts: a file that will say which slot it is to lock
before it loads. It has imported all it needs by then."""

TAKE = "serve_app_take_slot"
"""The method that :func:`prepare` adds to EngineCore, by which :func:`take` asks."""

LEAVE = "serve_app_leave_slot"

TRY_S = 2.0
"""Seconds for which :func:`take` tries: a process that dies leaves a slot in less."""

MEMORY_S = 20.0
"""Seconds for which a waking engine waits for the GPU's memory. A killed process's is freed after
its locks."""

_GROWS = 64 << 20
"""Bytes in 0.3 s by which free memory grows while a dead engine's comes back."""

_held: tuple[str, int] | None = None
"""In EngineCore's process: the slot's file and its descriptor."""


def file(group: str, slot: int) -> str:
    """The file of a slot; ``group`` is the id of the group's GPU, unlike that of any other."""
    folder = Path(gpu.LOCKS) / f"serve_app-slots-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return str(folder / f"{group}.{slot}")


def keep(path: str) -> None:
    """Touch the file of a slot that an engine has: machines remove from their folder for temporary
    files what is days old, and the next engine would lock a new file."""
    with contextlib.suppress(OSError):
        os.utime(path)


def give_turn(turn: Path, path: str) -> None:
    """Let the engine that waits for ``turn`` load once it has the slot."""
    new = turn.with_suffix(".new")
    new.write_text(path)
    new.rename(turn)


async def take(llm: Any, path: str) -> str:
    """Have the engine lock a slot; return why it could not, or an empty text."""
    deadline = time.monotonic() + TRY_S
    while True:
        why: str = await llm.engine_core.call_utility_async(TAKE, path)
        if not why or time.monotonic() > deadline:
            return why


async def leave(llm: Any) -> None:
    """Have the engine unlock its slot."""
    await llm.engine_core.call_utility_async(LEAVE)


# --- in EngineCore's process ----------------------------------------------------------------------


def prepare() -> None:
    """Add the two methods; an engine that is to load waits here until it has its slot."""
    core: Any = sys.modules.get("vllm.v1.engine.core")
    # Front ends have that module too.
    if core is None or not multiprocessing.current_process().name.startswith("EngineCore"):
        return
    setattr(core.EngineCore, TAKE, lambda _, path: _take(path))
    setattr(core.EngineCore, LEAVE, lambda _: _leave())
    if turn := os.environ.get(TURN_ENV):
        while not (Path(turn).exists() and _lock(Path(turn).read_text())):
            time.sleep(0.05)
        _settle(_driver_free_bytes, time.sleep)


def _take(path: str) -> str:
    if not _lock(path):
        time.sleep(0.05)
        return "another engine has the slot"
    needs, deadline = _asleep_bytes(), time.monotonic() + MEMORY_S
    while needs and (free := _free_bytes()) < needs:
        if time.monotonic() > deadline:
            _leave()
            return f"{needs / 2**30:.1f} GiB of the GPU are needed, and {free / 2**30:.1f} are free"
        time.sleep(0.02)
    return ""


def _lock(path: str) -> bool:
    global _held
    if _held:
        if _held[0] == path:
            return True
        _leave()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return False
    _held = path, file
    return True


def _leave() -> None:
    global _held
    if _held:
        os.close(_held[1])
        _held = None


def _settle(free: Callable[[], int], sleep: Callable[[float], object]) -> None:
    """Wait until the GPU's free memory grows no more: vLLM refuses to start in too little."""
    deadline, before = time.monotonic() + MEMORY_S, free()
    while time.monotonic() < deadline:
        sleep(0.3)
        now = free()
        if now < before + _GROWS:
            return
        before = now


def _driver_free_bytes() -> int:
    """Free memory of this engine's GPU by NVIDIA's driver, since CUDA would make a context; 0
    without one."""
    device = gpu.given()
    return device.free() if device else 0


def _asleep_bytes() -> int:
    """What vLLM maps again on the GPU when it wakes; 0 on a CPU."""
    module: Any = sys.modules.get("vllm.device_allocator.cumem")
    allocator = module and module.CuMemAllocator.instance
    return int(allocator.get_current_usage()) if allocator else 0


def _free_bytes() -> int:
    import torch

    return int(torch.accelerator.get_memory_info()[0])

"""An engine starts on a GPU that several share only into memory that is free, and stays free.

What is free now says little while neighbours are still growing into their parts. So each replica
that starts an engine notes its part in a file beside the GPU's lock, and keeps that file locked
until its engine serves: what such neighbours have not taken yet is not free. Engines whose parts
fit together start side by side. The kernel takes the locks of a process that ends, however it
ends. The memory of a dead engine comes back some seconds later; until then its successor waits.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from serve_app.errors import UserError
from serve_app.planner.hardware import GIB
from serve_app.replica.start.gpu import LOCKS, Device, held_by, name_of
from serve_app.replica.start.progress import FIRST

RETURNED_S = 60.0
"""Seconds in which the memory of an engine that has died must be free again."""

PERIOD_S = 0.2
"""Seconds between two looks."""

TURN = "queued: other engines start on its GPU"
MEMORY = "held until its GPU has memory free"
"""Phases of a start; one that begins with "waiting for" waits for a place in the cluster."""


@dataclass(frozen=True)
class Starting:
    """A replica whose engine starts on the GPU; ``part`` is in bytes."""

    pid: int
    part: int


@contextmanager
def turn(
    device: Device,
    needed: int,
    *,
    model: str,
    limit_s: float,
    tell: Callable[[str], object],
    alone: bool = False,
    folder: str | None = None,
) -> Iterator[None]:
    """Wait until this replica's engine has room to start, and keep the room in the ``with`` block.

    Args:
        needed: bytes that must be free, and are this replica's from then on.
        limit_s: seconds to wait for others that start. The wait for memory has :data:`RETURNED_S`.
        tell: gets the phase of the start.
        alone: whether no other engine may start on the GPU meanwhile: this one measures.
        folder: where the locks are.

    Raises:
        UserError: the time is up; who holds the memory.
    """
    place = Path(folder or LOCKS) / f"serve-app-{device.uuid}"
    mine = place.with_name(f"{place.name}-{os.getpid()}.start")
    with ExitStack() as kept:
        door = kept.enter_context(_file(place.with_name(f"{place.name}.lock")))
        _wait(lambda: _room(device, needed, door, place, mine, alone), device, needed, model,
              limit_s, tell)  # fmt: skip
        kept.callback(mine.unlink, missing_ok=True)
        note = kept.enter_context(_file(mine))
        fcntl.flock(note, fcntl.LOCK_EX)
        note.write(f"{os.getpid()} {needed}".encode())
        note.flush()
        if not alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        tell(FIRST)
        yield


def _room(
    device: Device, needed: int, door: IO[bytes], place: Path, mine: Path, alone: bool
) -> str:
    """Empty, with the door locked, if there is room; else the phase of the wait for it."""
    if not _taken(door):
        return TURN
    others = _starting(place, mine)
    holders = device.holders() if others else []
    to_come = sum(max(0, one.part - (held_by(one.pid, holders) or 0)) for one in others)
    if device.free() - to_come >= needed and not (alone and others):
        return ""
    fcntl.flock(door, fcntl.LOCK_UN)
    return TURN if others else MEMORY


def _wait(
    room: Callable[[], str],
    device: Device,
    needed: int,
    model: str,
    limit_s: float,
    tell: Callable[[str], object],
) -> None:
    began = time.monotonic()
    full_since: float | None = None
    told = ""
    while phase := room():
        now = time.monotonic()
        full_since = (full_since or now) if phase == MEMORY else None
        if phase != told:
            tell(phase)
            told = phase
        if full_since is not None and now - full_since >= RETURNED_S:
            raise UserError(_full(device, needed, model))
        if full_since is None and now - began >= limit_s:
            raise UserError(
                f"'{model}' did not get its turn to start on GPU {device.uuid} within "
                f"start_timeout_s ({limit_s:g} s): starts of other models on it take longer; "
                "raise start_timeout_s"
            )
        time.sleep(PERIOD_S)


def _starting(place: Path, mine: Path) -> list[Starting]:
    """The other replicas whose engines start now; the notes of those that have died are removed."""
    found = []
    for path in place.parent.glob(f"{place.name}-*.start"):
        with suppress(OSError, ValueError), path.open("rb") as file:
            if path == mine or _taken(file):
                path.unlink()
            else:
                pid, part = file.read().split()
                found.append(Starting(int(pid), int(part)))
    return found


def _file(path: Path) -> IO[bytes]:
    """The file, which every user of this machine may lock."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "rb+")
    except PermissionError:  # another user's, with a umask: a lock wants no more than to read it
        return path.open("rb")


def _taken(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _full(device: Device, needed: int, model: str) -> str:
    held = [
        f"{name_of(one.pid)} (pid {one.pid}"
        + (f", {one.held / GIB:.1f} GiB)" if one.held is not None else ")")
        for one in device.holders()
    ]
    by = ", ".join(held) or "a process that the driver does not name"
    return (
        f"'{model}' needs {needed / GIB:.1f} GiB free on its GPU ({device.kind.name}), and "
        f"{device.free() / GIB:.1f} are, {RETURNED_S:.0f} s after its turn to start; the rest is "
        f"held by {by}; end what does not belong there, or make the parts of the GPU smaller"
    )

"""One engine at a time starts on a GPU that several share, and only into memory that is free.

What is free tells something only while no neighbour is taking its part or returning one. So an
engine starts while its replica holds a lock on a file that is named by the GPU. The kernel takes
the lock from a process that ends, however it ends. The memory of a dead engine comes back some
seconds later; until then its successor waits.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from serve_app.errors import UserError
from serve_app.planner.hardware import GIB
from serve_app.replica.start.gpu import Device, name_of
from serve_app.replica.start.progress import FIRST

RETURNED_S = 60.0
"""Seconds in which the memory of an engine that has died must be free again."""

PERIOD_S = 0.2
"""Seconds between two looks."""

TURN = "queued: another engine starts on its GPU"
MEMORY = "held until its GPU has memory free"
"""Phases of a start; one that begins with "waiting for" waits for a place in the cluster."""


@contextmanager
def turn(
    device: Device,
    needed: int,
    *,
    model: str,
    limit_s: float,
    tell: Callable[[str], object],
    folder: str | None = None,
) -> Iterator[None]:
    """Wait until this replica may start its engine, and keep others from it in the ``with`` block.

    Args:
        needed: bytes that must be free.
        limit_s: seconds to wait for the turn. The wait for memory has :data:`RETURNED_S`.
        tell: gets the phase of the start.
        folder: where the lock is; by default the machine's folder for temporary files.

    Raises:
        UserError: the time is up; who holds the memory.
    """
    with _lock(Path(folder or tempfile.gettempdir()) / f"serve-app-{device.uuid}.lock") as file:
        _until(
            lambda: _taken(file),
            limit_s,
            lambda: tell(TURN),
            lambda: (
                f"'{model}' did not get its turn to start on GPU {device.uuid} within "
                f"start_timeout_s ({limit_s:g} s): another model's start on it takes longer; "
                "raise start_timeout_s"
            ),
        )
        _until(
            lambda: device.free() >= needed,
            RETURNED_S,
            lambda: tell(MEMORY),
            lambda: _full(device, needed, model),
        )
        tell(FIRST)
        yield


def _lock(path: Path) -> IO[bytes]:
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


def _until(
    holds: Callable[[], bool],
    limit_s: float,
    waits: Callable[[], object],
    why_not: Callable[[], str],
) -> None:
    deadline = time.monotonic() + limit_s
    told = False
    while not holds():
        if not told:
            waits()
            told = True
        if time.monotonic() > deadline:
            raise UserError(why_not())
        time.sleep(PERIOD_S)


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

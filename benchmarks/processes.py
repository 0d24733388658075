"""Processes of a benchmark: what stands around an arm, and what an arm has used."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil

from serve_app import lifeline
from serve_app.errors import UserError

_WIRE = Path(__file__).parent / "relay" / "wire.c"


def wire(work: Path) -> Path:
    """The program of ``relay/wire.c``, compiled into the folder ``work``.

    Raises:
        UserError: there is no compiler.
    """
    program = work / "wire"
    try:
        subprocess.run(["gcc", "-O2", "-o", program, _WIRE], check=True)
    except FileNotFoundError:
        raise UserError("it needs gcc; install it (apt-get install gcc)") from None
    return program


@contextlib.contextmanager
def process(
    command: list[Any], env: dict[str, str], output: IO[bytes] | None = None
) -> Iterator[int]:
    """The id of a process that runs meanwhile. It is killed then, with all that it has started."""
    started = subprocess.Popen(
        [str(part) for part in command],
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        preexec_fn=lifeline.interrupt_with_parent,
    )
    try:
        yield started.pid
    finally:
        for one in reversed(tree(started.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        started.wait()


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that it has started; empty once it is gone."""
    try:
        root = psutil.Process(pid)
        if root.status() == psutil.STATUS_ZOMBIE:
            return []
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_ns(pid: int) -> int:
    """CPU that a process has used in all its threads, by the scheduler's own clock."""
    return sum(
        int((task / "schedstat").read_text().split()[0])
        for task in Path(f"/proc/{pid}/task").iterdir()
    )


def cpu_s(pid: int) -> float:
    """CPU seconds, in user space and in the kernel, that such a tree has used."""
    times = [one.cpu_times() for one in tree(pid)]
    return float(sum(t.user + t.system for t in times))


def memory_mib(pid: int) -> float:
    """Memory of such a tree; of pages that several processes share, a part each (PSS)."""
    return float(sum(one.memory_full_info().pss for one in tree(pid))) / 2**20


def until(what: Callable[[], Any], within_s: float) -> None:
    """Wait for it.

    Raises:
        TimeoutError: it did not come.
    """
    deadline = time.monotonic() + within_s
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.2)

"""Processes by session: what a test started, with all that grew out of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from serve_app import lifeline

REPO = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_port_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def start(command: list[str], log: Path, **env: str) -> subprocess.Popen[bytes]:
    """Start a command as the leader of a session of its own, as a terminal would."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=REPO,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **env},
            preexec_fn=lifeline.interrupt_with_parent,
        )


def in_session(leader: int) -> dict[int, str]:
    """Command lines by pid of what lives in the session that ``leader`` led."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # After the name, in parentheses: state, parent, group, session.
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(entry.name)] = title
        except OSError:
            continue  # gone meanwhile
    return found


def descendants(pid: int) -> set[int]:
    """Pids of all that grew out of a process and still has its parents."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    parents[int(entry.name)] = int(fields[1])
    found: set[int] = set()
    newest = {pid}
    while newest:
        newest = {child for child, parent in parents.items() if parent in newest}
        found |= newest
    return found


def title(pid: int) -> str:
    """A process's command line; empty for one that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def kill_session(leader: int) -> None:
    for pid in in_session(leader):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def eventually(what: Callable[[], Any], within_s: float = 10.0, every_s: float = 0.1) -> Any:
    """Ask until the answer is true or the time is up; the last answer."""
    deadline = time.monotonic() + within_s
    while True:
        answer = what()
        if answer or time.monotonic() > deadline:
            return answer
        time.sleep(every_s)


def children(pid: int) -> list[int]:
    """The pids of what a process has started by its first thread."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]

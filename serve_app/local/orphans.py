"""Finds and ends processes that outlived a killed ``serve run``.

Ray's daemons, its HAProxy and vLLM's engines normally end with their parent. After a
``kill -9`` of ``serve run`` some do not (Ray 2.60: HAProxy and two agents of each node). Only
processes that are children of process 1 and run from this environment's own folder are touched:
none of another installation, and none that still has its parent.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Orphan:
    """A process that lost its parent."""

    pid: int
    name: str


def orphans() -> list[Orphan]:
    """Orphaned Ray, HAProxy and vLLM processes of this Python environment and this user."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if entry.stat().st_uid != os.getuid() or _parent(entry) != 1:
                continue
            name = _name_if_ours(entry)
        except (OSError, ValueError):
            continue  # gone, or not ours to read
        if name:
            found.append(Orphan(int(entry.name), name))
    return sorted(found, key=lambda o: o.pid)


def _parent(entry: Path) -> int:
    # The name in parentheses may contain spaces. The parent is the second field after it.
    return int((entry / "stat").read_text().rpartition(")")[2].split()[1])


def _name_if_ours(entry: Path) -> str | None:
    first, _, _ = (entry / "cmdline").read_bytes().decode(errors="replace").partition("\0")
    home = str(Path(sys.prefix).resolve()) + os.sep
    if first.startswith(home):
        # Not gcs_server, raylet or dashboard: after `ray start` these have no parent by design.
        return "haproxy" if Path(first).name == "haproxy" else None
    # Ray's workers and vLLM's processes rename themselves, which may overwrite their environment.
    # So either the environment tells, or the libraries that they have loaded.
    if first.startswith(("ray::", "VLLM::")):
        first = first.split()[0]
        environment = (entry / "environ").read_bytes().decode(errors="replace")
        if f"VIRTUAL_ENV={sys.prefix}" in environment.split("\0") or home in environment:
            return first
        if home in (entry / "maps").read_text(errors="replace"):
            return first
    return None


def end(found: list[Orphan], patience_s: float = 5.0) -> list[Orphan]:
    """Send SIGTERM, after ``patience_s`` seconds SIGKILL; return those that were still there."""
    for orphan in found:
        send_signal(orphan.pid, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    left = found
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = [o for o in left if send_signal(o.pid, 0)]
    for orphan in left:
        send_signal(orphan.pid, signal.SIGKILL)
    return left


def send_signal(pid: int, number: int) -> bool:
    """Send a signal (0 only asks); False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True

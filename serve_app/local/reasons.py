"""Why ``serve run`` ended by itself, in one sentence.

A known reason comes with a remedy. Any other is the last exception in the log.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

_SLOW = "The current node timed out during startup"

_KNOWN = (
    # (pattern in the log, sentence): patterns are Ray 2.60's and Python's own words.
    (
        r"AF_UNIX path (?:length cannot exceed|too long)",
        "the folder for Ray's sockets has too long a path; set TMPDIR to a shorter one, as /tmp",
    ),
    (
        r"No space left on device",
        "the disk of its folder is full; free some of it, or set TMPDIR to a larger one",
    ),
    (
        r"Read-only file system: '([^']+)'|Permission denied: '([^']+)'",
        "it may not write {0}; make that writable for this user, or remove it if it is another "
        "user's",
    ),
    (
        r"Failed to bind to address '([^']+)'|cannot bind socket .*?\[([^\]]+)\]",
        "{0} was taken meanwhile; stop what uses it, or choose another port with --port",
    ),
    (
        _SLOW,
        "Ray did not start in its 30 s, twice; start it again when the machine has less to do",
    ),
    (
        r"pthread_create failed|can't start new thread",
        "the limit of processes is too low for Ray; raise it (ulimit -u, or the container's pids)",
    ),
    (
        r"Too many open files",
        "the limit of open files is too low for Ray; raise it (ulimit -n 65536)",
    ),
    (
        r"Cannot allocate memory|MemoryError",
        "memory ran out; stop other programs, or serve fewer models",
    ),
)
_EXCEPTION = re.compile(r"^(?:\w+\.)*(?:\w+(?:Error|Exception|Timeout)|Exception): (.+)", re.M)
_MARKS = re.compile(r"\x1b\[[0-9;]*m|^\(\w[^)]*pid=\d+[^)]*\) ", re.M)


def why_it_ended(status: int, log: Path | None) -> str:
    """One sentence for ``serve run``'s exit ``status``. Without a log nothing more is known."""
    text = _MARKS.sub("", log.read_text(errors="replace")) if log else ""
    where = f" (its log is {log})" if log else ""
    return f"serve run ended by itself: {_reason(status, text)}{where}"


def was_slow(log: Path | None) -> bool:
    """Whether Ray's own start timed out. On a busy machine a second start may succeed."""
    return log is not None and _SLOW in log.read_text(errors="replace")


def _reason(status: int, text: str) -> str:
    known = [(m, told) for pattern, told in _KNOWN for m in re.finditer(pattern, text)]
    if known:  # the last one ended it; earlier ones may be warnings
        match, told = max(known, key=lambda each: each[0].start())
        return told.format(next((group for group in match.groups() if group), ""))
    if status < 0:
        name = signal.Signals(-status).name
        of_memory = ", as the kernel does where memory runs out" if name == "SIGKILL" else ""
        return f"it was ended by {name}{of_memory}"
    if said := _EXCEPTION.findall(text):
        return str(said[-1]).rstrip(".")
    return f"it gave no reason but status {status}"

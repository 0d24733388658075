"""Where a process spends its time: py-spy's samples, added up by function."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from serve_app.errors import UserError

_LINE = re.compile(r":\d+\)$")


def py_spy() -> str:
    """The path of py-spy.

    Raises:
        UserError: it is not installed.
    """
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if found is None:
        raise UserError("py-spy is not installed; run: pip install py-spy")
    return found


def record(pid: int, seconds: int, into: Path, *, native: bool) -> subprocess.Popen[bytes]:
    """Start to sample a process; ``into`` gets folded stacks (speedscope.app opens them)."""
    command = [py_spy(), "record", "--pid", str(pid), "-d", str(seconds), "-r", "200"]
    command += [
        "-f",
        "raw",
        "--gil",
        "--threads",
        "-o",
        str(into),
        *(["--native"] if native else []),
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def summary(stacks: Path, seconds: int, top: int = 25) -> str:
    """The functions with the most samples, by themselves and with what they call."""
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    threads: Counter[str] = Counter()
    total = 0
    for line in stacks.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [_LINE.sub(")", frame) for frame in stack.split(";")]
        samples = int(count)
        total += samples
        threads[frames[0]] += samples
        own[frames[-1]] += samples
        within.update(dict.fromkeys(set(frames[1:]), samples))
    if not total:
        return "  no samples"
    per_core = 200 * seconds
    lines = [f"  {total} samples in {seconds} s = {total / per_core:.2f} threads busy"]
    lines += [f"  {n / per_core:6.1%} of a core  {thread}" for thread, n in threads.most_common(6)]
    lines.append("  by itself (share of the samples):")
    lines += [f"  {n / total:6.1%}  {_short(frame)}" for frame, n in own.most_common(top)]
    lines.append("  with what it calls:")
    lines += [f"  {n / total:6.1%}  {_short(frame)}" for frame, n in within.most_common(top + 15)]
    return "\n".join(lines)


def _short(frame: str) -> str:
    return re.sub(r"\([^()]*site-packages/", "(", frame)

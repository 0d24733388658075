"""The tables of a run."""

from __future__ import annotations

import datetime
from typing import Any

from benchmarks import report

_ALONE = "upstream alone"


def markdown(data: dict[str, Any]) -> str:
    """The page that is written beside the numbers."""
    records = data["records"]
    arms = list(dict.fromkeys(r["arm"] for r in records))
    others = [arm for arm in arms if arm != _ALONE]
    parts = [
        f"# The gateway beside others, {datetime.date.today()}",
        f"{report.facts(data['machine'])}\n\n`{data['command']}`, "
        f"{max(r['round'] for r in records)} rounds, lowest-median-highest. "
        "Load average {:.2f} before the first round, {:.2f} at the end "
        "(the run itself keeps {} cores busy).".format(
            *data["load_average"], data["machine"]["cores"]
        ),
        _speed(records, others),
        _latency(records, others),
        _ratios(records, others),
        _memory(data["memory"]),
        *(f"Could not run: {name}: {why}" for name, why in data["absent"].items()),
        *(_recorded(arm, said) for arm, said in data["recorded"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def _of(records: list[dict[str, Any]], arm: str, key: str) -> list[float]:
    return [r[key] for r in records if r["arm"] == arm]


def _speed(records: list[dict[str, Any]], arms: list[str]) -> str:
    rows = [
        [
            arm + _errors(records, arm),
            *(
                report.spread([1e6 / cpu for cpu in _of(records, arm, key)], "{:.0f}")
                for key in ("request_cpu_us", "stream_cpu_us", "event_cpu_us")
            ),
            report.spread(_of(records, arm, "requests_per_s"), "{:.0f}"),
        ]
        for arm in arms
    ]
    header = [
        "per second and core",
        "requests, whole answers",
        "requests, streams of 16 tokens",
        "events, 32 streams of 50/s",
        "requests/s of the one process (c=64, whole answers)",
    ]
    return report.table(header, rows)


def _errors(records: list[dict[str, Any]], arm: str) -> str:
    errors = int(sum(_of(records, arm, "errors")))
    return f" ({errors} ERRORS)" if errors else ""


def _latency(records: list[dict[str, Any]], arms: list[str]) -> str:
    alone = {r["round"]: r for r in records if r["arm"] == _ALONE}

    def added(arm: str, key: str) -> str:
        mine = [r for r in records if r["arm"] == arm]
        return report.spread([(r[key] - alone[r["round"]][key]) / 1e3 for r in mine], "{:.2f}")

    rows = [
        [
            arm,
            added(arm, "alone_p50_us"),
            added(arm, "alone_p99_us"),
            report.spread(_of(records, arm, "rate"), "{:.0f}"),
            added(arm, "rate_p50_us"),
            added(arm, "rate_p99_us"),
        ]
        for arm in arms
    ]
    header = [
        "ms added to the upstream alone",
        "p50, c=1",
        "p99, c=1",
        "open loop, requests/s",
        "p50",
        "p99",
    ]
    return report.table(header, rows)


def _ratios(records: list[dict[str, Any]], arms: list[str]) -> str:
    on = next((arm for arm in arms if arm.endswith("everything on")), None)
    if on is None or len(arms) < 2:
        return ""
    by_round = {(r["arm"], r["round"]): r for r in records}
    rows = []
    for other in arms:
        if other == on:
            continue
        cells = []
        for key in ("request_cpu_us", "stream_cpu_us", "event_cpu_us"):
            pairs = [(by_round[other, n][key], r[key]) for (a, n), r in by_round.items() if a == on]
            cells.append(report.spread([theirs / mine for theirs, mine in pairs], "{:.2f}"))
        rows.append([f"everything on / {other}", *cells])
    header = ["per core, of the same round", "requests, whole answers", "requests, streams",
              "events"]  # fmt: skip
    return report.table(header, rows)


def _memory(memory: list[dict[str, Any]]) -> str:
    rows = [
        [
            m["arm"],
            f"{m['before_mib']:.0f}",
            f"{m['streams']}",
            f"{m['held_mib']:.0f}",
            f"{(m['held_mib'] - m['before_mib']) * 1024 / max(1, m['streams']):.1f}",
            f"{m['after_mib']:.0f}",
        ]
        for m in memory
    ]
    header = ["PSS, MiB", "after the rounds", "streams open", "with them", "KiB for each",
              "after them"]  # fmt: skip
    return report.table(header, rows)


def _recorded(arm: str, said: dict[str, int]) -> str:
    return (
        f"{arm}: {said['sent']} requests were sent; the usage database has "
        f"{said['requests']}, {said['unreported']} of them without tokens."
    )

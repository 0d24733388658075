"""The tables of a result file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks import report
from benchmarks.routing import realtime
from benchmarks.routing.policies import OURS, POLICIES, ROUND_ROBIN, THEIRS
from benchmarks.routing.simulation import FEW_LOADS, MAIN, SEVERAL
from benchmarks.routing.traces import TRACES

Run = dict[str, Any]


def markdown(data: dict[str, Any], name: str) -> str:
    """The page that is written beside the numbers."""
    runs = data["runs"]
    parts = [
        f"# The choice of a replica, {data['date']}",
        f"{report.facts(data['machine'])}; all numbers: {name}",
        "## Simulated: goals",
        f"{MAIN[0]} replicas, {MAIN[1]} gateway; lowest-median-highest of the seeds. ×1 is what "
        "round robin completes where more is offered; the peak is that up to ×1.5.",
        goals(runs),
        "## Simulated: several gateways",
        several(data),
        "## Simulated: all fleets",
        fleets(runs),
    ]
    if found := data.get("realtime"):
        parts += ["## In real time, over HTTP", real_time(found)]
    if "engines" in data:
        parts += ["## Real engines on a CPU", engines_of(data)]
    return "\n\n".join(parts) + "\n"


def of(runs: Iterable[Run], **wanted: Any) -> list[Run]:
    """Runs with these properties, by seed."""
    found = [run for run in runs if all(run[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda run: run["seed"])


def goals(runs: list[Run]) -> str:
    """Ours over round robin, over the best other and over vllm-router's, of the same seed."""
    main = of(runs, replicas=MAIN[0], gateways=MAIN[1])
    header = ["trace", "TTFT p90 at ×1, s", "÷ round robin", "÷ best other", "peak tokens/s",
              "÷ round robin", "÷ best other", "÷ vllm-router", "hit rate at ×1",
              "round robin's"]  # fmt: skip
    rows = []
    for trace in TRACES:
        at = {p: of(main, trace=trace, policy=p, load=1.0) for p in POLICIES}
        if not all(at.values()):
            continue
        ttft = {p: [run["ttft_s"]["p90"] for run in at[p]] for p in POLICIES}
        peaks = {p: _peaks(of(main, trace=trace, policy=p)) for p in POLICIES}
        others = [p for p in POLICIES if p != OURS]
        soonest = [min(values) for values in zip(*(ttft[p] for p in others), strict=False)]
        best = [max(values) for values in zip(*(peaks[p] for p in others), strict=False)]
        rows.append([
            trace,
            report.spread(ttft[OURS], "{:.2f}"),
            report.spread(_ratios(ttft[OURS], ttft[ROUND_ROBIN]), "{:.2f}"),
            report.spread(_ratios(ttft[OURS], soonest), "{:.2f}"),
            report.spread(peaks[OURS], "{:.0f}"),
            report.spread(_ratios(peaks[OURS], peaks[ROUND_ROBIN]), "{:.2f}"),
            report.spread(_ratios(peaks[OURS], best), "{:.2f}"),
            report.spread(_ratios(peaks[OURS], peaks[THEIRS]), "{:.2f}"),
            report.spread([run["hit"] for run in at[OURS]], "{:.2f}"),
            report.spread([run["hit"] for run in at[ROUND_ROBIN]], "{:.2f}"),
        ])  # fmt: skip
    return report.table(header, rows)


def several(data: dict[str, Any]) -> str:
    """Ours over each other policy, of the same seed, where there are several gateways."""
    before: list[Run] = data.get("alone", [])
    others = {p: data["runs"] for p in POLICIES if p != OURS}
    header = ["trace", "replicas", "gateways", "TTFT p90 at ×1, s",
              *(f"÷ {name}" for name in others), "÷ each knows its own",
              "tokens/s ÷ best other", "hit rate"]  # fmt: skip
    rows = []
    for trace in TRACES:
        for replicas, gateways in sorted(SEVERAL):
            case = {"trace": trace, "replicas": replicas, "gateways": gateways, "load": 1.0}
            ours = of(data["runs"], policy=OURS, **case)
            if not ours:
                continue
            theirs = {p: of(runs, policy=p, **case) for p, runs in others.items()}
            best = [max(r["tokens_per_s"] for r in of_seed)
                    for of_seed in zip(*theirs.values(), strict=False)]  # fmt: skip
            ttft = [run["ttft_s"]["p90"] for run in ours]
            ratios = [
                _ratios(ttft, [run["ttft_s"]["p90"] for run in runs])
                for runs in (*theirs.values(), of(before, **case))
            ]
            rows.append([
                trace, str(replicas), str(gateways), report.spread(ttft, "{:.2f}"),
                *(report.spread(it, "{:.2f}") if it else "-" for it in ratios),
                report.spread(_ratios([run["tokens_per_s"] for run in ours], best), "{:.2f}"),
                report.spread([run["hit"] for run in ours], "{:.2f}"),
            ])  # fmt: skip
    return report.table(header, rows)


def fleets(runs: list[Run]) -> str:
    """TTFT p90, tokens/s and hit rate of each policy, by trace, fleet and load: medians."""
    header = ["trace", "replicas", "gateways", "load", *POLICIES]
    keys = dict.fromkeys((r["trace"], r["replicas"], r["gateways"], r["load"]) for r in runs)
    order = list(TRACES)
    rows = []
    for trace, replicas, gateways, load in sorted(keys, key=lambda k: (order.index(k[0]), *k[1:])):
        cells = []
        for policy in POLICIES:
            mine = of(runs, trace=trace, replicas=replicas, gateways=gateways, load=load,
                      policy=policy)  # fmt: skip
            cells.append(_cell(mine) if mine else "-")
        rows.append([trace, str(replicas), str(gateways), f"×{load:g}", *cells])
    return "TTFT p90 in s, tokens/s, hit rate.\n\n" + report.table(header, rows)


def _cell(runs: list[Run]) -> str:
    ttft, tokens, hit = (
        statistics.median(values)
        for values in zip(
            *((r["ttft_s"]["p90"], r["tokens_per_s"], r["hit"]) for r in runs), strict=True
        )
    )
    return f"{ttft:.2f}, {tokens:.0f}, {hit:.2f}"


def _peaks(runs: list[Run]) -> list[float]:
    by_seed: dict[int, float] = {}
    for run in (it for it in runs if it["load"] in FEW_LOADS):
        by_seed[run["seed"]] = max(by_seed.get(run["seed"], 0.0), run["tokens_per_s"])
    return [by_seed[seed] for seed in sorted(by_seed)]


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / max(b, 1e-9) for a, b in zip(above, below, strict=False)]


def real_time_of(data: dict[str, Any]) -> str:
    """The table of the runs over HTTP, where the file has any."""
    return real_time(data["realtime"]) if "realtime" in data else "Not measured yet."


def real_time(found: dict[str, Any]) -> str:
    """The contenders in turn, and ours over each in the same round."""
    about = (
        f"{found['date']}, {found['replicas']} replicas that act as an H100's engine, "
        f"vllm-router {found['vllm-router']}; requests/s offered: {found['rates']}."
    )
    return f"{about}\n\n{_contenders(found['records'])}"


def engines_of(data: dict[str, Any], where: str = "engines") -> str:
    """The table of the runs with real engines, where the file has any: of :mod:`h200.routing`, on a
    CPU or on a ``gpu``.
    """
    if where not in data:
        return "Not measured yet."
    found = data[where]
    rates = found["requests_per_s of round robin"]
    offered = ", ".join(f"{rate:.1f} ({trace})" for trace, rate in rates.items())
    gpus = ""
    if "gpus" in found:
        many = found.get("gpus_at_once", 1)
        played = f", {many} contenders at a time on as many GPUs" if many > 1 else ""
        gpus = f" on parts of one {found['gpus'][0].split(',')[0]}{played}"
    about = f"{found['replicas']} engines{gpus}, {found['model']}, {found['date']}, vllm-router " \
            f"{found['vllm-router']}; requests/s at ×1: {offered}."  # fmt: skip
    records = [it | {"trace": f"{it['trace']} ×{it['load']:g}"} for it in found["records"]]
    return f"{about}\n\n{_contenders(records)}"


def _contenders(records: list[Run]) -> str:
    header = ["trace", "contender", "TTFT p50, s", "TTFT p90, s", "requests/s", "hit rate",
              "errors", "ours ÷ it: TTFT p90", "requests/s"]  # fmt: skip
    rows = []
    for trace in dict.fromkeys(r["trace"] for r in records):
        over = {(other, what): pairs for other, what, pairs in realtime.ratios(records, trace)}
        for name in dict.fromkeys(r["contender"] for r in records if r["trace"] == trace):
            mine = [r for r in records if r["trace"] == trace and r["contender"] == name]
            rows.append([
                trace,
                name,
                report.spread([r["ttft_s"]["p50"] for r in mine], "{:.2f}"),
                report.spread([r["ttft_s"]["p90"] for r in mine], "{:.2f}"),
                report.spread([r["requests_per_s"] for r in mine], "{:.1f}"),
                report.spread([r["hit"] for r in mine], "{:.2f}"),
                str(sum(r["errors"] for r in mine)),
                report.spread(over.get((name, "TTFT p90"), []), "{:.2f}"),
                report.spread(over.get((name, "requests/s"), []), "{:.2f}"),
            ])  # fmt: skip
    return report.table(header, rows)

"""What docs/tuning.md shows of a result file: a table and a chart for each step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks import charts, report

Result = dict[str, Any]
"""What :func:`benchmarks.h200.tuning.measure` tells of one step."""

Figure = Callable[[dict[str, float]], float | None]
"""A number of one variant under one load in one round; None where there is none."""

BASES = {
    "tune_precision": "bf16", "tune_prefix": "off", "tune_budget": "tokens-8192",
    "tune_ngram": "off", "tune_seqs": "seqs-256", "tune_memory": "gib-34", "tune_offload": "off",
}  # fmt: skip
"""The variant of each step that the others are compared with."""

SECOND = {
    "tune_precision": "median_tpot_ms", "tune_prefix": "median_ttft_ms",
    "tune_budget": "p99_itl_ms", "tune_ngram": "accepted", "tune_seqs": "median_tpot_ms",
    "tune_memory": "median_ttft_ms", "tune_offload": "median_ttft_ms",
}  # fmt: skip
"""What the second chart of each step shows."""

TITLES = {
    "output_throughput": "tokens/s", "median_ttft_ms": "TTFT p50, ms",
    "p99_ttft_ms": "TTFT p99, ms", "median_tpot_ms": "TPOT p50, ms", "p99_itl_ms": "ITL p99, ms",
}  # fmt: skip


def _share(part: str, whole: str) -> Figure:
    return lambda one: one.get(part, 0.0) / one[whole] if one.get(whole) else None


MORE: dict[str, tuple[Figure, str]] = {
    "prompt tokens cached": (_share("prefix_cache_hits", "prefix_cache_queries"), "{:.2f}"),
    "proposed tokens accepted": (
        _share("spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens"), "{:.2f}",
    ),
    "preempted": (lambda one: one.get("num_preemptions", 0.0), "{:.0f}"),
    "failed": (lambda one: one.get("failed", 0.0), "{:.0f}"),
}  # fmt: skip
"""Columns that a table has where some row has other than nothing in it."""


def table(step: str, found: Result) -> str:
    """Each variant under each load, lowest-median-highest of the rounds."""
    rounds, base, live = found["rounds"], BASES[step], _live(found)
    more = {
        title: (figure, form)
        for title, (figure, form) in MORE.items()
        if any(figure(one) for r in rounds for loads in r.values() for one in loads.values())
    }
    rows = []
    for load in found["loads"]:
        for name in live:
            mine = [r[name][load] for r in rounds if name in r]
            cells = [report.spread([one[key] for one in mine if key in one], "{:.0f}")
                     if key == "output_throughput" else
                     report.spread([one[key] for one in mine if key in one], "{:.1f}")
                     for key in TITLES]  # fmt: skip
            ratio = report.spread(ratios(rounds, name, base, load), "{:.2f}")
            extra = [
                report.spread([v for one in mine if (v := figure(one)) is not None], form)
                for figure, form in more.values()
            ]
            rows.append([load, name, cells[0], "" if name == base else ratio, *cells[1:], *extra])
    header = ["load", "variant", "tokens/s", f"÷ {base}", *list(TITLES.values())[1:], *more]
    return f"{_about(found)}\n\n{report.table(header, rows)}"


def _live(found: Result) -> list[str]:
    """The variants that were measured: not all of them in each round, if a run was added."""
    return list(dict.fromkeys(name for one in found["rounds"] for name in one))


def ratios(rounds: list[dict[str, Any]], name: str, base: str, load: str,
           key: str = "output_throughput") -> list[float]:  # fmt: skip
    """A figure over the base's in the same round."""
    return [
        r[name][load][key] / r[base][load][key]
        for r in rounds
        if base in r and r[base][load].get(key) and key in r.get(name, {}).get(load, {})
    ]


def _about(found: Result) -> str:
    """The machine, the date, what was started and what was not, in a paragraph."""
    machine = found["machine"]
    gpus = found.get("gpus") or machine.get("gpus") or ["no GPU"]
    variants = found["variants"].items()
    tokens = [f"`{name}` {one['kv_tokens']:,}" for name, one in variants if "kv_tokens" in one]
    parts = [
        f"{found['date']}, {gpus[0]}, {machine['cores']} cores, vLLM "
        f"{machine['packages']['vllm']}, dummy weights; {len(found['rounds'])} rounds.",
        f"Tokens of KV cache: {', '.join(tokens)}." if tokens else "",
        *(f"`{name}` was left out: {one['left_out']}" for name, one in variants
          if "left_out" in one),
        found.get("note", ""),
    ]  # fmt: skip
    return " ".join(part for part in parts if part)


def chart(step: str, found: Result) -> Any:
    """Tokens/s over the base's, and the step's second figure, by load."""
    plt = charts.plots()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    rounds, base, live = found["rounds"], BASES[step], _live(found)
    charts.bars(left, {
        _lines(load): {name: spread(ratios(rounds, name, base, load)) for name in live}
        for load in found["loads"]
    }, f"output tokens/s ÷ {base}")  # fmt: skip
    left.axhline(1, color="#333333", linewidth=0.8)
    handles, labels = left.get_legend_handles_labels()
    key = SECOND[step]
    if key == "accepted":
        _against_acceptance(right, found, [name for name in live if name != base], base)
    else:
        charts.bars(right, {
            _lines(load): {
                name: spread([r[name][load][key] for r in rounds if name in r]) for name in live
            }
            for load in found["loads"]
        }, TITLES[key])  # fmt: skip
    for axes in (left, right):
        axes.tick_params(labelsize=7.5)
    gpus = found.get("gpus") or ["no GPU"]
    figure.suptitle(f"{gpus[0].split(',')[0]}, 8B shape, dummy weights, {found['date']}", size=8)
    figure.legend(handles, labels, loc="lower center", ncol=len(labels))
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def _lines(load: str) -> str:
    """A load's name, its parts one below the other."""
    return load.replace("-", "\n")


def _against_acceptance(axes: Any, found: Result, others: list[str], base: str) -> None:
    """How much faster, by the share of proposed tokens that were accepted."""
    accepted, _ = MORE["proposed tokens accepted"]
    clients = dict.fromkeys(load["concurrency"] for load in found["loads"].values())
    lines: dict[str, dict[float, charts.Spread]] = {
        f"{name}, c={c}": {} for name in others for c in clients
    }
    for load, about in found["loads"].items():
        for name in others:
            mine = [r[name][load] for r in found["rounds"] if name in r]
            shares = [v for one in mine if (v := accepted(one)) is not None]
            if shares:
                faster = spread(ratios(found["rounds"], name, base, load))
                lines[f"{name}, c={about['concurrency']}"][statistics.median(shares)] = faster
    charts.lines(axes, lines, "share of proposed tokens accepted", f"output tokens/s ÷ {base}")
    axes.axhline(1, color="#333333", linewidth=0.8)
    axes.legend()


def spread(values: list[float]) -> charts.Spread:
    if not values:
        return (0.0, 0.0, 0.0)
    return min(values), statistics.median(values), max(values)

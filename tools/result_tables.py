"""``make tables``: tables of README and docs from benchmarks/results, between their marks.

A mark is ``<!-- from results: NAME, make tables -->`` … ``<!-- end -->``; NAME is one of
:data:`TABLES`. ``make charts`` is the same with ``--charts``: docs/charts from the same files.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import charts, report
from benchmarks.h200 import tuning, tuning_page
from benchmarks.routing import pictures, tables
from serve_app.errors import UserError

REPO = Path(__file__).parents[1]
RESULTS = REPO / "benchmarks/results"
CHARTS = REPO / "docs/charts"
PAGES = [
    REPO / name for name in ("README.md", "docs/benchmarks.md", "docs/routing.md", "docs/tuning.md")
]

NOT_YET = "Not measured yet."
DASH = "\N{EN DASH}"
"""Nothing to say."""

_MARK = re.compile(r"(<!-- from results: ([\w-]+), make tables -->\n).*?(<!-- end -->)", re.S)


def page(text: str) -> str:
    """``text`` with each table written anew."""
    return _MARK.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)


def newest(pattern: str) -> dict[str, Any] | None:
    """The result file of this name with the latest date; None where there is none."""
    found = sorted(RESULTS.glob(pattern))
    return {**json.loads(found[-1].read_text()), "file": found[-1].name} if found else None


def speed() -> str:
    """README's table: tokens/s as a share of bare ``vllm serve``, medians of paired rounds."""
    runs = json.loads((RESULTS / "front-ends-h100.json").read_text())["runs"]
    rows = [
        _on_gpu("one H100, 1B model, four front ends", runs, "front_ends_1b"),
        _on_gpu("one H100, 8B model, four front ends", runs, "front_ends_8b"),
        _on_gpu("two H100s, 8B model, TP 2, four front ends", runs, "front_ends_tp2"),
        *_among_contenders("contenders_1b", "1B model, four front ends"),
        *_among_contenders("contenders_8b", "8B model, four front ends"),
        _on_cpu(),
    ]
    header = ["", "64 clients", "256 clients", "of bare with four front ends, 256 clients"]
    return report.table(header, rows)


def _on_gpu(title: str, runs: list[dict[str, Any]], step: str) -> list[str]:
    # The first run had other arms by these names (its note).
    rounds = [it for run in runs if run["step"] == step and "uni" not in run["note"]
              for it in run["rounds"]]  # fmt: skip

    def over(other: str, load: str) -> str:
        pairs = _ratios(rounds, "ours-4", other, load)
        return f"{statistics.median(pairs):.2f}" if pairs else DASH

    return [title, over("bare-1", "c64"), over("bare-1", "c256"), over("bare-4", "c256")]


def _ratios(rounds: list[dict[str, Any]], arm: str, other: str, load: str) -> list[float]:
    """Tokens/s of an arm over another's, of each round that has both."""
    return [it[arm][load]["tokens_per_s"] / it[other][load]["tokens_per_s"] for it in rounds
            if load in it.get(arm, {}) and load in it.get(other, {})]  # fmt: skip


def _among_contenders(step: str, title: str) -> list[list[str]]:
    """The row of a step of ``make bench-gpu``, where it has been measured."""
    found = newest("bench-gpu*.json")
    if found is None or not found.get(step, {}).get("rounds"):
        return []
    rounds, gpu = found[step]["rounds"], found[step]["gpus"][0].split(",")[0].split()[-1]

    def over(arm: str, other: str, load: str) -> str:
        pairs = _ratios(rounds, arm, other, load)
        return f"{statistics.median(pairs):.2f}" if pairs else DASH

    def beside_others(load: str) -> str:
        theirs = ", ".join(f"{name}: {over(arm, 'bare-1', load)}"
                           for arm, name in _THEIRS.items() if arm in rounds[0])  # fmt: skip
        return f"{over('ours-4', 'bare-1', load)} ({theirs})"

    cells = beside_others("c64"), beside_others("c256"), over("ours-4", "bare-4", "c256")
    return [[f"one {gpu}, {title}, {len(rounds)} rounds", *cells]]


def _on_cpu() -> list[str]:
    found = newest("bench-2*.json")
    assert found is not None
    records = report.by_number(found["records"])

    def over(arm: str) -> str:
        return f"{statistics.median(report.paired(records, arm, 'bare', 64)):.2f}"

    theirs = ", ".join(f"{name}: {over(arm)}" for arm, name in _THEIRS.items()
                       if report.paired(records, arm, "bare", 64))  # fmt: skip
    cores = found["machine"]["cores"]
    title = f"{cores} CPU cores that the engine needs too, tiny model"
    return [title, f"{over('haproxy')} ({theirs})", DASH, DASH]


_THEIRS = {
    "rayllm": "Ray Serve LLM", "rayllm-direct": "Ray Serve LLM's path for one model",
    "vllm-router": "vllm-router", "litellm": "LiteLLM",
}  # fmt: skip


def bench() -> str:
    """The last ``make bench``: the whole page of it."""
    found = newest("bench-2*.json")
    if found is None:
        return NOT_YET
    rounds = max(it["round"] for it in found["records"])
    about = f"{found['date']}, {rounds} rounds ([raw](../benchmarks/results/{found['file']}))."
    shown = f"{about} {report.facts(found['machine'])}\n\n{report.page(found).rstrip()}"
    return shown + _chart("bench", "tokens/s of each contender")


def _chart(name: str, title: str) -> str:
    """The picture of docs/charts, on a page of docs; empty where it has not been drawn."""
    drawn = (CHARTS / f"{name}.svg").is_file()
    return f"\n\n![{title}](charts/{name}.svg)" if drawn else ""


def _contenders(step: str) -> Callable[[], str]:
    """A step of ``make bench-gpu``: tokens/s, and over bare with one front end, by round."""

    def table() -> str:
        found = newest("bench-gpu*.json")
        if found is None or not found.get(step, {}).get("rounds"):
            return NOT_YET
        one = found[step]
        rounds, names = one["rounds"], [name for name in one["rounds"][0] if name != "c1"]
        loads = dict.fromkeys(at for r in rounds for name in names for at in r[name])
        rows = []
        for name in names:
            cells = []
            for at in loads:
                mine = [r[name][at]["tokens_per_s"] for r in rounds if at in r[name]]
                over = _ratios(rounds, name, names[0], at)
                cells += [_spread(mine, "{:.0f}"), _spread(over, "{:.2f}")]
            firsts = [r.get("c1", {}).get(name, {}).get("ttft_ms") for r in rounds]
            ttft = [first[1] for first in firsts if first]
            errors = sum(its["errors"] for r in rounds for its in r[name].values())
            rows.append([name, *cells, _spread(ttft, "{:.1f}"), str(errors)])
        header = ["", *(it for at in loads for it in (f"tokens/s, {at}", f"÷ {names[0]}")),
                  "TTFT p50, c1, ms", "errors"]  # fmt: skip
        absent = "".join(f"\n\nLeft out: {who}: {why}" for who, why in one["left_out"].items())
        about = (
            f"{one['date']}, {report.gpus(one['gpus'])}, {one['machine']['cores']} cores, "
            f"{len(rounds)} round{'s' * (len(rounds) > 1)} "
            f"([raw](../benchmarks/results/{found['file']}), `{step}`). {one.get('note', '')}"
        )
        return f"{about.rstrip()}\n\n{report.table(header, rows)}{absent}"

    return table


def _spread(values: list[float], form: str) -> str:
    return report.spread(values, form) if values else DASH


def ngram_texts() -> str:
    """The share of proposals that real weights accept, by kind of text."""
    found = newest("ngram-texts-*.json")
    if found is None:
        return NOT_YET
    rows = []
    for kind in dict.fromkeys(it["kind"] for it in found["records"]):
        mine = [it for it in found["records"] if it["kind"] == kind]
        shares = [it["accepted"] / it["proposed"] for it in mine if it["proposed"]]
        proposed = [it["proposed"] / it["tokens"] for it in mine]
        steps = [it["tokens"] / (it["tokens"] - it["accepted"]) for it in mine]
        rows.append([kind, report.spread(proposed, "{:.2f}"), report.spread(shares, "{:.2f}"),
                     report.spread(steps, "{:.2f}")])  # fmt: skip
    header = ["answer", "proposed, per token of the answer", "share accepted", "tokens per step"]
    return (
        f"{found['date']}, {found['model']}, temperature 0, {len(mine)} prompts of each kind, "
        f"lowest-median-highest ([raw](../benchmarks/results/{found['file']})).\n\n"
        f"{report.table(header, rows)}"
    )


def _tuned(step: str) -> Callable[[], str]:
    def table() -> str:
        found = newest("tuning-*.json")
        if found is None or "rounds" not in found.get(step, {}):
            return NOT_YET
        shown = tuning_page.table(step, found[step])
        raw = f"[Raw](../benchmarks/results/{found['file']}), `{step}`."
        return f"{shown}\n\n{raw}{_chart(step, step)}"

    return table


def _routing(table: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """One of docs/routing.md: ``routing-DATE.json`` is what ``make bench-routing`` has written."""

    def made() -> str:
        found = newest("routing-2*.json")
        return table(found) if found else NOT_YET

    return made


TABLES: dict[str, Callable[[], str]] = {
    "routing-goals": _routing(lambda found: tables.goals(found["runs"])),
    "routing-several": _routing(tables.several),
    "routing-fleets": _routing(lambda found: tables.fleets(found["runs"])),
    "routing-real-time": _routing(tables.real_time_of),
    "routing-engines": _routing(tables.engines_of),
    "routing-gpu": _routing(lambda found: tables.engines_of(found, "gpu")),
    "speed": speed,
    "bench": bench,
    "ngram_texts": ngram_texts,
    **{step: _contenders(step) for step in ("contenders_1b", "contenders_8b")},
    **{step: _tuned(step) for step in tuning.EXPERIMENTS},
}


def draw() -> list[Path]:
    """All charts of docs/charts that result files have numbers for."""
    written = []
    if found := newest("bench-2*.json"):
        written += charts.save(_bench_chart(found), CHARTS / "bench")
    if found := newest("routing-2*.json"):
        written += pictures.draw(found, CHARTS)
    tuned = newest("tuning-*.json") or {}
    for step in tuning.EXPERIMENTS:
        if "rounds" in tuned.get(step, {}):
            written += charts.save(tuning_page.chart(step, tuned[step]), CHARTS / step)
    return written


def _bench_chart(found: dict[str, Any]) -> Any:
    """Tokens/s of each contender, by concurrency."""
    records = report.by_number(found["records"])
    levels = sorted({c for r in records for c in r["load"]})
    figure, axes = charts.plots().subplots(figsize=(8, 4))
    charts.bars(axes, {
        f"{level} at once": {
            title.replace("`", ""): tuning_page.spread(
                [r["load"][level]["tokens_per_s"] for r in records
                 if r["arm"] == arm and level in r["load"]]
            )
            for arm, title in found["contenders"].items()
        }
        for level in levels
    }, "output tokens/s")  # fmt: skip
    machine = found["machine"]
    axes.set_title(f"{machine['cores']} cores of {machine['cpu']}, tiny model, {found['date']}")
    axes.legend(fontsize=7)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.result_tables", description=__doc__)
    parser.add_argument("--charts", action="store_true", help="draw docs/charts, then the tables")
    options = parser.parse_args()
    try:
        for path in draw() if options.charts else []:
            print(path.relative_to(REPO))
    except UserError as error:
        print(f"result_tables: {error}", file=sys.stderr)
        return 2
    for path in PAGES:
        text = path.read_text()
        if (now := page(text)) != text:
            path.write_text(now)
            print(path.relative_to(REPO))
    return 0


if __name__ == "__main__":
    sys.exit(main())

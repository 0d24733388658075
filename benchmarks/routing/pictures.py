"""The charts of a result file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.routing.policies import POLICIES
from benchmarks.routing.simulation import MAIN
from benchmarks.routing.tables import of
from benchmarks.routing.traces import TRACES


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """TTFT and throughput of the main fleet by load, a column for each trace.

    Raises:
        UserError: matplotlib is not installed.
    """
    plots = charts.plots()
    runs = of(data["runs"], replicas=MAIN[0], gateways=MAIN[1])
    names = [name for name in TRACES if of(runs, trace=name)]
    figure, axes = plots.subplots(2, len(names), figsize=(3.1 * len(names), 5.2), squeeze=False)
    for column, trace in enumerate(names):
        for row, what in enumerate(("TTFT p90, s", "tokens/s")):
            lines: dict[str, dict[float, charts.Spread]] = {}
            for policy in POLICIES:
                mine = of(runs, trace=trace, policy=policy)
                for load in sorted({run["load"] for run in mine}):
                    values = sorted(_of(run, row) for run in of(mine, load=load))
                    spread = values[0], values[len(values) // 2], values[-1]
                    lines.setdefault(policy, {})[load] = spread
            load_of = "load ÷ round robin's most"
            charts.lines(axes[row][column], lines, load_of, what, log_y=row == 0)
        axes[0][column].set_title(trace)
        axes[1][column].set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=len(labels), bbox_to_anchor=(0.5, -0.06)
    )
    figure.suptitle(f"{MAIN[0]} replicas, {MAIN[1]} gateway, simulated (8B on H100)", fontsize=11)
    figure.tight_layout()
    return charts.save(figure, folder / "routing")


def _of(run: dict[str, Any], row: int) -> float:
    return float(run["ttft_s"]["p90"] if row == 0 else run["tokens_per_s"])

"""Charts of benchmarks: one look for all, and each as PNG and as SVG.

matplotlib is not in the environment of ``make venv``; ``make bench`` and ``make charts`` install it
(requirements/bench.txt).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve_app.errors import UserError

Spread = tuple[float, float, float]
"""Lowest, median and highest."""

COLOURS = ("#1f6fb4", "#d1663f", "#3b9463", "#8a5fb0", "#b8912f", "#5b6b7a", "#b84b6f", "#2f9c9c")

_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
    # So that the same numbers give the same bytes.
    "svg.hashsalt": "serve_app",
}


def plots() -> Any:
    """``matplotlib.pyplot`` in the project's style, without a display.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "charts need matplotlib, which is not installed here; run make charts, or "
            "pip install -r requirements/bench.txt"
        ) from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams.update({**_STYLE, "axes.prop_cycle": cycler(color=COLOURS)})
    return plt


def save(figure: Any, path: Path) -> list[Path]:
    """Write ``path`` with ``.png`` and with ``.svg``, and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    figure.savefig(written[0], metadata={"Software": None})
    figure.savefig(written[1], metadata={"Date": None})
    plots().close(figure)
    return written


def bars(axes: Any, values: Mapping[str, Mapping[str, Spread]], unit: str) -> None:
    """Groups of bars: a group for each first key, a bar with its spread for each second one."""
    series = list(dict.fromkeys(name for group in values.values() for name in group))
    width = 0.8 / len(series)
    for number, name in enumerate(series):
        found = [(at, group[name]) for at, group in enumerate(values.values()) if name in group]
        places = [at + (number - (len(series) - 1) / 2) * width for at, _ in found]
        axes.bar(places, [it[1] for _, it in found], width * 0.94, yerr=_errors(found),
                 label=name, error_kw={"linewidth": 0.8, "ecolor": "#333333"})  # fmt: skip
    axes.set_xticks(range(len(values)), list(values))
    axes.set_ylabel(unit)
    axes.grid(axis="x", visible=False)


def lines(
    axes: Any, values: Mapping[str, Mapping[float, Spread]], x: str, y: str, *,
    log_x: bool = False, log_y: bool = False,
) -> None:  # fmt: skip
    """A line for each first key through the medians, the spread as a bar at each point."""
    drawn = {"marker": "o", "markersize": 3.5, "linewidth": 1.4, "elinewidth": 0.8}
    for name, points in values.items():
        found = sorted(points.items())
        medians = [it[1] for _, it in found]
        axes.errorbar([at for at, _ in found], medians, yerr=_errors(found), label=name, **drawn)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({at for points in values.values() for at in points})
        axes.set_xticks(ticks, [f"{at:g}" for at in ticks])
        axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")


def _errors(found: Sequence[tuple[float, Spread]]) -> list[list[float]]:
    return [[it[1] - it[0] for _, it in found], [it[2] - it[1] for _, it in found]]

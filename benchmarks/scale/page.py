"""Tables and charts of docs/scale.md, from the newest result: ``python -m benchmarks.scale.page``.

A table stands between ``<!-- from results: NAME, make bench-scale -->`` and ``<!-- end -->``.
``--charts`` draws docs/charts/scale too, for which matplotlib must be installed.
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
from benchmarks.scale import model
from serve_app.errors import UserError

REPO = Path(__file__).parents[2]
PAGE = REPO / "docs" / "scale.md"
CHART = REPO / "docs" / "charts" / "scale"

_MARK = re.compile(r"(<!-- from results: ([\w-]+), make bench-scale -->\n).*?(<!-- end -->)", re.S)

_PARTS = {
    "all_reports_ms": "a report of each replica is taken",
    "refresh_ms": "Serve's report is read",
    "fleet_ms": "`GET /fleet` is made",
    "models_ms": "`GET /v1/models` is made",
    "unknown_model_ms": "a request for a model that is not there is refused",
    "choose_ms": "a replica is chosen",
    "metrics_ms": "`GET /metrics` is put together, with 500 series of each replica",
    "limits_8_ms": "the limits' actor answers one of 8 gateways, 1,000 keys",
    "limits_32_ms": "one of 32",
}


def newest() -> dict[str, Any]:
    """The newest result.

    Raises:
        UserError: there is none.
    """
    found = sorted((REPO / "benchmarks" / "results").glob("scale-*.json"))
    if not found:
        raise UserError(
            "there is no result of make bench-scale in benchmarks/results; run it first"
        )
    data: dict[str, Any] = json.loads(found[-1].read_text())
    return {**data, "file": found[-1].name}


def about(data: dict[str, Any]) -> str:
    raw = f"[all numbers](../benchmarks/results/{data['file']})"
    return f"{data['date']}, {raw}. {report.facts(data['machine'])}"


def gateways(data: dict[str, Any]) -> str:
    """:mod:`benchmarks.scale.model` for some fleets."""
    return model.table(
        [
            model.Fleet(100, models=3, replicas=4),
            model.Fleet(1000, models=20, replicas=100),
            model.Fleet(10_000, tokens_per_s=10, models=20, replicas=100),
            model.Fleet(10_000, models=20, replicas=100),
            model.Fleet(10_000, models=20, replicas=100, everything_on=True),
            model.Fleet(10_000, models=200, replicas=1000),
        ]
    )


def parts(data: dict[str, Any]) -> str:
    """What each part costs at each size, and what it did before."""
    now = [it for it in data["parts"] if it["tree"] == "now"]
    before = [it for it in data["parts"] if it["tree"] == "before"]
    sizes = _sizes(now)
    rows = []
    for key, title in _PARTS.items():
        cells = [report.spread([it[key] for it in now if _size(it) == size], "{:.3g}")
                 for size in sizes]  # fmt: skip
        old = [it[key] for it in before if _size(it) == sizes[-1] and key in it]
        rows.append([title, *cells, report.spread(old, "{:.3g}")])
    header = ["CPU ms, models / replicas", *map(_shown, sizes), f"before, {_shown(sizes[-1])}"]
    return report.table(header, rows)


def requests(data: dict[str, Any]) -> str:
    """Gateways under load, by the size of the fleet."""
    rows = []
    for tree in ("before", "now"):
        mine = [it for it in data["streams"] if it["tree"] == tree]
        for size in _sizes(mine):
            of = [it for it in mine if _size(it) == size]
            errors = sum(it["errors"] for it in of)
            rows.append(
                [
                    f"{_shown(size)}{_before(of[0])}",
                    _spread(of, "idle_cores", 1, "{:.3f}"),
                    _spread(of, "request_cpu_us", 1, "{:.0f}"),
                    _spread(of, "alone_p50_us", 1e-3, "{:.2f}"),
                    _spread(of, "rate_p50_us", 1e-3, "{:.2f}"),
                    _spread(of, "rate_p99_us", 1e-3, "{:.1f}"),
                    _spread(of, "rate_max_us", 1e-3, "{:.1f}"),
                    f"{statistics.median(it['memory_mib'] for it in of):.0f}",
                    str(errors),
                ]
            )
    header = ["models / replicas", "cores, idle", "CPU µs per request", "ms, p50, c=1",
              "200 requests/s: p50", "p99", "max", "MiB", "errors"]  # fmt: skip
    return report.table(header, rows)


def streams(data: dict[str, Any]) -> str:
    """Open streams."""
    rows = [
        [
            f"{it['streams']:,}{_before(it)} (open at the end: {it['streams_at_the_end']:,})",
            str(it["gateways"]),
            ", ".join(f"{cores:.2f}" for cores in it["cores"]),
            ", ".join(f"{mib:.0f}" for mib in it["memory_mib"]),
            f"{it['kib_per_stream']:.0f}",
            f"{max(it['open_files']):,}",
            f"{it['rate_p50_us'] / 1e3:.1f}, {it['rate_p99_us'] / 1e3:.0f}",
            str(it["errors"]),
        ]
        for it in data["open"]
    ]
    header = ["streams open", "gateways", "cores of each", "MiB of each", "KiB per stream",
              "open files of one", "200 requests/s beside: ms p50, p99", "errors"]  # fmt: skip
    return report.table(header, rows)


def serve(data: dict[str, Any]) -> str:
    """Serve's own parts."""
    rows = []
    for it in sorted(data["serve"], key=lambda it: (it["replicas"], it["gateways"])):
        cores = it["idle_cores"]
        rows.append(
            [
                f"{_shown(_size(it))}, {it['gateways']}{_before(it)}",
                f"{it['started_s']:.0f}",
                f"{it['loop_ms']['mean']:.0f}, {it['loop_ms']['max']:.0f}",
                "-".join(f"{ms:.0f}" for ms in it["report_ms"]),
                f"{it['report_bytes'] / 1024:.0f}",
                f"{cores['controller']:.2f}",
                f"{cores['gateways'] / it['gateways']:.2f}",
                f"{cores['haproxy_manager'] + cores['haproxy']:.3f}",
                f"{cores['gcs'] + cores['raylet']:.3f}",
                f"{it['memory_mib']['controller']:.0f}",
                f"{it['replica_known_s']:.1f}",
                ", ".join(str(n) if n is not None else "-" for n in it["proxies_started"]),
            ]
        )
    header = [
        "models / replicas, gateways", "s until all runs", "turn of Serve's loop, ms: mean, max",
        "report, ms", "KiB", "cores, idle: controller", "each gateway", "HAProxy and its manager",
        "GCS and raylet", "controller's MiB", "a new replica is known after s",
        "HAProxys started for a replica of a model, for a gateway",
    ]  # fmt: skip
    return report.table(header, rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "scale-about": about,
    "scale-gateways": gateways,
    "scale-parts": parts,
    "scale-requests": requests,
    "scale-streams": streams,
    "scale-serve": serve,
}


def page(text: str, data: dict[str, Any]) -> str:
    """``text`` with each table written anew."""
    return _MARK.sub(lambda m: f"{m[1]}{TABLES[m[2]](data)}\n{m[3]}", text)


def draw(data: dict[str, Any]) -> Any:
    """Latency by size, before and now; and what Serve's controller and a gateway use idle."""
    figure, (left, right) = charts.plots().subplots(1, 2, figsize=(9, 3.4))
    lines = {
        title: {
            float(size[0]): _three([it["rate_p99_us"] / 1e3 for it in mine if _size(it) == size])
            for size in _sizes(mine)
        }
        for tree, title in (("before", "before"), ("now", "now"))
        if (mine := [it for it in data["streams"] if it["tree"] == tree])
    }
    charts.lines(left, lines, "replicas", "ms", log_x=True, log_y=True)
    left.set_title("p99 at 200 requests/s through one gateway")
    left.legend()
    one = [it for it in data["serve"] if it["gateways"] == 1]
    of: dict[str, dict[float, charts.Spread]] = {}
    for name, title in (("controller", "Serve's controller"), ("gateways", "a gateway")):
        of[title] = {float(it["replicas"]): _three([it["idle_cores"][name]]) for it in one}
    charts.lines(right, of, "replicas", "cores", log_x=True)
    right.set_title("used by a fleet without a request")
    right.legend()
    figure.tight_layout()
    return figure


def _size(record: dict[str, Any]) -> tuple[int, int]:
    return record["replicas"], record["models"]


def _sizes(records: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return sorted({_size(it) for it in records})


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]:,} / {size[0]:,}"


def _before(record: dict[str, Any]) -> str:
    return ", before" if record.get("tree") == "before" else ""


def _spread(records: list[dict[str, Any]], key: str, by: float, form: str) -> str:
    return report.spread([it[key] * by for it in records], form)


def _three(values: list[float]) -> charts.Spread:
    return min(values), statistics.median(values), max(values)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.page", description=__doc__)
    parser.add_argument("--charts", action="store_true")
    options = parser.parse_args()
    try:
        data = newest()
        PAGE.write_text(page(PAGE.read_text(), data))
        for path in charts.save(draw(data), CHART) if options.charts else []:
            print(path.relative_to(REPO))
    except UserError as error:
        print(f"bench-scale: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

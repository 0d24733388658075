"""``make bench-routing``: the choice of a replica, simulated and over HTTP, beside others'.

python -m benchmarks.routing simulate [--quick]   # goes on where an earlier call has stopped
python -m benchmarks.routing realtime
python -m benchmarks.routing engines              # four real ones on this CPU, by each policy
python -m benchmarks.routing report               # table and charts of a result file
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.h200 import routing as engines
from benchmarks.routing import pictures, realtime, simulation, tables
from serve_app.errors import UserError

RESULTS = Path(__file__).parents[1] / "results"
MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("simulate", "realtime", "engines", "report"))
    parser.add_argument("--quick", action="store_true", help="fewer fleets and loads")
    parser.add_argument("--budget-s", type=float, default=1e9, help="begin nothing after it")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", default="1,2,3", help="of the runs in real time")
    parser.add_argument("--traces", default=";".join(realtime.TRACES), help="of these, by ;")
    parser.add_argument("--only", help="contenders, by commas; default: all")
    parser.add_argument("--port", type=int, default=18900, help="the first of ten")
    parser.add_argument("--charts", type=Path, default=Path("docs/charts"))
    parser.add_argument(
        "--results", type=Path, help="default: benchmarks/results/routing-DATE.json"
    )
    options = parser.parse_args()
    path = options.results or RESULTS / f"routing-{datetime.date.today()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if options.what == "simulate":
            _note(path)
            whole = simulation.play_all(
                path, options.budget_s, quick=options.quick, processes=options.processes
            )
            print(f"{path} {'is complete' if whole else 'is not complete: run it again'}")
        elif options.what == "realtime":
            _realtime(path, options)
        elif options.what == "engines":
            _engines(path, options)
        else:
            data = json.loads(path.read_text())
            text = tables.markdown(data, path.name)
            path.with_suffix(".md").write_text(text)
            print(text)
            for written in pictures.draw(data, options.charts):
                print(f"written: {written}")
    except UserError as error:
        print(f"bench-routing: {error}", file=sys.stderr)
        return 2
    return 0


def _note(path: Path) -> None:
    """Where and when: of the first call."""
    data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    about = {"date": str(datetime.date.today()), "machine": report.machine()}
    path.write_text(json.dumps(about | data, indent=1) + "\n")


def _realtime(path: Path, options: argparse.Namespace) -> None:
    _note(path)
    rounds = [int(number) for number in options.rounds.split(",")]
    with tempfile.TemporaryDirectory() as work:
        found = realtime.measure(
            options.port, rounds, Path(work), options.traces.split(";"),
            options.only.split(",") if options.only else realtime.CONTENDERS,
        )  # fmt: skip
    data = json.loads(path.read_text())
    before = data.get("realtime", {}).get("records", [])
    today = {"date": str(datetime.date.today())}
    data["realtime"] = found | today | {"records": before + found["records"]}
    path.write_text(json.dumps(data, indent=1) + "\n")


def _engines(path: Path, options: argparse.Namespace) -> None:
    """Contenders that the result file has already are measured again, at the same load."""
    if not MODEL.is_dir():
        raise UserError("the demo's model is not here; run: serve-app fetch demo")
    _note(path)
    names = options.only.split(",") if options.only else engines.CONTENDERS
    before = json.loads(path.read_text()).get("engines", {})
    if engines.ROUND_ROBIN not in names and not before:
        raise UserError(
            f"--only leaves out round_robin, and {path} does not have it: what it completes "
            "decides what all are offered; add it"
        )
    with tempfile.TemporaryDirectory() as work:
        found = engines.measure(
            engines.CPU, MODEL, Path(work), options.port, time.monotonic() + options.budget_s,
            names, before.get("requests_per_s of round robin"),
        )  # fmt: skip
    kept = [it for it in before.get("records", []) if it["contender"] not in names]
    data = json.loads(path.read_text())
    data["engines"] = found | {"date": str(datetime.date.today()), "model": MODEL.name,
                               "records": kept + found["records"]}  # fmt: skip
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

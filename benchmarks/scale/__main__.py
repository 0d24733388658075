"""``make bench-scale``: how far one cluster goes, in one result file.

Three parts, each a process of its own: what the parts of a gateway cost (``parts``), gateways under
load (``streams``), a real Serve whose replicas are played (``serve``). With ``--before TREE`` the
first two run in that tree too, in turn. ``--add`` replaces the parts that ran in the file of today.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import report

TREE = Path(__file__).parents[2]


def main() -> int:
    options = _options()
    path = options.results / f"scale-{datetime.date.today()}.json"
    data: dict[str, Any] = json.loads(path.read_text()) if options.add and path.exists() else {}
    trees = {"now": TREE} | ({"before": options.before} if options.before else {})
    wanted = options.only.split(",")
    if "parts" in wanted:
        data["parts"] = [
            {"tree": name, "round": number, **record}
            for number in range(1, options.rounds + 1)
            for name, tree in trees.items()
            for record in _run("parts", tree, [])
        ]
    if "streams" in wanted:
        more = _streams(trees, options.rounds, options.sizes)
        again = {(it["tree"], _size(it)) for it in more}
        kept = [it for it in data.get("streams", []) if (it["tree"], _size(it)) not in again]
        data["streams"] = kept + more
    if "open" in wanted:
        data["open"] = _run("streams", TREE, ["--rounds", 0, "--streams", options.open])
    if "serve" in wanted:
        sizes = ["--sizes", options.serve] if options.serve else []
        found = _run("serve", TREE, [*sizes, "--budget-s", options.budget_s])
        ran = {_size(it) for it in found}
        data["serve"] = [it for it in data.get("serve", []) if _size(it) not in ran] + found
    data["machine"], data["date"] = report.machine(), str(datetime.date.today())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(f"written: {path}")
    return 0


def _streams(trees: dict[str, Path], rounds: int, sizes: str) -> list[dict[str, Any]]:
    found = []
    for number in range(1, rounds + 1):
        for name, tree in trees.items():
            given = ["--rounds", 1, "--streams", "", "--sizes", sizes]
            for record in _run("streams", tree, given):
                found.append({**record, "tree": name, "round": number})
    return found


def _size(record: dict[str, Any]) -> tuple[int, ...]:
    return record["replicas"], record["models"], record.get("gateways", 1)


def _run(part: str, tree: Path, args: list[Any]) -> list[dict[str, Any]]:
    """The records that a part prints, shown as they come."""
    command = [sys.executable, "-m", f"benchmarks.scale.{part}", *map(str, args)]
    path = os.pathsep.join(str(it) for it in (tree, tree / "tests"))
    found = []
    with subprocess.Popen(
        command, cwd=tree, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout
        for line in running.stdout:
            if line.startswith("{"):
                print(line, end="", flush=True)
                found.append(json.loads(line))
    if running.returncode:
        raise SystemExit(f"bench-scale: {part} ended with {running.returncode}; see above")
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="another tree, with this benchmark in it")
    parser.add_argument("--only", default="parts,streams,open,serve")
    parser.add_argument("--add", action="store_true", help="to the file of today")
    parser.add_argument("--sizes", default="4:2,100:10,400:50,1000:200", help="of streams")
    parser.add_argument("--open", default="2:2000,2:5000,2:10000", help="gateways:streams")
    parser.add_argument("--serve", help="replicas:models:gateways, …")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="of serve")
    parser.add_argument("--results", type=Path, default=TREE / "benchmarks" / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

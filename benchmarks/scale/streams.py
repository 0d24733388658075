"""Gateways under load with few replicas and with many: ``python -m benchmarks.scale.streams``.

Real gateway processes without Ray, in front of scripted replicas; clients in C. Prints one line of
JSON for each measurement. Each round has a fleet of each size in turn, in processes of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.gateway.arms import Arm, load
from benchmarks.scale.fleet import Fleet

SIZES = "4:2,100:10,400:50,1000:200"

_PROMPT = "Tell a short story of a fox and a hare who meet at a river. " * 8
_SHORT = {
    "model": "model-0",
    "user": "instant",
    "max_tokens": 16,
    "messages": [{"role": "user", "content": _PROMPT}],
}
_HELD = {**_SHORT, "user": "slow", "stream": True, "max_tokens": 1000}

_IDLE_S = 6.0
_RATE, _RATE_S = 200, 6
"""Requests per second of the open loop, and for how long."""

_NEAR = 10
"""Ports of the first model's replicas, and a few more."""

_EACH = 1000
"""Streams of one client process, all of one model."""


class Bench:
    """Scripted replicas and the gateways in front of them, on ports from ``port`` on."""

    def __init__(self, work: Path, port: int) -> None:
        self._work, self._port = work, port
        self._client = processes.wire(work)
        self.first = port + 100

    @contextlib.contextmanager
    def replicas(self, number: int) -> Iterator[None]:
        """So many. Those of the first model are in a process of their own: what a thousand replicas
        have to do shall not delay the answers that are measured."""
        with (
            self._module("upstream", [self.first, _NEAR]),
            self._module("upstream", [self.first + _NEAR, number - _NEAR]),
        ):
            yield

    @contextlib.contextmanager
    def gateways(self, fleet: Fleet, number: int) -> Iterator[list[Arm]]:
        """So many gateways that know of all replicas, and have heard of each."""
        config = self._work / "gateway.json"
        config.write_text("{}")
        with contextlib.ExitStack() as running:
            arms = []
            for n in range(number):
                given = [self._port + n, self.first, config, fleet.replicas, fleet.models]
                pid = running.enter_context(self._module("server", given))
                arms.append(Arm(f"gateway {n}", self._port + n, pid))
            everywhere = [fleet.replicas] * number
            processes.until(lambda: [_known(it.port) for it in arms] == everywhere, 30 * number)
            yield arms

    def ask(self, arm: Arm, connections: int, requests: int, rate: float = 0.0) -> dict[str, Any]:
        with load(self._client, arm, connections, requests, _SHORT, 0, rate) as client:
            said, _ = client.communicate()
        found: dict[str, Any] = json.loads(said)
        return found

    @contextlib.contextmanager
    def held(self, arms: list[Arm], streams: int, fleet: Fleet) -> Iterator[int]:
        """So many streams open, each with its first tokens; how many there are."""
        with contextlib.ExitStack() as clients:
            for n in range(0, streams, _EACH):
                part = min(_EACH, streams - n)
                arm = arms[n // _EACH % len(arms)]
                # Not the first two models, of which _NEAR answers and _streams does not tell.
                body = {**_HELD, "model": f"model-{2 + n // _EACH % (fleet.models - 2)}"}
                clients.enter_context(load(self._client, arm, part, part, body, 1002))
            with contextlib.suppress(TimeoutError):
                processes.until(lambda: self._streams() == streams, 60)
            yield self._streams()

    def _streams(self) -> int:
        url = f"http://127.0.0.1:{self.first + _NEAR}/streams"
        with urllib.request.urlopen(url, timeout=30) as said:
            return int(said.read())

    def _module(self, name: str, args: list[Any]) -> contextlib.AbstractContextManager[int]:
        log = (self._work / f"{name}.log").open("wb")
        command = [sys.executable, "-m", f"benchmarks.gateway.{name}", *args]
        return processes.process(command, {}, log)


def _known(port: int) -> int:
    """Replicas that the gateway has heard of; 0 while it starts."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/fleet", timeout=30) as said:
            models = json.load(said)["models"].values()
    except OSError:
        return 0
    return sum(bool(replica["load"]) for it in models for replica in it["replicas"])


def latency(bench: Bench, fleet: Fleet) -> dict[str, Any]:
    """One gateway: what it uses while it idles, and how long requests take."""
    with bench.gateways(fleet, 1) as [arm]:
        bench.ask(arm, 8, 200)
        time.sleep(4)  # the replicas idle, and are known to
        idle = _cores(arm, _IDLE_S)
        alone = bench.ask(arm, 1, 1500)
        due = bench.ask(arm, 64, _RATE * _RATE_S, _RATE)
        before = arm.cpu_s()
        busy = bench.ask(arm, 64, 4000)
        used = arm.cpu_s() - before
        pages = {path: _timed(arm.port, path) for path in ("/v1/models", "/ready", "/fleet")}
        pages["/metrics"] = _timed(arm.port, "/metrics")
        assert arm.pid
        return {
            "replicas": fleet.replicas,
            "models": fleet.models,
            "idle_cores": idle,
            "alone_p50_us": alone["p50_us"],
            "alone_p99_us": alone["p99_us"],
            "rate": _RATE,
            "rate_p50_us": due["p50_us"],
            "rate_p99_us": due["p99_us"],
            "rate_max_us": due["max_us"],
            "request_cpu_us": used / busy["answers"] * 1e6,
            "pages_ms": pages,
            "memory_mib": processes.memory_mib(arm.pid),
            "errors": alone["errors"] + due["errors"] + busy["errors"],
        }


def open_streams(bench: Bench, fleet: Fleet, gateways: int, streams: int) -> dict[str, Any]:
    """So many streams over so many gateways, a token every 5 s each."""
    with bench.gateways(fleet, gateways) as arms:
        for arm in arms:
            bench.ask(arm, 8, 200)
        before = [processes.memory_mib(arm.pid) for arm in arms if arm.pid]
        with bench.held(arms, streams, fleet) as opened:
            time.sleep(3)
            cores = [_cores(arm, _IDLE_S / len(arms)) for arm in arms]
            held = [processes.memory_mib(arm.pid) for arm in arms if arm.pid]
            due = bench.ask(arms[0], 64, _RATE * _RATE_S, _RATE)
            files = [sum(it.num_fds() for it in processes.tree(arm.pid or 0)) for arm in arms]
            still = bench._streams()
        return {
            "replicas": fleet.replicas,
            "models": fleet.models,
            "gateways": gateways,
            "streams": opened,
            "streams_at_the_end": still,
            "cores": cores,
            "memory_mib": held,
            "kib_per_stream": (sum(held) - sum(before)) * 1024 / max(1, opened),
            "open_files": files,
            "rate_p50_us": due["p50_us"],
            "rate_p99_us": due["p99_us"],
            "rate_max_us": due["max_us"],
            "errors": due["errors"],
        }


def _cores(arm: Arm, seconds: float) -> float:
    assert arm.pid
    before, began = processes.cpu_ns(arm.pid), time.monotonic()
    time.sleep(seconds)
    return (processes.cpu_ns(arm.pid) - before) / 1e9 / (time.monotonic() - began)


def _timed(port: int, path: str) -> dict[str, float]:
    asked = time.perf_counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as said:
        size = len(said.read())
    return {"ms": (time.perf_counter() - asked) * 1e3, "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", default="2:2000,2:5000,2:10000", help="gateways:streams")
    parser.add_argument("--port", type=int, default=19900)
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split(":"))) for size in options.sizes.split(",")]
    fleets = [Fleet(models, replicas, options.port + 100) for replicas, models in sizes]
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work), options.port)
        with bench.replicas(max(it.replicas for it in fleets)):
            for number in range(1, options.rounds + 1):
                for fleet in fleets:
                    found = {"round": number, **latency(bench, fleet)}
                    print(json.dumps(found), flush=True)
            for pair in filter(None, options.streams.split(",")):
                gateways, streams = map(int, pair.split(":"))
                print(json.dumps(open_streams(bench, fleets[-1], gateways, streams)), flush=True)


if __name__ == "__main__":
    main()

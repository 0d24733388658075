"""The same traces over HTTP: real gateways in front of replicas that act as engines do.

Four replicas of :mod:`benchmarks.routing.replicas` stand behind this gateway, by each of its
policies, and behind vllm-router; one contender at a time, in turn, in rounds. Each begins with
empty caches: the replicas are started anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import others, processes
from benchmarks.gateway.arms import TREE
from benchmarks.routing import client, traces
from serve_app.errors import UserError

REPLICAS = 4

TRACES = {
    trace.name: (trace, rate)
    for trace, rate in ((traces.QUARTER, 13.5), (traces.TRACES["multi-turn"], 55.0))
}
"""With requests/s offered: what round robin can at most in the simulator, with such replicas."""

WARM_S, MEASURED_S = 12.0, 25.0

TWO = " by two gateways"
OURS = ("cache_aware", f"cache_aware{TWO}", "least_loaded", "round_robin")
THEIRS = ("vllm-router cache_aware", "vllm-router round_robin")
CONTENDERS = (*OURS, *THEIRS)


def measure(
    port: int, rounds: Iterable[int], work: Path, names: Sequence[str], contenders: Sequence[str]
) -> dict[str, Any]:
    """Contenders in turn, in these rounds, on these traces."""
    if not (others.BIN / "vllm-router").exists():
        contenders = [name for name in contenders if name not in THEIRS]
    records = []
    for number in rounds:
        for trace in names:
            for name in contenders:
                found = _one(port, name, trace, number, work)
                records.append({"trace": trace, "contender": name, "round": number, **found})
                print(json.dumps(records[-1]), flush=True)
    return {
        "replicas": REPLICAS,
        "rates": {name: rate for name, (_, rate) in TRACES.items()},
        "warm_s": WARM_S,
        "measured_s": MEASURED_S,
        "vllm-router": others.version("vllm-router"),
        "records": records,
    }


def _one(port: int, name: str, trace: str, seed: int, work: Path) -> dict[str, Any]:
    end = WARM_S + MEASURED_S
    shape, rate = TRACES[trace]
    sessions = shape.at(rate, end, seed)
    with contextlib.ExitStack() as running:
        log = running.enter_context((work / f"{name}.log").open("wb"))
        path = {"PYTHONPATH": os.pathsep.join(str(it) for it in (TREE, TREE / "tests"))}
        module = [sys.executable, "-m"]
        replicas = [*module, "benchmarks.routing.replicas", port + 2, REPLICAS]
        running.enter_context(processes.process(replicas, path, log))
        for at in range(REPLICAS):
            _up(port + 2 + at)
        ports = [port, port + 2 + REPLICAS] if name.endswith(TWO) else [port]
        for at in ports:
            command = _command(name.removesuffix(TWO), at, port + 2, work)
            running.enter_context(processes.process(command, path, log))
        for at in ports:
            _up(at)
        answered = uvloop.run(client.play([f"http://127.0.0.1:{at}" for at in ports], sessions))
    return client.measured(answered, WARM_S, end)


def _command(name: str, port: int, first: int, work: Path) -> list[Any]:
    """The command of a gateway at this port; ``first`` is the first replica's."""
    if name in OURS:
        config = work / f"{name}.json"
        config.write_text(json.dumps({"routing": {"policy": name}}))
        module = [sys.executable, "-m", "benchmarks.gateway.server"]
        return [*module, port, first, config, REPLICAS, 1]
    return vllm_router(name.split()[1], port, range(first, first + REPLICAS))


def vllm_router(policy: str, port: int, workers: range | list[int]) -> list[Any]:
    """Its command; with the defaults of its own launcher, but for retries, which hide errors."""
    return [
        others.BIN / "vllm-router", "--host", "127.0.0.1", "--port", port, "--log-level", "error",
        "--policy", policy, "--prometheus-port", port + 1, "--disable-retries",
        "--worker-urls", *(f"http://127.0.0.1:{at}" for at in workers),
    ]  # fmt: skip


def _up(port: int, within_s: float = 90.0) -> None:
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10).close()
            return
        if time.monotonic() > deadline:
            raise UserError(f"nothing answers at port {port} after {within_s:g} s")
        time.sleep(0.2)


def ratios(records: list[dict[str, Any]], trace: str) -> Iterator[tuple[str, str, list[float]]]:
    """Ours over each other contender, of the same round: TTFT p90 and requests/s."""
    mine = {r["round"]: r for r in records if r["trace"] == trace and r["contender"] == OURS[0]}
    for other in dict.fromkeys(r["contender"] for r in records if r["contender"] != OURS[0]):
        theirs = [r for r in records if r["trace"] == trace and r["contender"] == other]
        pairs = [(mine[r["round"]], r) for r in theirs if r["round"] in mine]
        ttft = [m["ttft_s"]["p90"] / max(1e-9, r["ttft_s"]["p90"]) for m, r in pairs]
        yield other, "TTFT p90", ttft
        yield other, "requests/s", [m["requests_per_s"] / r["requests_per_s"] for m, r in pairs]

"""What the parts of a gateway cost with a fleet of a size: ``python -m benchmarks.scale.parts``.

CPU of this process alone, no sockets: each part is the gateway's own object, fed with what Serve
and replicas would tell it. Prints one line of JSON for each size, milliseconds; ``--sizes`` as in
``4:2,1000:200`` (replicas, models). With another tree first on PYTHONPATH it measures that one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import pickle
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from unittest import mock

from benchmarks.scale.fleet import Fleet
from serve_app.cluster import limits_actor
from serve_app.cluster.exchange import Load
from serve_app.gateway import api, models
from serve_app.gateway.directory import Directory
from serve_app.gateway.errors import GatewayError
from serve_app.gateway.exposition import _page
from serve_app.gateway.fleet import Fleets
from serve_app.gateway.policy import FewestRequests
from serve_app.gateway.replicas import Board, Waiting

SIZES = "4:2,100:10,400:50,1000:200"

_BUSY = Load(running=12, waiting=0, capacity=64, kv_cache_usage=0.3)

_LEAST_S = 0.3
"""Seconds for which each part is repeated, at least three times."""


class _Watcher:
    """Serve's pushes are another part."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def watch(self, application: str) -> None:
        pass

    def forget(self, application: str) -> None:
        self._board.forget(application)

    def ids(self, application: str) -> None:
        pass


async def measure(fleet: Fleet) -> dict[str, float]:
    """Milliseconds of CPU by part; ``report_bytes`` are Serve's."""
    board = Board()
    told = pickle.dumps(fleet.report())

    async def report() -> dict[str, Any]:
        found: dict[str, Any] = pickle.loads(told)
        return found

    directory = Directory(_Watcher(board))  # type: ignore[arg-type]
    for name in fleet.names:
        board.publish(name, fleet.places(name), 8192, _about(name))
    ids = [it.replica.id for _, it in board.all()]
    waiting = Waiting(0, 0.0)
    fleets = Fleets(directory, board, None, None, lambda model: waiting)
    some = fleet.names[len(fleet.names) // 2]
    policy: Any = FewestRequests()

    def all_report() -> None:
        for id in ids:
            board.report(id, _BUSY)

    with mock.patch("serve_app.cluster.serve.report_async", report):
        await directory.refresh()
        return {
            "report_bytes": len(told),
            "unpickle_ms": await _ms(report),
            "refresh_ms": await _ms(directory.refresh),
            "all_reports_ms": await _ms(all_report),
            "look_ms": await _ms(lambda: {it.id: (name, it) for name, it in board.all()}),
            "choose_ms": await _ms(lambda: policy.choose(board.live(some), None)),
            "models_ms": await _ms(
                lambda: [api._card(directory, board, id, None) for id in directory.ids()]
            ),
            "unknown_model_ms": await _ms(lambda: _unknown(directory)),
            "ready_ms": await _ms(
                lambda: api._readiness(
                    directory, board, None, None, lambda model: waiting, None
                ).model_dump_json(exclude_unset=True)
            ),
            "fleet_ms": await _ms(
                lambda: fleets._fleet(None).model_dump_json(exclude_unset=True).encode()
            ),
            "limits_8_ms": await _ms(_exchange_of_limits(8)),
            "limits_32_ms": await _ms(_exchange_of_limits(32)),
            "metrics_ms": await _ms(lambda: _page({}, True, _pages(fleet))),
        }


def _about(name: str) -> dict[str, Any]:
    """What a replica on a GPU tells of its model; two models share a GPU."""
    parts = {"weights": 15.0, "kv_cache": 18.0, "graphs": 0.8, "other": 1.2}
    gpu = f"GPU-{int(name.removeprefix('model-')) // 2:08d}"
    return {
        "takes": ["chat", "completions", "tools"],
        "memory": {"gpu_gib": 80.0, "gpus": 1, "parts": parts, "gpu": gpu, "part_gib": 40.0},
    }


def _unknown(directory: Directory) -> None:
    try:
        models.find(directory, "gpt-4o-mini", None)
    except GatewayError:
        return
    raise AssertionError("it is known")


def _exchange_of_limits(gateways: int) -> Callable[[], None]:
    """What the limits' actor does for one of so many gateways, twice a second: 1,000 keys, four
    limits each."""
    buckets = {int(time.time() // 60) - n: 10.0 for n in range(2)}
    names = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "tokens_per_day")
    told = limits_actor.encode({f"key-{n}": dict.fromkeys(names, buckets) for n in range(1000)})
    sums = limits_actor.Sums({})

    def exchange(gateway: str = "0") -> None:
        others, _ = sums.exchange(gateway, limits_actor.decode(told), time.time())
        limits_actor.encode(others)

    for n in range(gateways):
        exchange(str(n))
    return exchange


_SERIES = "".join(
    f"# HELP vllm:metric_{family} What it is.\n# TYPE vllm:metric_{family} histogram\n"
    + "".join(
        f'vllm:metric_{family}_bucket{{engine="0",le="{2**bucket}",model_name="m"}} {bucket}.0\n'
        for bucket in range(20)
    )
    for family in range(25)
)
"""About as many lines as vLLM's page has: 500 series."""


def _pages(fleet: Fleet) -> Iterator[tuple[dict[str, str], str]]:
    for name in fleet.names:
        for id in fleet.places(name):
            yield {"model": name, "replica": id}, _SERIES


async def _ms(part: Callable[[], Any]) -> float:
    """The median of its CPU times."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _LEAST_S and len(times) < 10_000):
        began = time.process_time()
        result = part()
        if isinstance(result, Awaitable):
            await result
        times.append(time.process_time() - began)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default=SIZES)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    for size in parser.parse_args().sizes.split(","):
        replicas, _, names = size.partition(":")
        fleet = Fleet(int(names), int(replicas))
        found = asyncio.run(measure(fleet))
        print(json.dumps({"replicas": fleet.replicas, "models": fleet.models} | found), flush=True)


if __name__ == "__main__":
    main()

"""What open pages cost a gateway: ``PYTHONPATH=.:tests python -m benchmarks.pages``.

First the CPU of one request of each kind, all kinds in turn in each round. Then so many pages that
look at the fleet, each as its last answer told it to, and the CPU that the gateway takes with them
and without. Counted is the time of all threads of the gateway's process, by the scheduler's own
clock. The gateway has twelve models with a replica each, and stands behind uvicorn as
:mod:`benchmarks.relay` has it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import os
import statistics
import sys
import time
from typing import Any

import httpx
import uvicorn
import uvloop
from harness.scripted import GatewayProcess, Upstream, reported

from benchmarks import processes, report
from benchmarks.relay.gateway import LikeServe
from serve_app.cluster.exchange import Load
from serve_app.gateway import pace
from serve_app.gateway.pace import HEADER

MODELS = 12
FEW_S = 1.0
"""Seconds between two reports of a replica."""

KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "/health": ("/health", {}),
    "/fleet": ("/fleet", {}),
    "/fleet, unchanged": ("/fleet", {"if-none-match": ""}),  # with what was answered last
    "/metrics": ("/metrics", {}),
    "/metrics, shared": ("/metrics", {"cache-control": "max-age=5"}),
}


async def serve(port: int) -> None:
    """The gateway's process."""
    names = [f"model-{n}" for n in range(MODELS)]
    async with (
        Upstream(_metrics) as upstream,
        GatewayProcess(applications={name: reported() for name in names}) as gateway,
    ):
        for number, name in enumerate(names):
            gateway.board.publish(name, {f"r{number}": (upstream.host, upstream.port)})
        config = uvicorn.Config(
            LikeServe(gateway.app), host="127.0.0.1", port=port, lifespan="off",
            log_level="critical", access_log=False,
        )  # fmt: skip
        reporting = asyncio.create_task(_report(gateway))
        await uvicorn.Server(config).serve()
        reporting.cancel()


async def _report(gateway: GatewayProcess) -> None:
    """Each replica's load, another one each time: the fleet is never unchanged for long."""
    number = 0
    while True:
        number += 1
        for of in range(MODELS):
            gateway.board.report(f"r{of}", Load(number % 256, 0, 256, 0.5))
        await asyncio.sleep(FEW_S)


async def _metrics(exchange: Any) -> None:
    """As many series as a replica's vLLM has."""
    lines = ["# HELP vllm:a A.", "# TYPE vllm:a gauge"]
    lines += [f'vllm:a{{engine="0",model_name="m",le="{n}"}} 1.0' for n in range(700)]
    await exchange.answer("\n".join([*lines, ""]).encode(), "content-type: text/plain")


def each(pid: int, port: int, rounds: int, requests: int) -> None:
    """Measure the kinds of requests."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, (path, headers) in KINDS.items():
            client = http.client.HTTPConnection("127.0.0.1", port)
            last, many = "", requests if path != "/metrics" else requests // 10
            before = processes.cpu_ns(pid)
            for _ in range(many):
                given = {"if-none-match": last} if "if-none-match" in headers else headers
                client.request("GET", path, headers=given)
                answer = client.getresponse()
                answer.read()
                assert answer.status in (200, 304), answer.status
                last = answer.headers.get("etag", "")
            found[kind].append((processes.cpu_ns(pid) - before) / 1e3 / many)
            client.close()
    rows = [[kind, report.spread(costs, "{:.0f}")] for kind, costs in found.items()]
    print(report.table(["µs of CPU per request, min-median-max", ""], rows))


async def together(pid: int, port: int, pages: int, seconds: float) -> None:
    """Measure so many pages at once, after they have found their turns."""
    idle = await _share(pid, seconds)
    asked: list[float] = []
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
    base_url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=60) as client:
        looking = [asyncio.create_task(_page(client, asked)) for _ in range(pages)]
        await asyncio.sleep(10 + pages / pace.affordable_per_s())
        asked.clear()
        busy = await _share(pid, seconds)
        waits = list(asked)
        for task in looking:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*looking)
    print(
        f"{pages} pages: {100 * (busy - idle):.2f} % of a core ({100 * idle:.2f} % without them), "
        f"{len(waits) / seconds:.1f} requests/s, each page every {statistics.median(waits):.1f} s"
    )


async def _page(client: httpx.AsyncClient, asked: list[float]) -> None:
    etag = ""
    while True:
        answer = await client.get("/fleet", headers={"if-none-match": etag} if etag else {})
        etag, wait = answer.headers["etag"], float(answer.headers[HEADER])
        asked.append(wait)
        await asyncio.sleep(wait)


async def _share(pid: int, seconds: float) -> float:
    before, began = processes.cpu_ns(pid), time.monotonic()
    await asyncio.sleep(seconds)
    return (processes.cpu_ns(pid) - before) / 1e9 / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages")
    parser.add_argument("--port", type=int, default=18760)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--pages", type=int, nargs="*", default=[10, 1000])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve(options.port))
        return
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"  # which costs the gateway least
    command = [sys.executable, "-m", "benchmarks.pages", "--serve", "--port", str(options.port)]
    with processes.process(command, {}) as pid:
        _wait(options.port)
        each(pid, options.port, options.rounds, options.requests)
    for pages in options.pages:
        with processes.process(command, {}) as pid:  # another: who asked in a loop took all turns
            _wait(options.port)
            asyncio.run(together(pid, options.port, pages, options.seconds))


def _wait(port: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            client = http.client.HTTPConnection("127.0.0.1", port)
            client.request("GET", "/health")
            client.getresponse().read()
            return
        time.sleep(0.1)


if __name__ == "__main__":
    main()

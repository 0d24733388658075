"""Front ends: bare ``vllm serve`` with one and with four, and ours with as many, on one GPU.

All servers run at the same time and are measured in turn, each alone: an idle engine waits for
requests and takes no time of the GPU. wrk is the client; a Python client would be what limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import load
from benchmarks.h200.server import HAPROXY, MODEL, Server, application, bare, serve_run
from serve_app.local.instance import Instance

PROMPT = 512
TOKENS = 128
CONCURRENCY = {64: 4.0, 256: 6.0}
"""Requests at once, and the least seconds to measure for."""

FIRST_TOKENS = 40
"""Requests of one client, one after the other, for the TTFT."""

Command = tuple[list[str], dict[str, str]]


def arms(model: Path, folder: Path, port: int, engine: dict[str, Any]) -> dict[str, Command]:
    """Commands and environments, by name; the ports count up from ``port``."""
    loaded = {"load_format": "dummy", **engine}
    found: dict[str, Command] = {}
    for count in (1, 4):
        argv = bare(model, port + len(found), api_server_count=count, **loaded)
        found[f"bare-{count}"] = argv, {}
    alone = {"distributed_executor_backend": "uni"}  # without a worker process
    for name, count, gateways, more in (
        ("ours-1", 1, 1, {}),
        ("ours-4", 4, 3, {}),
        ("ours-4-uni", 4, 3, alone),
    ):
        ours = application(MODEL, model, {**engine, **more}, frontends=count)
        command = serve_run(folder, port + len(found), ours, gateways=gateways)
        found[name] = command, HAPROXY
    return found


def measure(
    model: Path, folder: Path, port: int, engine: dict[str, Any], deadline: float, names: list[str]
) -> dict[str, Any]:
    """Start the arms of these names, and measure them in turn until ``deadline``."""
    chosen = arms(model, folder, port, engine)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        servers = {}
        for number, (name, (command, env)) in enumerate(chosen.items()):
            if name in names:
                if env:  # ports and folders that no other Ray of this machine has
                    instance = Instance(port + number)
                    stack.callback(instance.close, keep=False)
                    env = instance.environment() | env
                log = folder / f"front-ends-{name}.log"
                servers[name] = Server(command, port + number, log, **env)
                stack.callback(servers[name].stop)
        list(pool.map(Server.wait, servers.values()))
        starts = {name: server.seconds for name, server in servers.items()}
        print("started", json.dumps(starts), flush=True)
        for server in servers.values():
            _wrk(server.port, folder, 256, 2.0)  # kernels, connections
        rounds: list[dict[str, Any]] = []
        longest = 0.0
        while len(rounds) < 5 and time.monotonic() + longest < deadline:
            began = time.monotonic()
            order = list(servers)
            random.shuffle(order)
            found: dict[str, Any] = {name: {} for name in servers}
            for concurrency, seconds in CONCURRENCY.items():
                for name in order:
                    found[name][f"c{concurrency}"] = _wrk(
                        servers[name].port, folder, concurrency, seconds
                    )
            for name in order * 2:
                found[name].setdefault("ttft_ms", []).append(_ttft(servers[name].port, folder))
            rounds.append(found)
            print(json.dumps(found), flush=True)
            longest = time.monotonic() - began
        return {"engine": engine, "starts_s": starts, "rounds": rounds, "summary": _summary(rounds)}


def _body(prompt: object) -> dict[str, Any]:
    return {
        "model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def _wrk(port: int, folder: Path, concurrency: int, seconds: float) -> dict[str, float]:
    body = folder / "body.json"
    body.write_text(json.dumps(_body("@PROMPT@")))
    run = load.run_wrk(
        port, concurrency, seconds, body, path="/v1/completions", prompt_tokens=PROMPT
    )
    return {
        "tokens_per_s": round(run.tokens_per_s, 1),
        "requests": run.requests,
        "errors": run.errors,
        "events_per_request": round(run.events_per_request, 1),
        "client_cores": round(run.client_cores, 2),
    }


def _ttft(port: int, folder: Path) -> float:
    """Median of one client's, in ms, in a process of its own."""
    code = (
        "import http.client, json, random, statistics, sys, time\n"
        "port, count, body = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])\n"
        "c = http.client.HTTPConnection('127.0.0.1', port)\n"
        "took = []\n"
        "for _ in range(count):\n"
        f"    body['prompt'] = [random.randrange(1000, 30000) for _ in range({PROMPT})]\n"
        "    sent = json.dumps(body)\n"
        "    began = time.perf_counter()\n"
        "    c.request('POST', '/v1/completions', sent, {'content-type': 'application/json'})\n"
        "    answer = c.getresponse()\n"
        "    answer.readline()\n"
        "    took.append(time.perf_counter() - began)\n"
        "    answer.read()\n"
        "print(1000 * statistics.median(took[5:]))\n"
    )
    body = json.dumps(_body("") | {"max_tokens": 8})
    run = subprocess.run(
        [sys.executable, "-c", code, str(port), str(FIRST_TOKENS), body],
        capture_output=True, text=True, check=True, cwd=folder, env=os.environ,
    )  # fmt: skip
    return round(float(run.stdout), 2)


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Min, median and max of each arm, and of its ratio to each bare one in the same round."""

    def spread(values: list[float]) -> list[float]:
        return [round(v, 3) for v in (min(values), statistics.median(values), max(values))]

    def figure(load: str, arm: str) -> Callable[[dict[str, Any]], float]:
        return lambda one: float(one[arm][load]["tokens_per_s"])

    found: dict[str, Any] = {}
    names = list(rounds[0])
    bares = [name for name in names if name.startswith("bare")]
    for name in names:
        its: dict[str, Any] = found.setdefault(name, {})
        for load_ in (f"c{c}" for c in CONCURRENCY):
            its[load_] = spread([figure(load_, name)(one) for one in rounds])
            for other in bares:
                if other != name:
                    ratios = [figure(load_, name)(o) / figure(load_, other)(o) for o in rounds]
                    its[f"{load_} over {other}"] = spread(ratios)
        its["ttft_ms"] = spread([t for one in rounds for t in one[name]["ttft_ms"]])
        its["errors"] = sum(one[name][f"c{c}"]["errors"] for one in rounds for c in CONCURRENCY)
    return found

"""What a gateway for customers costs, on a real engine: all of it on against all of it off."""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from benchmarks import load
from benchmarks.h200.front_ends import PROMPT, request_body
from benchmarks.h200.server import HAPROXY, MODEL, Server, application, serve_run
from serve_app.config import keys
from serve_app.local.instance import Instance

CONCURRENCY = {64: 6.0, 256: 8.0}
"""Requests at once, and the least seconds to measure for."""

_SCRAPE_S = 5.0
_PLENTY = 1_000_000_000


def measure(
    model: Path, folder: Path, port: int, engine: dict[str, Any], deadline: float
) -> dict[str, Any]:
    """Two servers on one GPU, one with everything on, measured in turn until ``deadline``."""
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(_receiver())
        key, on = _everything(folder, receiver)
        servers = {}
        for number, (name, args) in enumerate({"off": {}, "on": on}.items()):
            instance = Instance(port + number)
            stack.callback(instance.close, keep=False)
            ours = application(MODEL, model, engine, frontends=4)
            command = serve_run(folder, port + number, ours, gateways=3, **args)
            env = instance.environment() | HAPROXY
            log = folder / f"customers-{name}.log"
            servers[name] = Server(command, port + number, log, **env)
            servers[name].headers = {"authorization": f"Bearer {key}"}
            stack.callback(servers[name].stop)
        with ThreadPoolExecutor() as pool:
            list(pool.map(Server.wait, servers.values()))
        stack.enter_context(_scraping(servers["on"]))
        rounds: list[dict[str, dict[str, float]]] = []
        longest = 0.0
        for server in servers.values():
            _wrk(server, folder, 256, 2.0)  # kernels, connections
        while len(rounds) < 12 and time.monotonic() + longest < deadline:
            began = time.monotonic()
            order = list(servers)
            random.shuffle(order)
            rounds.append({name: {} for name in servers})
            for concurrency, seconds in CONCURRENCY.items():
                for name in order:
                    found = _wrk(servers[name], folder, concurrency, seconds)
                    rounds[-1][name][f"c{concurrency}"] = found
            print(json.dumps(rounds[-1]), flush=True)
            longest = time.monotonic() - began
        ratios = {}
        for at in (f"c{concurrency}" for concurrency in CONCURRENCY):
            pairs = [it["on"][at] / it["off"][at] for it in rounds]
            spread = min(pairs), statistics.median(pairs), max(pairs)
            ratios[at] = [round(ratio, 3) for ratio in spread]
        return {"engine": engine, "rounds_tokens_per_s": rounds, "on_over_off": ratios}


def _everything(folder: Path, receiver: int) -> tuple[str, dict[str, Any]]:
    """A key, and the gateway's args with all that it can do."""
    key, hash = keys.new()
    limits = dict.fromkeys(
        ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrent_requests"),
        _PLENTY,
    )
    file = folder / "keys.yaml"
    file.write_text(yaml.safe_dump([{"name": "team", "hash": hash, "admin": True, **limits}]))
    return key, {
        "keys": {"file": str(file)},
        "usage_db": f"sqlite:///{folder}/usage.db",
        "usage_dir": str(folder / "usage"),
        "access_log": True,
        "otlp_endpoint": f"http://127.0.0.1:{receiver}",
    }


@contextlib.contextmanager
def _receiver() -> Iterator[int]:
    """The port of a server that takes spans, and throws them away."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()


@contextlib.contextmanager
def _scraping(server: Server) -> Iterator[None]:
    """Read GET /metrics as Prometheus does, and fail at the end if that failed."""
    ended = threading.Event()
    failures: list[str] = []

    def scrape() -> None:
        while not ended.wait(_SCRAPE_S):
            url = f"http://127.0.0.1:{server.port}/metrics"
            try:
                asked = urllib.request.Request(url, headers=server.headers)
                with urllib.request.urlopen(asked, timeout=10) as answer:
                    assert b"vllm:" in answer.read()
            except Exception as error:
                failures.append(repr(error))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failures:
        print(f"{len(failures)} scrapes failed: {failures[-1]}", flush=True)


def _wrk(server: Server, folder: Path, concurrency: int, seconds: float) -> float:
    """Tokens per second."""
    body = folder / "body.json"
    body.write_text(json.dumps(request_body("@PROMPT@")))
    run = load.run_wrk(
        server.port,
        concurrency,
        seconds,
        body,
        path="/v1/completions",
        prompt_tokens=PROMPT,
        headers=server.headers,
    )
    if run.errors:
        raise RuntimeError(f"{run.errors} requests failed")
    return round(run.tokens_per_s, 1)

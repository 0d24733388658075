"""Bare ``vllm serve`` with one front end, with four and with its Rust one, ours, and others.

All servers run at the same time and are measured in turn, each alone: an idle engine waits for
requests and takes no time of the GPU. wrk is the client; a Python client would be what limits.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import arms as contenders
from benchmarks import load, others, report
from benchmarks.h200 import first_tokens
from benchmarks.h200.server import (
    HAPROXY,
    MODEL,
    RAY,
    Server,
    application,
    bare,
    serve_applications,
    serve_run,
)
from serve_app.local.instance import Instance

PROMPT = 512
TOKENS = 128
CONCURRENCY = {64: 4.0, 256: 6.0}
"""Requests at once, and the least seconds to measure for."""

SLOW = 2000.0
"""Tokens/s: with fewer of them, what follows takes one request of each client, in place of two."""

BEFORE_ANOTHER = ("vllm-router", "litellm")
"""Arms without an engine of their own: in front of ``bare-1``, which is warm without them."""

Command = tuple[list[str], dict[str, str]]


def arms(model: Path, folder: Path, port: int, engine: dict[str, Any]) -> dict[str, Command]:
    """Commands and environments, by name; the ports count up from ``port``.

    Those of :data:`BEFORE_ANOTHER` stand in front of ``bare-1``, the first.
    """
    loaded = {"load_format": "dummy", **engine}
    found: dict[str, Command] = {}
    for count in (1, 4):
        argv = bare(model, port + len(found), api_server_count=count, **loaded)
        found[f"bare-{count}"] = argv, {}
    alone = {"distributed_executor_backend": "uni"}  # without a worker process
    for name, count, gateways, more in (
        ("ours-1", 1, 1, {}),
        ("ours-2", 2, 2, {}),
        ("ours-4", 4, 3, {}),
        ("ours-4-uni", 4, 3, alone),
    ):
        ours = application(MODEL, model, engine | more, frontends=count)
        command = serve_run(folder, port + len(found), ours, gateways=gateways)
        found[name] = command, HAPROXY
    found["bare-rust"] = bare(model, port + len(found), **loaded), contenders.rust_env()
    for name, env in (("rayllm", RAY), ("rayllm-direct", HAPROXY | contenders.DIRECT)):
        theirs = contenders.ray_llm(MODEL, model, loaded)
        found[name] = serve_applications(folder, port + len(found), [theirs]), env
    found["vllm-router"] = others.vllm_router(port + len(found), port, port + 100), {}
    command = others.litellm(folder, port + len(found), port, [MODEL])
    found["litellm"] = command, others.LITELLM_ENV
    return found


LEFT_OUT: dict[str, Callable[[], str]] = {
    "bare-rust": contenders.no_rust,
    "rayllm": contenders.no_ray_llm,
    "rayllm-direct": contenders.no_ray_llm,
    "vllm-router": lambda: others.absent("vllm-router", "vllm-router"),
    "litellm": lambda: others.absent("litellm", "litellm"),
}
"""Why one cannot run on this machine; empty where it can."""


def measure(
    model: Path,
    folder: Path,
    port: int,
    engine: dict[str, Any],
    deadline: float,
    names: dict[str, str],
    most: int = 256,
    words: bool = False,
) -> dict[str, Any]:
    """Start some arms, and measure them in turn until ``deadline``.

    Args:
        names: the arms, each with its ``CUDA_VISIBLE_DEVICES``.
        most: requests at once that the KV cache has room for.
        words: prompts are text, not token ids, which LiteLLM does not take.

    Raises:
        SystemExit: the first arm, with which others are compared, does not start.
    """
    loads = {n: seconds for n, seconds in CONCURRENCY.items() if n <= most}
    chosen = arms(model, folder, port, engine)
    left_out = {name: why for name in names if name in LEFT_OUT and (why := LEFT_OUT[name]())}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(names)) as pool:
        servers = {}
        for number, (name, (command, env)) in enumerate(chosen.items()):
            if name in names and name not in left_out:
                if "RAY_ADDRESS" in env:  # ports and folders that no other Ray of this machine has
                    instance = Instance(port + number)
                    stack.callback(instance.close, keep=False)
                    env = instance.environment() | env
                env = env | {"CUDA_VISIBLE_DEVICES": names[name]}
                log = folder / f"front-ends-{name}.log"
                servers[name] = Server(command, port + number, log, **env)
                stack.callback(servers[name].stop)
        limit_s = deadline - time.monotonic()
        started = {name: pool.submit(server.wait, limit_s) for name, server in servers.items()}
        for name, ended in started.items():
            try:
                ended.result()
            except SystemExit as failure:
                if name == next(iter(started)):
                    raise
                left_out[name] = f"it did not start: {str(failure)[-500:]}"
                servers.pop(name)
        starts = {name: server.seconds for name, server in servers.items()}
        print("started", json.dumps(starts), "left out", json.dumps(left_out), flush=True)
        for name, server in servers.items():  # kernels, connections
            few = name in BEFORE_ANOTHER
            _wrk(server.port, folder, 8 if few else most, 2.0, words, waves=1)
        rounds: list[dict[str, Any]] = []
        longest = 0.0
        try:
            while len(rounds) < 5 and (not rounds or time.monotonic() + longest < deadline):
                began = time.monotonic()
                rounds.append({name: {} for name in servers})
                _play(rounds[-1], servers, loads, folder, words)
                print(len(rounds), json.dumps(rounds[-1]), flush=True)
                longest = time.monotonic() - began
        except SystemExit as why:  # what was measured so far is worth having
            left_out["the rest of the last round"] = str(why)
            if not any(rounds[-1][name] for name in servers):
                rounds.pop()
        return {
            "date": str(datetime.date.today()), "machine": report.machine(), "engine": engine,
            "left_out": left_out, "starts_s": starts, "rounds": rounds,
        }  # fmt: skip


def _play(
    found: dict[str, Any], servers: dict[str, Server], loads: dict[int, float], folder: Path,
    words: bool,
) -> None:  # fmt: skip
    """A round of all, in random order; slow ones last, since they may take what time is left."""
    found["c1"] = first_tokens.measure(servers, folder, words)
    order = random.sample(list(servers), len(servers))
    for concurrency, seconds in loads.items():
        slow = {it for it in order if any(run["tokens_per_s"] < SLOW for run in found[it].values())}
        for name in sorted(order, key=slow.__contains__):
            waves = 1 if name in slow else 2
            one = _wrk(servers[name].port, folder, concurrency, seconds, words, waves)
            found[name][f"c{concurrency}"] = one
            print(name, concurrency, json.dumps(one), flush=True)


def request_body(prompt: object) -> dict[str, Any]:
    return {
        "model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def _wrk(
    port: int, folder: Path, concurrency: int, seconds: float, words: bool, waves: int = 2
) -> dict[str, float]:
    body = folder / "body.json"
    body.write_text(json.dumps(request_body("@PROMPT@")))
    run = load.run_wrk(
        port,
        concurrency,
        seconds,
        body,
        waves,
        path="/v1/completions",
        prompt_tokens=PROMPT,
        words=words,
    )
    return {
        "tokens_per_s": round(run.tokens_per_s, 1),
        "requests": run.requests,
        "errors": run.errors,
        "events_per_request": round(run.events_per_request, 1),
        "client_cores": round(run.client_cores, 2),
    }

"""Four replicas of a 1B shape on parts of one GPU, by each policy: traces in real time.

The gateway's policy is one of its args, so each has a server of its own; vllm-router stands in
front of four ``vllm serve``. Each has a GPU for itself: on a machine with several GPUs as many play
the same round at the same time, on one they follow each other. No round has a prompt of another
one. What round robin completes at most decides what all are offered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import others
from benchmarks.h200 import failures
from benchmarks.h200.server import (
    HAPROXY,
    MODEL,
    Server,
    application,
    bare,
    gpu_memory_mib,
    serve_run,
    until,
)
from benchmarks.routing import client, realtime, traces
from benchmarks.routing.traces import Session, Turn
from serve_app.local.instance import Instance

ROUTER = "vllm-router cache_aware"
CONTENDERS = ("round_robin", "cache_aware", ROUTER, "least_loaded")
REPLICAS = 4
SEEDS = (1, 2, 3)
LOADS = (1.0, 1.5)

TRACES = {it.name: it for it in (traces.QUARTER, traces.TRACES["reasoning"])}

_KV_GIB = 3.5
"""For a replica: 114,000 tokens of a 1B shape, a quarter of an 8B's on the whole GPU."""

_SHARE = 0.23
_WARM_S, _MEASURED_S = 8.0, 20.0
_CLIENTS, _TURNS = 256, 3
_PORTS = 20
"""For each contender: its own, vllm-router's for metrics, and those of the servers behind it."""

_MOST_TOKENS = 600
"""Of an answer: a reasoning model's 2,500 would take longer than there is time."""


def measure(
    model: Path, folder: Path, port: int, deadline: float, names: Sequence[str] = CONTENDERS
) -> dict[str, Any]:
    """The step; ``deadline`` is by ``time.monotonic``. What does not fit before it is left out."""
    left_out = {ROUTER: why} if (why := others.absent("vllm-router", "vllm-router")) else {}
    names = [name for name in names if name not in left_out]
    gpus = _gpus()
    capacities: dict[str, float] = {}
    records: list[dict[str, Any]] = []
    for first in range(0, len(names), len(gpus)):
        at_once = names[first : first + len(gpus)]
        if capacities and time.monotonic() + 200 > deadline:
            left_out |= dict.fromkeys(at_once, "the step's time was over")
            continue
        with contextlib.ExitStack() as stack:
            places = dict(zip(at_once, gpus, strict=False))
            ports = _started(model, folder, port, places, stack, deadline)
            clients = stack.enter_context(ProcessPoolExecutor(len(ports), get_context("spawn")))
            for name in TRACES:
                if name not in capacities:
                    capacities[name] = clients.submit(_most, ports[names[0]], name).result()
            print("requests/s of round robin", json.dumps(capacities), flush=True)
            for seed, trace, load in itertools.product(SEEDS, TRACES, LOADS):
                if time.monotonic() + 2 * (_WARM_S + _MEASURED_S) > deadline:
                    break
                rate = load * capacities[trace]
                asked = {it: clients.submit(_round, at, trace, rate, seed)
                         for it, at in ports.items()}  # fmt: skip
                for contender, answered in asked.items():
                    records.append({"trace": trace, "load": load, "round": seed,
                                    "contender": contender, **answered.result()})  # fmt: skip
                    print(json.dumps(records[-1]), flush=True)
    return {"replicas": REPLICAS, "gpus_at_once": len(gpus), "left_out": left_out,
            "requests_per_s of round robin": capacities, "records": records,
            "vllm-router": others.version("vllm-router")}  # fmt: skip


def _gpus() -> list[str]:
    try:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        return seen.split(",") if seen else [str(it) for it in range(len(gpu_memory_mib()))]
    except OSError:
        return [""]  # a dry run


def _started(
    model: Path, folder: Path, port: int, places: dict[str, str], stack: contextlib.ExitStack,
    deadline: float,
) -> dict[str, int]:  # fmt: skip
    """The contenders, each on its GPU, as soon as all replicas of all answer: their ports."""
    engine = {"max_model_len": 16384, "kv_cache_memory_bytes": round(_KV_GIB * 2**30)}
    servers: dict[str, list[Server]] = {}
    for number, (name, gpu) in enumerate(places.items()):
        at, env = port + number * _PORTS, {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        log = folder / f"routing-{name.split()[0]}-{at}"
        if name == ROUTER:
            ports, commands = range(at + 2, at + 2 + REPLICAS), []
            for own in ports:
                sized = {"gpu_memory_utilization": _SHARE, "load_format": "dummy", **engine}
                command = bare(model, own, **sized)
                commands.append([*command, "--enable-prompt-tokens-details"])
            servers[name] = [Server(command, own, log.with_suffix(f".{own}.log"), **env)
                             for own, command in zip(ports, commands, strict=True)]  # fmt: skip
        else:
            instance = Instance(at)
            stack.callback(instance.close, keep=False)
            args: dict[str, Any] = {"replicas": REPLICAS, "frontends": 1}
            if gpu:
                args["resources"] = {"gpu_share": _SHARE}
            block = application(MODEL, model, {**engine, "enable_prompt_tokens_details": True},
                                **args)  # fmt: skip
            command = serve_run(folder, at, block, gateways=2, routing={"policy": name})
            servers[name] = [Server(command, at, log.with_suffix(".log"),
                                    **(instance.environment() | HAPROXY | env))]  # fmt: skip
        for server in servers[name]:
            stack.callback(server.stop)
    with ThreadPoolExecutor() as pool:
        limit_s = deadline - time.monotonic()
        every = itertools.chain.from_iterable(servers.values())
        list(pool.map(lambda server: server.wait(limit_s), every))
    for name, its in servers.items():
        if name == ROUTER:
            at = its[0].port - 2
            words = realtime.vllm_router("cache_aware", at, [it.port for it in its])
            router = Server([str(it) for it in words], at, folder / "routing-vllm-router.log")
            stack.callback(router.stop)
            servers[name] = [router.wait(60)]
        else:
            until(lambda server=its[0]: failures.replicas(server) == REPLICAS, 120)  # type: ignore[misc]
    time.sleep(10)  # as long as a new replica gets less than the others
    return {name: its[0].port for name, its in servers.items()}


def _most(port: int, trace: str) -> float:
    """Requests/s that are completed for clients who each send the next one at once."""
    turns = itertools.chain.from_iterable(TRACES[trace].sessions(random.Random(0)))
    sessions = [Session(0.0, tuple(itertools.islice(turns, _TURNS))) for _ in range(_CLIENTS)]
    answered = _play(port, sessions, "most")
    took = max(one.ended for one in answered)
    said = client.measured(answered, took / 4, took * 3 / 4)
    return max(0.5, float(said["requests_per_s"]))


def _round(port: int, trace: str, rate: float, seed: int) -> dict[str, Any]:
    end = _WARM_S + _MEASURED_S
    answered = _play(port, TRACES[trace].at(rate, end, seed), f"{seed} {rate}")
    return client.measured(answered, _WARM_S, end)


def _play(port: int, sessions: Sequence[Session], salt: str) -> list[client.Answered]:
    url, body = f"http://127.0.0.1:{port}", partial(completion, salt)
    return asyncio.run(client.play(url, sessions, MODEL, body, "/v1/completions"))


def completion(salt: str, turn: Turn, model: str) -> dict[str, Any]:
    """A prompt of token ids: as many as the trace says, whatever the tokenizer.

    With another ``salt`` a stream is another one.
    """
    ids: list[int] = []
    for stream, end in turn.pieces:
        ids.extend(_ids(salt, stream, end)[len(ids) :])
    return {
        "model": model, "prompt": ids, "max_tokens": min(turn.output_tokens, _MOST_TOKENS),
        "ignore_eos": True, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


@lru_cache(256)
def _ids(salt: str, stream: int, tokens: int) -> list[int]:
    return random.Random(f"{salt} {stream}").choices(range(1000, 30_000), k=tokens)

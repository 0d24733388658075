"""Four real engines by each policy: on parts of one GPU, or on a CPU. Traces in real time.

The gateway's policy is one of its args, so each has a server of its own; vllm-router stands in
front of four ``vllm serve``. As many as there is memory for start at the same time, spread over the
GPUs. Of those on one GPU each plays a round alone, in random order: an idle engine takes no time of
it. No round has a prompt of another one. What round robin completes at most decides what all are
offered.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import uvloop

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
    visible_gpus,
)
from benchmarks.routing import client, realtime, traces
from benchmarks.routing.traces import Session, Trace, Turn
from serve_app import lifeline
from serve_app.local.instance import Instance

ROUTER = "vllm-router cache_aware"
ROUND_ROBIN = "round_robin"
CONTENDERS = (ROUND_ROBIN, "cache_aware", ROUTER, "least_loaded")
REPLICAS = 4
SEEDS = (1, 2, 3)

_MOST_TOKENS = 600
"""Of an answer: a reasoning model's 2,500 would take longer than there is time."""

_PORTS = 20
"""For each contender: its own, vllm-router's for metrics, and those of the servers behind it."""

_ENGINE_GIB = 8.4
"""Of a GPU, for one engine: the planner says 7.2 of what :data:`GPU` has."""

_START_S = 330.0
"""Where no kernel is compiled yet."""


@dataclass(frozen=True)
class Setup:
    """What four engines are, and what is asked of them."""

    traces: Mapping[Trace, tuple[float, ...]]
    """And the loads of each, as multiples of what round robin completes."""

    engine: Mapping[str, Any]
    model: Mapping[str, Any]
    """A model's further ``args``."""

    gateways: int
    clients: int
    """That each ask as soon as they are answered, to see how much can be done."""

    warm_s: float
    measured_s: float


GPU = Setup(
    {traces.QUARTER: (1.0, 1.5), traces.TRACES["reasoning"]: (1.0,)},
    # 114,000 tokens of a 1B shape each, a quarter of an 8B's on the whole GPU.
    {"max_model_len": 16384, "kv_cache_memory_bytes": round(3.5 * 2**30), "max_num_seqs": 128},
    {"resources": {"gpu_memory_gib": _ENGINE_GIB, "num_cpus": 0.5}},
    gateways=3,  # 38,000 tokens/s of a reasoning model kept two of them busy
    clients=256,
    warm_s=5.0,
    measured_s=12.0,
)
CPU = Setup(
    {traces.SMALL: (1.0,)},
    # 9,000 tokens of SmolLM2-135M each: less than all customers' prompts.
    {"max_model_len": 2048, "kv_cache_memory_bytes": 200 << 20, "enforce_eager": True},
    {"resources": {"device": "cpu", "num_cpus": 0}},
    gateways=2,
    clients=16,
    warm_s=15.0,
    measured_s=20.0,
)

_TURNS = 3


def measure(
    setup: Setup, model: Path, folder: Path, port: int, deadline: float,
    names: Sequence[str] = CONTENDERS, capacities: Mapping[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Contenders, as many at the same time as there is memory for.

    Args:
        deadline: by ``time.monotonic``. What does not fit before it is left out.
        capacities: requests/s of round robin by trace, where an earlier call has measured it.
    """
    lifeline.tie_children()  # the clients
    left_out = {ROUTER: why} if (why := others.absent("vllm-router", "vllm-router")) else {}
    names = [name for name in names if name not in left_out]
    gpus, on_each = [""], 1
    if setup is GPU:
        gpus = visible_gpus()
        on_each = max(1, int(min(gpu_memory_mib("total")) / 1024 / _ENGINE_GIB / REPLICAS))
    capacities = dict(capacities or {})
    records: list[dict[str, Any]] = []
    for first in range(0, len(names), len(gpus) * on_each):
        at_once = names[first : first + len(gpus) * on_each]
        if records and time.monotonic() + 200 > deadline:
            left_out |= dict.fromkeys(at_once, "the step's time was over")
            continue
        with contextlib.ExitStack() as stack:
            places = dict(zip(at_once, itertools.cycle(gpus), strict=False))
            ports, failed = _started(setup, model, folder, port, places, stack, deadline)
            left_out |= failed
            if ROUND_ROBIN not in ports and {it.name for it in setup.traces} - capacities.keys():
                why = "round robin did not start, and what it completes decides the load"
                left_out |= dict.fromkeys(ports, why)
                continue
            if not ports:
                continue
            clients = stack.enter_context(ProcessPoolExecutor(len(gpus), get_context("spawn")))
            for trace in setup.traces:
                if trace.name not in capacities:
                    most = clients.submit(_most, ports[ROUND_ROBIN], trace, setup.clients)
                    capacities[trace.name] = most.result()
            print("requests/s of round robin", json.dumps(capacities), flush=True)
            on = [[name for name in ports if places[name] == gpu] for gpu in gpus]
            loads = [(trace, load) for trace, its in setup.traces.items() for load in its]
            for seed, (trace, load) in itertools.product(SEEDS, loads):
                took = max(map(len, on)) * (setup.warm_s + setup.measured_s)
                if time.monotonic() + 1.5 * took > deadline:
                    break
                rate = load * capacities[trace.name]
                asked = [clients.submit(_in_turn, setup, {it: ports[it] for it in its}, trace,
                                        rate, seed) for its in on]  # fmt: skip
                for contender, found in itertools.chain(*(it.result() for it in asked)):
                    records.append({"trace": trace.name, "load": load, "round": seed,
                                    "contender": contender, **found})  # fmt: skip
                    print(json.dumps(records[-1]), flush=True)
    return {"replicas": REPLICAS, "gpus_at_once": len(gpus), "left_out": left_out,
            "requests_per_s of round robin": capacities, "records": records,
            "vllm-router": others.version("vllm-router")}  # fmt: skip


def _started(
    setup: Setup, model: Path, folder: Path, port: int, places: dict[str, str],
    stack: contextlib.ExitStack, deadline: float,
) -> tuple[dict[str, int], dict[str, str]]:  # fmt: skip
    """The contenders, each on its GPU, as soon as all replicas of all answer.

    Returns:
        Their ports, and why some did not start.
    """
    servers: dict[str, list[Server]] = {}
    for number, (name, gpu) in enumerate(places.items()):
        at, env = port + number * _PORTS, {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        log = folder / f"routing-{name.split()[0]}-{at}"
        if name == ROUTER:
            ports, commands = range(at + 2, at + 2 + REPLICAS), []
            for own in ports:
                flags = {**setup.engine, "load_format": "dummy"}
                if gpu:
                    gib = min(gpu_memory_mib("total")) / 1024
                    flags["gpu_memory_utilization"] = round(_ENGINE_GIB / gib, 3)
                eager = flags.pop("enforce_eager", False)
                command = bare(model, own, **flags) + ["--enforce-eager"] * eager
                commands.append([*command, "--enable-prompt-tokens-details"])
            servers[name] = [Server(command, own, log.with_suffix(f".{own}.log"), **env)
                             for own, command in zip(ports, commands, strict=True)]  # fmt: skip
        else:
            instance = Instance(at)
            stack.callback(instance.close, keep=False)
            engine = {**setup.engine, "enable_prompt_tokens_details": True}
            args = {"replicas": REPLICAS, "frontends": 1, **setup.model}
            block = application(MODEL, model, engine, **args)
            routing = {"policy": name}
            command = serve_run(folder, at, block, gateways=setup.gateways, routing=routing)
            servers[name] = [Server(command, at, log.with_suffix(".log"),
                                    **(instance.environment() | HAPROXY | env))]  # fmt: skip
        for server in servers[name]:
            stack.callback(server.stop)
    limit_s = min(_START_S, deadline - time.monotonic())
    with ThreadPoolExecutor(len(places)) as pool:
        said = pool.map(lambda its: _why_not(its, limit_s), servers.values())
        failed = {name: why for name, why in zip(servers, said, strict=True) if why}
    if ROUTER in servers and ROUTER not in failed:
        its = servers[ROUTER]
        at = its[0].port - 2
        words = realtime.vllm_router("cache_aware", at, [it.port for it in its])
        router = Server([str(it) for it in words], at, folder / "routing-vllm-router.log")
        stack.callback(router.stop)
        servers[ROUTER] = [router]
        if why := _why_not([router], 60):
            failed[ROUTER] = why
    for name in failed:
        for server in servers.pop(name):
            server.stop()
    for name, its in servers.items():
        if name != ROUTER:
            until(lambda server=its[0]: failures.replicas(server) == REPLICAS, 120)  # type: ignore[misc]
    time.sleep(10)  # as long as a new replica gets less than the others
    return {name: its[0].port for name, its in servers.items()}, failed


def _why_not(servers: Sequence[Server], limit_s: float) -> str:
    """Why not all of them answer; empty where they do."""
    with ThreadPoolExecutor(len(servers)) as pool:
        try:
            list(pool.map(lambda it: it.wait(limit_s), servers))
        except SystemExit as why:
            return f"it did not start: {str(why)[-1500:]}"
    return ""


def _most(port: int, trace: Trace, clients: int) -> float:
    """Requests/s that are completed for clients who each send the next one at once."""
    turns = itertools.chain.from_iterable(trace.sessions(random.Random(0)))
    sessions = [Session(0.0, tuple(itertools.islice(turns, _TURNS))) for _ in range(clients)]
    answered = _play(port, sessions, "most")
    took = max(one.ended for one in answered)
    said = client.measured(answered, took / 4, took * 3 / 4)
    return max(0.5, float(said["requests_per_s"]))


def _in_turn(
    setup: Setup, ports: Mapping[str, int], trace: Trace, rate: float, seed: int
) -> list[tuple[str, dict[str, Any]]]:
    """A round of each contender at these ports, one after the other in random order."""
    end, found = setup.warm_s + setup.measured_s, []
    for name in random.sample(list(ports), len(ports)):
        answered = _play(ports[name], trace.at(rate, end, seed), f"{seed} {rate}")
        found.append((name, client.measured(answered, setup.warm_s, end)))
    return found


def _play(port: int, sessions: Sequence[Session], salt: str) -> list[client.Answered]:
    urls, body = [f"http://127.0.0.1:{port}"], partial(completion, salt)
    return uvloop.run(client.play(urls, sessions, MODEL, body, "/v1/completions"))


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

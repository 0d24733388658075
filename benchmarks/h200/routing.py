"""Four replicas of a 1B shape on parts of one GPU, by each policy: traces in real time.

The gateway's policy is one of its args, so each has a server of its own, one after the other; the
rounds of one policy follow each other, with empty caches at the begin of each. Round robin is the
first: how much it completes where more is offered decides what all are offered.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.h200 import failures
from benchmarks.h200.server import (
    MODEL,
    RAY,
    Server,
    application,
    gpu_memory_mib,
    serve_run,
    until,
)
from benchmarks.routing import client, traces
from benchmarks.routing.traces import Session, Turn

POLICIES = ("round_robin", "cache_aware", "least_loaded")
REPLICAS = 4

_TRACES = (traces.QUARTER, traces.TRACES["reasoning"])
_KV_GIB = 3.5
"""For a replica: 114,000 tokens of a 1B shape, a quarter of an 8B's on the whole GPU."""

_WARM_S, _MEASURED_S = 10.0, 25.0
_LOADS = (1.0, 1.5)
_MOST_TOKENS = 600
"""Of an answer: a reasoning model's 2,500 would take longer than there is time."""


def measure(
    model: Path, folder: Path, port: int, deadline: float, names: Sequence[str] = POLICIES
) -> dict[str, Any]:
    """The step; ``deadline`` is by ``time.monotonic``. What does not fit before it is left out."""
    found: dict[str, Any] = {"policies": {}}
    capacities: dict[str, float] = {}
    for name in names:
        if found["policies"] and time.monotonic() + 200 > deadline:
            break
        server = _started(model, folder, port, name)
        try:
            for trace in _TRACES:
                if trace.name not in capacities:
                    capacities[trace.name] = _capacity(server.port, trace)
            found["policies"][name] = records = []
            rounds = [(seed, trace, load) for seed in (1, 2, 3) for trace in _TRACES
                      for load in _LOADS]  # fmt: skip
            for seed, trace, load in rounds:
                if time.monotonic() + 3 * (_WARM_S + _MEASURED_S) > deadline:
                    break
                rate = load * capacities[trace.name]
                measured = _play(server.port, trace.at(rate, _WARM_S + _MEASURED_S, seed))
                records.append({"trace": trace.name, "load": load, "round": seed, **measured})
                print(name, json.dumps(records[-1]), flush=True)
        finally:
            server.stop()
    return found | {"requests_per_s of round robin": capacities, "replicas": REPLICAS}


def _started(model: Path, folder: Path, port: int, policy: str) -> Server:
    engine = {"max_model_len": 16384, "kv_cache_memory_bytes": round(_KV_GIB * 2**30),
              "enable_prefix_caching": True, "enable_prompt_tokens_details": True}  # fmt: skip
    args: dict[str, Any] = {"replicas": REPLICAS, "frontends": 1}
    if _gpus():
        args["resources"] = {"gpu_share": 0.23}
    command = serve_run(
        folder, port, application(MODEL, model, engine, **args), routing={"policy": policy}
    )
    server = Server(command, port, folder / f"routing-{policy}.log", **RAY).wait()
    until(lambda: failures.replicas(server) == REPLICAS, 120)
    time.sleep(10)  # as long as a new replica gets less than the others
    return server


def _gpus() -> bool:
    try:
        return bool(gpu_memory_mib())
    except OSError:
        return False  # a dry run


def _capacity(port: int, trace: traces.Trace) -> float:
    """Requests/s that are completed where half as many again, or more, are offered."""
    rate = 4.0
    while True:
        said = _play(port, trace.at(rate, 20.0, 0), warm_s=8.0, measured_s=12.0)
        if said["requests_per_s"] < rate / 1.5 or rate > 200:
            return max(0.5, float(said["requests_per_s"]))
        rate *= 2


def _play(
    port: int, sessions: Sequence[Session], warm_s: float = _WARM_S,
    measured_s: float = _MEASURED_S,
) -> dict[str, Any]:  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    answered = asyncio.run(client.play(url, sessions, MODEL, completion, "/v1/completions"))
    return client.measured(answered, warm_s, warm_s + measured_s)


def completion(turn: Turn, model: str) -> dict[str, Any]:
    """A prompt of token ids: as many as the trace says, whatever the tokenizer."""
    ids: list[int] = []
    for stream, end in turn.pieces:
        ids.extend(_ids(stream, end)[len(ids) :])
    return {
        "model": model, "prompt": ids, "max_tokens": min(turn.output_tokens, _MOST_TOKENS),
        "ignore_eos": True, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


@cache
def _ids(stream: int, tokens: int) -> list[int]:
    return random.Random(stream).choices(range(1000, 30_000), k=tokens)

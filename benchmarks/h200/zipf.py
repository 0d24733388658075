"""Ten models on one GPU under a Zipf trace: in a swap group, scaled to zero, or all resident."""

from __future__ import annotations

import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.h200.server import MODEL, RAY, Server, application, serve_run, until
from benchmarks.h200.swaps import Log, ask, up

COUNT = 10
RATE = 0.5
"""Requests per second, at random times (Poisson)."""

SECONDS = 120
PATIENCE_S = 120.0
"""Seconds for which a client waits."""

TERMS = {"min_awake_s": 2, "max_wait_s": 5, "drain_s": 2}


def names() -> list[str]:
    """The models, the one that is asked for most often first."""
    return [MODEL, *(f"m{n}" for n in range(2, COUNT + 1))]


def trace(seed: int = 18) -> list[tuple[float, str]]:
    """When which model is asked: the n-th one as often as the first, over n."""
    chance = random.Random(seed)
    weights = [1 / n for n in range(1, COUNT + 1)]
    at, found = 0.0, []
    while (at := at + chance.expovariate(RATE)) < SECONDS:
        found.append((at, chance.choices(names(), weights)[0]))
    return found


def measure(
    way: str, model: Path, folder: Path, port: int, engine: dict[str, Any], deadline: float
) -> dict[str, Any]:
    """Play the trace: TTFT as clients see it. ``way``: ``swap``, ``zero`` or ``shares``."""
    engine = {**engine, "enforce_eager": True}
    ways: dict[str, dict[str, Any]] = {
        "swap": {"resources": {"swap_group": "zipf", "num_cpus": 0.5}},
        "zero": {
            "resources": {"num_cpus": 0.5},
            "autoscaling": {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 3},
        },
        "shares": {"resources": {"gpu_share": 0.09, "num_cpus": 0.5}},
    }
    if way == "shares":  # its part decides
        engine = {k: v for k, v in engine.items() if k not in _SIZES}
    models = [application(name, model, engine, **ways[way]) for name in names()]
    groups: dict[str, Any] = {"swap_groups": {"zipf": TERMS}} if way == "swap" else {}
    command = serve_run(folder, port, *models, **groups)
    began = time.monotonic()
    server = Server(command, port, folder / f"zipf-{way}.log", **RAY)
    try:
        until(lambda: up(port, COUNT), max(1.0, deadline - time.monotonic()))
        # As long as it takes: a first start compiles, and is longer than clients are patient.
        ask(port, MODEL, 1, max(10.0, deadline - time.monotonic()))
        started = round(time.monotonic() - began, 1)
        asked = [it for it in trace() if time.monotonic() + it[0] + _TO_ANSWER_S < deadline]
        with ThreadPoolExecutor(len(asked) or 1) as pool:
            zero = time.monotonic()
            answers = list(pool.map(lambda it: _answer(port, zero + it[0], it[1], deadline), asked))
        return {"way": way, "all_have_started_s": started, **_told(asked, answers),
                **({"swaps": Log(server).count()} if way == "swap" else {})}  # fmt: skip
    finally:
        server.stop()


_TO_ANSWER_S = 20.0
"""What a request is left at least, where the step's time ends before the trace."""

_SIZES = ("gpu_memory_utilization", "kv_cache_memory_bytes")


def _answer(port: int, at: float, model: str, deadline: float) -> float | None:
    """TTFT of a request that is sent at that time; None without an answer."""
    time.sleep(max(0.0, at - time.monotonic()))
    try:
        return ask(port, model, 32, min(PATIENCE_S, deadline - time.monotonic()))[0]
    except Exception:
        return None


def _told(asked: list[tuple[float, str]], answers: list[float | None]) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        if len(values) < 2:
            return {}
        cuts = statistics.quantiles(values, n=20, method="inclusive")
        return {"p50": round(cuts[9], 3), "p95": round(cuts[18], 3), "max": round(max(values), 3)}

    by_model: dict[str, list[float]] = {}
    for (_, model), ttft in zip(asked, answers, strict=True):
        if ttft is not None:
            by_model.setdefault(model, []).append(ttft)
    return {
        "requests": len(asked),
        "unanswered": answers.count(None),
        "ttft_s": spread([it for it in answers if it is not None]),
        "ttft_s_of_the_first": spread(by_model.get(MODEL, [])),
        "ttft_s_of_the_others": spread(
            [it for model, values in by_model.items() if model != MODEL for it in values]
        ),
    }

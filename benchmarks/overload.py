"""``python -m benchmarks.overload``: ten times as many requests as an engine can run, for a minute.

First as many clients as the engine runs sequences ask one after the other: capacity. Then requests
arrive at ten times the rate at which those were answered, whoever is still being served. Told are
throughput and TTFT of both, how fast refused clients hear of it, and the gateways' memory.

It starts a real ``serve-app run`` on this machine's CPU; ``benchmarks.h200`` measures the same on a
GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from serve_app import lifeline

TIMES = 10
"""So many times the capacity."""


@dataclass(frozen=True)
class Load:
    """What is asked, and of whom."""

    url: str
    model: str
    tokens: int
    capacity: int
    """Sequences that the engine runs at once."""

    seconds: float
    """Of each of the two phases."""

    words: int = 16
    """Of each prompt."""

    def body(self, number: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": f"{number} " + "word " * self.words,
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass
class Seen:
    """What clients saw."""

    ttft_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    """Seconds until a refusal had arrived."""

    statuses: Counter[str] = field(default_factory=Counter)
    done: list[tuple[float, int]] = field(default_factory=list)
    """Of each whole answer: when it ended, by ``time.monotonic``, and its tokens."""

    def add(self, other: Seen) -> None:
        self.ttft_s += other.ttft_s
        self.refused_s += other.refused_s
        self.statuses += other.statuses
        self.done += other.done


def measure(load: Load, session: int, clients: int = 4) -> dict[str, Any]:
    """Both phases. ``clients`` processes ask; ``session`` is that of the server's processes."""
    with ProcessPoolExecutor(clients) as pool:
        _phase(pool, clients, load, rate=0.0, seconds=min(5.0, load.seconds))  # warm
        at_capacity = _phase(pool, clients, load, rate=0.0, seconds=load.seconds)
        rate = TIMES * len(at_capacity.done) / load.seconds
        time.sleep(2)
        before = gateways_mib(session)
        overloaded = _phase(pool, clients, load, rate=rate, seconds=load.seconds)
        after = gateways_mib(session)
    base, over = _figures(at_capacity, load), _figures(overloaded, load)
    return {
        "capacity": load.capacity,
        "arrivals_per_s": round(rate, 1),
        "at_capacity": base,
        "overloaded": over,
        "throughput_ratio": round(over["tokens_per_s"] / base["tokens_per_s"], 3),
        "ttft_p99_ratio": round(over["ttft_ms"]["p99"] / base["ttft_ms"]["p99"], 2),
        "gateway_mib": [round(before), round(after)],
    }


def _phase(
    pool: ProcessPoolExecutor, clients: int, load: Load, *, rate: float, seconds: float
) -> Seen:
    each = [load.capacity // clients + (n < load.capacity % clients) for n in range(clients)]
    asked = [
        pool.submit(_client, load, at_once, rate / clients, seconds, n)
        for n, at_once in enumerate(each)
    ]
    seen = Seen()
    for one in asked:
        seen.add(one.result())
    return seen


def _client(load: Load, at_once: int, rate: float, seconds: float, number: int) -> Seen:
    """In a process of its own: ``at_once`` requests one after the other or, with a ``rate``, so
    many new ones per second."""
    return asyncio.run(_ask_on(load, at_once, rate, seconds, number * 10_000_000))


async def _ask_on(load: Load, at_once: int, rate: float, seconds: float, first: int) -> Seen:
    seen = Seen()
    end = time.monotonic() + seconds
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=600)
    ) as session:
        numbers = iter(range(first, first + 10_000_000))

        async def one_after_the_other() -> None:
            while time.monotonic() < end:
                await _ask(session, load, next(numbers), seen)

        if not rate:
            await asyncio.gather(*(one_after_the_other() for _ in range(at_once)))
            return seen
        running = set()
        due = time.monotonic()
        while (due := due + 1 / rate) < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(_ask(session, load, next(numbers), seen))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
    return seen


async def _ask(session: aiohttp.ClientSession, load: Load, number: int, seen: Seen) -> None:
    began = time.monotonic()
    first = None
    tail = b""
    url = f"{load.url}/v1/completions"
    try:
        async with session.post(url, json=load.body(number)) as answer:
            if answer.status != 200:
                await answer.read()
                seen.refused_s.append(time.monotonic() - began)
                seen.statuses[str(answer.status)] += 1
                return
            async for chunk in answer.content.iter_any():
                if first is None and b"data:" in chunk:
                    first = time.monotonic() - began
                tail = (tail + chunk)[-800:]
    except aiohttp.ClientError as error:
        seen.statuses[type(error).__name__] += 1
        return
    usage = tail.rpartition(b'"completion_tokens":')[2].split(b"}")[0].split(b",")[0]
    if first is None or not usage.strip().isdigit() or b"[DONE]" not in tail:
        seen.statuses["broken"] += 1
        return
    seen.statuses["200"] += 1
    seen.ttft_s.append(first)
    seen.done.append((time.monotonic(), int(usage)))


def _figures(seen: Seen, load: Load) -> dict[str, Any]:
    # From one whole round of answers after the first to the last that began in time.
    times = sorted(seen.done)
    window = times[load.capacity : -load.capacity or None]
    elapsed = window[-1][0] - times[load.capacity - 1][0]
    return {
        "tokens_per_s": round(sum(tokens for _, tokens in window) / elapsed, 1),
        "ttft_ms": _spread(seen.ttft_s),
        "refused_ms": _spread(seen.refused_s) if seen.refused_s else None,
        "statuses": dict(seen.statuses),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    ms = sorted(1000 * s for s in seconds)
    p99 = ms[math.ceil(0.99 * len(ms)) - 1]
    shown = {"min": ms[0], "p50": statistics.median(ms), "p99": p99, "max": ms[-1]}
    return {name: round(value, 1) for name, value in shown.items()}


def gateways_mib(session: int) -> float:
    """Memory (RSS) of all gateway processes in a session of processes, in MiB."""
    total = 0
    for process in psutil.process_iter(["cmdline", "pid"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::ServeReplica:gateway") and os.getsid(process.pid) == session:
            total += process.memory_info().rss
    return total / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload")
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--capacity", type=int, default=8, help="max_num_seqs")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--queue", type=int, default=4, help="queue.max_requests")
    parser.add_argument("--port", type=int, default=18230)
    options = parser.parse_args()
    document = yaml.safe_load(options.config.read_text())
    document["http_options"]["port"] = options.port
    document["applications"] = [
        it for it in document["applications"] if it["name"] in (options.model, "gateway")
    ]
    model, gateway = document["applications"]
    model["args"]["engine"]["max_num_seqs"] = options.capacity
    gateway["args"]["queue"] = {"max_requests": options.queue}
    url = f"http://127.0.0.1:{options.port}"
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        yaml.safe_dump(document, config)
        config.flush()
        command = [str(Path(sys.executable).with_name("serve-app")), "run", config.name]
        run = subprocess.Popen(
            command,
            start_new_session=True,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lifeline.interrupt_with_parent,
        )
        try:
            assert run.stdout
            while "is ready" not in (line := run.stdout.readline()):
                if not line:
                    raise SystemExit("no server came up")
            load = Load(url, options.model, options.tokens, options.capacity, options.seconds)
            found = measure(load, run.pid, clients=1)
        finally:
            run.send_signal(signal.SIGINT)
            run.wait(60)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

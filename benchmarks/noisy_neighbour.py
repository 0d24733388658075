"""``python -m benchmarks.noisy_neighbour``: what one key's flood costs another key.

One key has 50 streams at once, the other asks once a second. The other's TTFT is measured on an
idle engine, behind the flood at vLLM itself, through the gateway without the queue (its replica
does not report, so nothing is held back), and through the gateway with it. The engine is a real
one; its reports are read from its own metrics, twice a second.

Needs the tests' harness: ``PYTHONPATH=.:tests``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from harness.scripted import GatewayProcess
from harness.servers import BareVllm

from serve_app.cluster.exchange import Load
from serve_app.config import keys

SEQUENCES = 8
"""What the engine runs at once."""

STREAMS = 50
_ENGINE = {
    "max_model_len": 2048,
    "max_num_seqs": SEQUENCES,
    "enforce_eager": True,
    "dtype": "float32",
}
_PATH = "/v1/chat/completions"
_GAUGES = {"running": "num_requests_running", "waiting": "num_requests_waiting"}


@dataclass
class Seen:
    """What the clients saw in one arm."""

    ttft_s: list[float] = field(default_factory=list)
    """Of the light key's requests."""

    flood_tokens: int = 0
    seconds: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noisy_neighbour")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--requests", type=int, default=20, help="of the light key, in each arm")
    parser.add_argument("--tokens", type=int, default=48, help="of each request of the flood")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        engine = BareVllm.start(_application(options.model), Path(work))
        try:
            asyncio.run(_measure(options, int(engine.base_url.rpartition(":")[2]), Path(work)))
        finally:
            engine.stop()
    return 0


def _application(model: Path) -> dict[str, Any]:
    args = {
        "model": str(model.resolve()),
        "resources": {"device": "cpu"},
        "engine": _ENGINE,
        "env": {"VLLM_CPU_KVCACHE_SPACE": 1},
    }
    return {"name": "m", "args": args}


async def _measure(options: argparse.Namespace, port: int, work: Path) -> None:
    bare = f"http://127.0.0.1:{port}"
    file, tokens = _keys(work)
    await _arm("warm-up", bare, options, tokens, flood=True, requests=2)
    print(f"{'':28}  TTFT of the light key, ms: min, p50, p95, max    flood tokens/s")
    await _arm("idle, bare", bare, options, tokens, flood=False)
    await _arm("flood, bare", bare, options, tokens, flood=True)
    for reports in (False, True):
        async with _gateway(port, file, reports) as url:
            name = "with" if reports else "without"
            await _arm(f"idle, gateway {name} queue", url, options, tokens, flood=False)
            await _arm(f"flood, gateway {name} queue", url, options, tokens, flood=True)


def _keys(work: Path) -> tuple[Path, dict[str, str]]:
    made = {name: keys.new() for name in ("flood", "light")}
    file = work / "keys.yaml"
    entries = [{"name": name, "hash": hash} for name, (_, hash) in made.items()]
    file.write_text(yaml.safe_dump(entries))
    return file, {name: key for name, (key, _) in made.items()}


@contextlib.asynccontextmanager
async def _gateway(engine: int, keys: Path, reports: bool) -> AsyncIterator[str]:
    async with GatewayProcess(engine, keys={"file": str(keys)}) as gateway:
        reporting = asyncio.create_task(_report(gateway, engine)) if reports else None
        await asyncio.sleep(1)
        yield gateway.base_url
        if reporting:
            reporting.cancel()


async def _report(gateway: GatewayProcess, engine: int) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        while True:
            text = (await client.get(f"http://127.0.0.1:{engine}/metrics")).text
            found: dict[str, Any] = {name: int(_gauge(text, m)) for name, m in _GAUGES.items()}
            usage = _gauge(text, "kv_cache_usage_perc")
            load = Load(capacity=SEQUENCES, kv_cache_usage=usage, **found)
            gateway.board.report("r0", load)
            await asyncio.sleep(0.5)


def _gauge(text: str, name: str) -> float:
    return sum(
        float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"vllm:{name}{{")
    )


async def _arm(
    title: str,
    url: str,
    options: argparse.Namespace,
    tokens: dict[str, str],
    *,
    flood: bool,
    requests: int = 0,
) -> None:
    seen = Seen()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        began = time.perf_counter()
        flooding = [
            asyncio.create_task(_flood(client, n, options.tokens, tokens["flood"], seen))
            for n in range(STREAMS if flood else 0)
        ]
        if flood:
            await asyncio.sleep(5)
        asked = []
        for n in range(requests or options.requests):
            asked.append(asyncio.create_task(_ask(client, n, tokens["light"], seen)))
            await asyncio.sleep(1)
        await asyncio.gather(*asked)
        seen.seconds = time.perf_counter() - began
        for task in flooding:
            task.cancel()
        await asyncio.gather(*flooding, return_exceptions=True)
    if not requests:
        print(f"{title:28}  {_spread(seen.ttft_s)}   {seen.flood_tokens / seen.seconds:14.1f}")
    await asyncio.sleep(2)  # the engine hears that the flood has gone


def _spread(seconds: list[float]) -> str:
    ms = [1000 * s for s in sorted(seconds)]
    p95 = statistics.quantiles(ms, n=20, method="inclusive")[-1]
    shown = (ms[0], statistics.median(ms), p95, ms[-1])
    return " ".join(f"{value:11.0f}" for value in shown)


async def _flood(client: httpx.AsyncClient, n: int, tokens: int, key: str, seen: Seen) -> None:
    while True:
        async for _ in _stream(client, f"Flood {n}: tell me a story.", tokens, key):
            seen.flood_tokens += 1


async def _ask(client: httpx.AsyncClient, n: int, key: str, seen: Seen) -> None:
    began = time.perf_counter()
    first = None
    async for _ in _stream(client, f"Question {n}: where is the lighthouse?", 4, key):
        first = first or time.perf_counter()
    assert first is not None
    seen.ttft_s.append(first - began)


async def _stream(
    client: httpx.AsyncClient, prompt: str, tokens: int, key: str
) -> AsyncIterator[None]:
    """One item for each token."""
    body: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    headers = {"authorization": f"Bearer {key}"}
    async with client.stream("POST", _PATH, json=body, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and _has_text(line):
                yield


def _has_text(line: str) -> bool:
    choices = json.loads(line.removeprefix("data: ")).get("choices")
    return bool(choices and choices[0]["delta"].get("content"))


if __name__ == "__main__":
    raise SystemExit(main())

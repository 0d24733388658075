"""A fleet that has a bit of everything, for how the page looks."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from harness.scripted import GatewayProcess, reported
from scripted_model import Model, words

from serve_app.cluster.exchange import Load

ANSWER = """\
All **four giant planets** have rings:

| Planet | Rings | Made of |
|---|---|---|
| Saturn | bright and wide | ice |
| Jupiter | faint | dust |
| Uranus | narrow and dark | rock and ice |
| Neptune | faint arcs | dust |

```python
ringed = ["Jupiter", "Saturn", "Uranus", "Neptune"]
```
"""

WRONG = (
    "resources.num_gpus is 8, but no node has more than 4 GPUs; set engine.tensor_parallel_size to "
    "4, or add such a node."
)

ABOUT = {
    "llama-3.3-70b": {
        "takes": ["chat", "completions", "tools"],
        "memory": {
            "gpu_gib": 79.2,
            "gpus": 4,
            "parts": {"weights": 33.0, "kv_cache": 34.8, "graphs": 1.1, "other": 2.4},
        },
    },
    "qwen3-vl-8b": {
        "takes": ["chat", "completions", "images", "tools", "reasoning"],
        "memory": {
            "gpu_gib": 79.2,
            "gpus": 1,
            "parts": {"weights": 16.6, "kv_cache": 51.4, "graphs": 0.8, "other": 2.5},
        },
    },
    "bge-m3": {"takes": ["embeddings", "rerank", "score"], "memory": None},
}


@dataclass
class Example:
    gateway: GatewayProcess

    def hour(self) -> list[dict[str, Any]]:
        """Points as the charts keep them: load that comes and goes."""
        now = time.time()
        return [
            {"at": now - 3600 + second, "seconds": 30, "scopes": {"": _point(second)}}
            for second in range(0, 3590, 10)
        ]


def _point(second: int) -> dict[str, Any]:
    load = 0.55 + 0.35 * math.sin(second / 520) + 0.06 * math.sin(second / 37)
    busy = max(0.0, load - 0.7)
    return {
        "generated": 5200 * load,
        "prompt": 9100 * load,
        "ttft50": 0.09 + busy,
        "ttft95": 0.24 + 3 * busy,
        "itl50": 0.011 + 0.01 * load,
        "itl95": 0.019 + 0.02 * load,
        "tpot50": 0.012 + 0.01 * load,
        "tpot95": 0.017 + 0.014 * load,
        "running": round(180 * load),
        "queued": round(160 * busy),
        "waiting": round(9 * load),
        "kv": 0.9 * load,
        "hits": 0.62 + 0.1 * math.sin(second / 300),
        "codes": {"200": 14 * load, "429": 6 * busy},
    }


@contextlib.asynccontextmanager
async def example() -> AsyncIterator[Example]:
    failed = reported(status="DEPLOY_FAILED") | {"message": WRONG, "deployments": {}}
    begins = reported({"served_as": ["coder"]}, status="DEPLOYING")
    begins["deployments"]["ModelServer"]["replicas"] = [
        {"state": "STARTING", "replica_id": "w3k9x2", "start_time_s": time.time() - 42}
    ]
    applications = {
        "llama-3.3-70b": reported({"served_as": ["meta-llama/Llama-3.3-70B-Instruct"]}),
        "qwen3-vl-8b": reported({"adapters": [{"name": "sql", "path": "s3://adapters/sql"}]}),
        "bge-m3": reported(),
        "qwen3-coder-30b": begins,
        "deepseek-v3": failed,
    }
    async with Model(words(ANSWER)) as model, GatewayProcess(applications=applications) as gateway:
        board = gateway.board
        board.forget("m")
        place = (model.host, model.port)
        board.publish(
            "llama-3.3-70b",
            {"7hq2mz": place, "c81ndk": place},
            131072,
            about=ABOUT["llama-3.3-70b"],
        )
        board.publish("qwen3-vl-8b", {"pz40ta": place}, 32768, about=ABOUT["qwen3-vl-8b"])
        board.publish("bge-m3", {"m5xw8e": place}, 8192, about=ABOUT["bge-m3"])
        reports = asyncio.create_task(_report(gateway))
        try:
            yield Example(gateway)
        finally:
            reports.cancel()


async def _report(gateway: GatewayProcess) -> None:
    while True:
        for replica, load in {
            "7hq2mz": Load(58, 3, 64, kv_cache_usage=0.81),
            "c81ndk": Load(49, 0, 64, kv_cache_usage=0.66),
            "pz40ta": Load(21, 0, 128, kv_cache_usage=0.18),
            "m5xw8e": Load(4, 0, 256, kv_cache_usage=0.02),
        }.items():
            gateway.board.report(replica, load)
        await asyncio.sleep(0.5)

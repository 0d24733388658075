"""What clients see, and what becomes of GPU memory, while parts of a server are killed."""

from __future__ import annotations

import signal
import time
from typing import Any

from harness.load import Load

from benchmarks.h200.server import MODEL, Server, gpu_memory_mib, ready, until

WORKER = ("RayWorkerProc", "VLLM::Worker")
ENGINE = ("VLLM::EngineCore",)
REPLICA = (f"ray::ServeReplica:{MODEL}:",)
RAYLET = ("/raylet/raylet",)
OURS = (*WORKER, *ENGINE, *REPLICA)

IDLE_MIB = 2_000
"""Memory in use of a GPU with nothing on it, and to spare."""


def replicas(server: Server) -> int:
    return int(ready(server.port).get("models", {}).get(MODEL, {}).get("replicas", 0))


def hit(server: Server, number: signal.Signals, titles: tuple[str, ...]) -> dict[str, Any]:
    """One of two replicas loses a process under load; until there are two again."""
    before = sum(gpu_memory_mib())
    with Load(f"http://127.0.0.1:{server.port}", MODEL, max_tokens=256) as load:
        if until(lambda: load.streaming_now >= 6, 60) is None:
            return {"failed": "no load"}
        time.sleep(1)
        since = time.monotonic()
        server.processes(*titles)[0].send_signal(number)
        freed = until(lambda: sum(gpu_memory_mib()) < before - 10_000, 90)
        until(lambda: replicas(server) < 2, 60)
        until(lambda: replicas(server) == 2, 240)
        back = time.monotonic() - since
        time.sleep(1)
    lost = load.lost()
    return {
        "requests": len(load.requests),
        "lost": len(lost),
        "lost_before_their_first_byte": sum(not (r.streamed and r.began) for r in lost),
        "errors_after_s": [round((r.ended or 0) - since, 2) for r in lost],
        "endings": sorted({r.text[:160] for r in lost}),
        "gpu_memory_free_after_s": freed,
        "two_replicas_again_after_s": round(back, 1),
    }


def gone(server: Server, number: signal.Signals, titles: tuple[str, ...]) -> dict[str, Any]:
    """The server itself is killed: seconds until no engine is left and GPU memory is free."""
    server.processes(*titles)[0].send_signal(number)
    since = time.monotonic()
    no_engine = until(lambda: not server.processes(*ENGINE, *WORKER), 60)
    free = until(lambda: max(gpu_memory_mib()) < IDLE_MIB, 30)
    left = [" ".join(p.cmdline())[:80] for p in server.processes(*OURS)]
    return {
        "no_engine_or_worker_after_s": no_engine,
        "gpu_memory_free_after_s": None if free is None else round(time.monotonic() - since, 2),
        "left": left,
    }

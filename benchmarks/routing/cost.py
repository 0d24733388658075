"""What the choice of a replica costs a gateway's event loop: ``python -m benchmarks.routing.cost``.

CPU time of this thread, from a request's body to the replica: its key and the choice. Conversations
of text, 20 at once on each of so many replicas; half of the calls come back to a known prefix.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from types import SimpleNamespace
from typing import Any, cast

from serve_app.cluster.exchange import Load, Usage
from serve_app.gateway.replicas import FrontEnd, Replica
from serve_app.gateway.routing import prefix
from serve_app.gateway.routing.choice import CacheAware
from serve_app.gateway.stages import Call

REPLICAS = (2, 8, 64)
SIZES_KB = (2, 20, 100)
CALLS = 2000
_WORDS = [f"word{n}" for n in range(5000)]


def main() -> None:
    print("| replicas | prompt, kB | key, ms: p50 | p99 | choice, ms: p50 | p99 | both, p99 |")
    print("|---|---|---|---|---|---|---|")
    for replicas in REPLICAS:
        for size in SIZES_KB:
            keys, choices = measured(replicas, size * 1000)
            both = [key + choice for key, choice in zip(keys, choices, strict=True)]
            shown = [_p50(keys), _p99(keys), _p50(choices), _p99(choices), _p99(both)]
            print(f"| {replicas} | {size} | " + " | ".join(f"{it:.3f}" for it in shown) + " |")


def measured(replicas: int, size: int) -> tuple[list[float], list[float]]:
    """Milliseconds that each of :data:`CALLS` calls takes: for its key, and for the choice."""
    chance = random.Random(1)
    front_ends = [FrontEnd(f"r{n}", "h", 1, Replica(f"r{n}")) for n in range(replicas)]
    for it in front_ends:
        it.replica.report(Load(20, 0, 256, 0.3, prefix_cache_tokens=400_000))
    policy = CacheAware(remembered=1.0)  # so that the index is soon full
    running: list[tuple[str, FrontEnd]] = []
    bases = [_text(chance, size * 4 // 5) for _ in range(replicas * 4)]
    keys, choices = [], []
    for n in range(CALLS):
        known = chance.random() < 0.5
        text = chance.choice(bases) if known else _text(chance, size * 4 // 5)
        call = _call(str(n), text, _text(chance, size // 5))
        began = time.thread_time()
        prompt = prefix.of(call, media=False)
        keyed = time.thread_time()
        front_end = policy.choose(call.id, prompt, front_ends)
        chosen = time.thread_time()
        keys.append(1000 * (keyed - began))
        choices.append(1000 * (chosen - keyed))
        front_end.began()
        running.append((call.id, front_end))
        if len(running) > 20 * replicas:
            id, its = running.pop(0)
            policy.first_byte(id)
            its.ended()
            policy.ended(id)
            policy.used(id, Usage(size // 4, size // 8, 200))
    return keys, choices


def _call(id: str, shared: str, own: str) -> Call:
    body = {
        "model": "m",
        "messages": [{"role": "system", "content": shared}, {"role": "user", "content": own}],
        "stream": True,
    }
    request = SimpleNamespace(
        body=json.dumps(body).encode(), headers=[], path="/v1/chat/completions"
    )
    model = SimpleNamespace(name="m", adapters=())
    return cast(Call, cast(Any, SimpleNamespace(id=id, request=request, model=model, model_id="m")))


def _text(chance: random.Random, size: int) -> str:
    return " ".join(chance.choices(_WORDS, k=size // 8 + 1))[:size]


def _p50(values: list[float]) -> float:
    return statistics.median(values)


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


if __name__ == "__main__":
    main()

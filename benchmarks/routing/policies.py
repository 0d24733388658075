"""The policies that the simulator compares: the gateway's own, and others'."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.routing.engine import BLOCK, Request
from benchmarks.routing.fleet import Asked, Policy
from benchmarks.routing.peers import CacheAware
from serve_app.gateway.policy import FewestRequests
from serve_app.gateway.replicas import FrontEnd


class _Told:
    """A policy that learns nothing from what becomes of its requests."""

    waits = True

    def first_byte(self, asked: Asked) -> None: ...

    def ended(self, asked: Asked, request: Request) -> None: ...


class RoundRobin(_Told):
    def __init__(self, seed: int) -> None:
        self._next = seed

    def choose(self, live: list[FrontEnd], asked: Asked) -> FrontEnd:
        self._next += 1
        return live[self._next % len(live)]


class LeastLoaded(_Told):
    def __init__(self, seed: int) -> None:
        self._policy = FewestRequests()

    def choose(self, live: list[FrontEnd], asked: Asked) -> FrontEnd:
        call: Any = None
        return self._policy.choose(live, call)


class VllmRouter(_Told):
    """Its cache_aware. It has no queue: what it gets goes to an engine at once."""

    waits = False

    def __init__(self, seed: int) -> None:
        self._policy = CacheAware()

    def choose(self, live: list[FrontEnd], asked: Asked) -> FrontEnd:
        blocks = asked.blocks[: asked.turn.prompt_tokens // BLOCK]
        at, asked.reason, matched = self._policy.choose([it.inflight for it in live], blocks)
        asked.predicted_tokens = matched * BLOCK
        return live[at]


POLICIES: dict[str, Callable[[int], Policy]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "vllm-router cache_aware": VllmRouter,
}
"""By name; each makes the policy of one gateway from a seed."""


def of(name: str, gateways: int, seed: int) -> Sequence[Policy]:
    random.seed(seed)  # FewestRequests breaks ties by it
    return [POLICIES[name](seed + n) for n in range(gateways)]

"""The policies that the simulator compares: the gateway's own, and others'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from benchmarks.routing import peers, traces
from benchmarks.routing.engine import BLOCK, Request
from benchmarks.routing.fleet import Asked, Policy
from serve_app.cluster.exchange import Usage
from serve_app.gateway.policy import FewestRequests
from serve_app.gateway.replicas import FrontEnd, Replica
from serve_app.gateway.routing import choice, prefix


class _Told:
    """A policy that learns nothing from what becomes of its requests."""

    waits = True
    tells = False

    def waits_for(
        self, live: list[FrontEnd], asked: Asked, full: Mapping[Replica, int]
    ) -> tuple[Replica, float] | None:
        return None

    def first_byte(self, asked: Asked) -> None: ...

    def ended(self, asked: Asked, request: Request) -> None: ...

    def heard(self, replica: Replica, asked: Asked) -> None: ...


class RoundRobin(_Told):
    def __init__(self, seed: int, now: Callable[[], float]) -> None:
        self._next = seed

    def choose(self, live: list[FrontEnd], asked: Asked) -> FrontEnd:
        self._next += 1
        return live[self._next % len(live)]


class LeastLoaded(_Told):
    def __init__(self, seed: int, now: Callable[[], float]) -> None:
        self._policy = FewestRequests()

    def choose(self, live: list[FrontEnd], asked: Asked) -> FrontEnd:
        call: Any = None
        return self._policy.choose(live, call)


class CacheAware:
    """The gateway's own."""

    waits = tells = True

    def __init__(self, seed: int, now: Callable[[], float], **constants: Any) -> None:
        self._policy = choice.CacheAware(now=now, **constants)

    def choose(self, live: list[FrontEnd], asked: Asked) -> FrontEnd:
        chosen = self._policy.choose(str(asked.rank), _prompt(asked), live)
        asked.reason = self._policy.reason
        return chosen

    def waits_for(
        self, live: list[FrontEnd], asked: Asked, full: Mapping[Replica, int]
    ) -> tuple[Replica, float] | None:
        return self._policy.waits_for(_prompt(asked), live, full)

    def first_byte(self, asked: Asked) -> None:
        self._policy.first_byte(str(asked.rank))

    def ended(self, asked: Asked, request: Request) -> None:
        self._policy.ended(str(asked.rank))
        usage = Usage(request.prompt_tokens, request.cached_tokens, request.output_tokens)
        if believed := self._policy.used(str(asked.rank), usage):
            asked.predicted_tokens = round(believed.cached)

    def heard(self, replica: Replica, asked: Asked) -> None:
        self._policy.heard(replica, _prompt(asked).blocks)


def _prompt(asked: Asked) -> prefix.Prompt:
    if asked.memory is None:
        turn = asked.turn
        of_block = prefix.BLOCK // traces.BYTES_PER_TOKEN
        numbers = traces.blocks(turn.pieces, turn.prompt_tokens, of_block)
        blocks = tuple(number.to_bytes(8, "big") for number in numbers)
        asked.memory = prefix.Prompt(blocks, turn.prompt_tokens * traces.BYTES_PER_TOKEN)
    return cast(prefix.Prompt, asked.memory)


class VllmRouter(_Told):
    """Its cache_aware. It has no queue: what it gets goes to an engine at once."""

    waits = False

    def __init__(self, seed: int, now: Callable[[], float]) -> None:
        self._policy = peers.CacheAware()

    def choose(self, live: list[FrontEnd], asked: Asked) -> FrontEnd:
        blocks = asked.blocks[: asked.turn.prompt_tokens // BLOCK]
        at, asked.reason, matched = self._policy.choose([it.inflight for it in live], blocks)
        asked.predicted_tokens = matched * BLOCK
        return live[at]


Make = Callable[[int, Callable[[], float]], Policy]
"""Makes the policy of one gateway, from a seed and the clock."""

OURS, ROUND_ROBIN, THEIRS = "cache_aware", "round_robin", "vllm-router cache_aware"

POLICIES: dict[str, Make] = {
    OURS: CacheAware,
    ROUND_ROBIN: RoundRobin,
    "least_loaded": LeastLoaded,
    THEIRS: VllmRouter,
}
"""By name."""

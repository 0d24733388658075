"""The actor by which several gateways know what each key has taken at the others.

There is one for the cluster, on its head. It adds up and decides nothing: each gateway limits by
its own count and that of the others. A new actor knows all again once each gateway has told it, and
what was taken today it reads back from Ray's GCS, also for gateways that have ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from serve_app.cluster import kv

logger = logging.getLogger("ray.serve")

Counted = dict[str, dict[str, dict[int, float]]]
"""What was taken: by key (and model), by limit, by bucket of time."""

DAILY = "tokens_per_day"
"""The limit whose counts are kept when gateways and the actor end."""

DAY_S = 86400.0
"""Seconds of one of its buckets."""

LIVE_S = 5.0
"""Seconds of silence after which a gateway counts as gone, and its running requests with it."""

_NAME = "serve_app_limits_1"
"""With a number to raise when gateways of two versions would not understand each other."""

_ROUNDING = 1e-6
"""Below this, a difference is one of floating-point numbers."""

_SAVED = "limits/days"
_SAVE_S = 2.0
_IDLE_S = 600.0

Told = dict[str, msgspec.Raw]
"""The same, with the limits of each key still encoded."""

encode = msgspec.msgpack.encode
decode = msgspec.msgpack.Decoder(Counted).decode
decode_told = msgspec.msgpack.Decoder(Told).decode
decode_limits = msgspec.msgpack.Decoder(dict[str, dict[int, float]]).decode


class Sums:
    """What each gateway told last, and the sums."""

    def __init__(self, days: Mapping[str, Counted]) -> None:
        """``days`` is what :meth:`days` was, by gateway."""
        self._counted: dict[str, Counted] = {}
        self._told_at: dict[str, float] = {}
        self._all: Counted = {}
        """The sum of what all told, so that an exchange costs the same with many gateways."""

        for gateway, counted in days.items():
            self._tell(gateway, counted)

    def exchange(self, gateway: str, counted: Counted, now: float) -> tuple[Counted, int]:
        """Take all that a gateway has counted; return the others' sum, and how many are live.

        ``now`` is in seconds since the epoch.
        """
        self._tell(gateway, counted)
        self._told_at[gateway] = now
        live = {id for id, told in self._told_at.items() if now - told < LIVE_S}
        for id in self._counted.keys() - live:
            self._tell(id, _of_today(self._counted[id], now))
            self._told_at.pop(id, None)
            if not self._counted[id]:
                del self._counted[id]
        return _less(self._all, counted), len(live)

    def days(self, now: float) -> dict[str, Counted]:
        """What is to outlive the actor."""
        found = {id: _of_today(counted, now) for id, counted in self._counted.items()}
        return {id: counted for id, counted in found.items() if counted}

    def _tell(self, gateway: str, counted: Counted) -> None:
        """Put it in the place of what the gateway told before."""
        before = self._counted.get(gateway, {})
        changed = [it for it in before.keys() | counted.keys() if before.get(it) != counted.get(it)]
        for scope in changed:
            mine = _less({scope: self._all.get(scope, {})}, before)
            _add(mine, {scope: counted.get(scope, {})})
            self._all.pop(scope, None)
            self._all.update({it: limits for it, limits in mine.items() if limits})
        self._counted[gateway] = counted


def _of_today(counted: Counted, now: float) -> Counted:
    today = int(now // DAY_S)
    return {
        scope: {DAILY: {today: limits[DAILY][today]}}
        for scope, limits in counted.items()
        if today in limits.get(DAILY, {})
    }


def _add(sums: Counted, more: Counted) -> None:
    for scope, limits in more.items():
        for limit, taken in limits.items():
            into = sums.setdefault(scope, {}).setdefault(limit, {})
            for bucket, amount in taken.items():
                into[bucket] = into.get(bucket, 0.0) + amount


def _less(sums: Counted, part: Counted) -> Counted:
    """The sums without a part of them; what is nothing then is left out."""
    left: Counted = {}
    for scope, limits in sums.items():
        mine = part.get(scope, {})
        for limit, taken in limits.items():
            own = mine.get(limit, {})
            rest = {
                bucket: others
                for bucket, amount in taken.items()
                if (others := amount - own.get(bucket, 0.0)) > _ROUNDING
            }
            if rest:
                left.setdefault(scope, {})[limit] = rest
    return left


class LimitsActor:
    """The actor; its process is named after it."""

    def __init__(self) -> None:
        saved = kv.get(_SAVED)
        self._sums = Sums(msgspec.msgpack.decode(saved, type=dict[str, Counted]) if saved else {})
        self._saved = saved
        self._asked = 0.0
        self._saving: asyncio.Task[None] | None = None

    async def exchange(self, gateway: str, counted: bytes) -> tuple[bytes, int]:
        self._asked = time.time()
        self._saving = self._saving or asyncio.create_task(self._save())
        others, live = self._sums.exchange(gateway, decode(counted), self._asked)
        return encode(others), live

    async def _save(self) -> None:
        """Save for ever, until no gateway asks any more."""
        while time.time() - self._asked < _IDLE_S:
            await asyncio.sleep(_SAVE_S)
            days = encode(self._sums.days(time.time()))
            if days != self._saved:
                try:
                    await asyncio.to_thread(kv.put, _SAVED, days)
                    self._saved = days
                except Exception as error:  # the GCS is away; the next time
                    logger.warning(f"the tokens of today are not saved: {error!r}")
        import ray

        ray.kill(ray.get_runtime_context().current_actor)


class Coordinator:
    """A gateway's way to the actor."""

    def __init__(self) -> None:
        """Find the actor, or start it. Blocks while Ray does."""
        import ray

        remote: Any = ray.remote(LimitsActor)
        self._actor = remote.options(
            name=_NAME,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            # On another node it would keep the autoscaler from removing it.
            resources={"node:__internal_head__": 0.001},
        ).remote()

    async def exchange(self, gateway: str, counted: Counted) -> tuple[Told, int]:
        """See :meth:`Sums.exchange`. Raises whatever Ray does where the actor is away."""
        others, live = await self._actor.exchange.remote(gateway, encode(counted))
        return decode_told(others), live

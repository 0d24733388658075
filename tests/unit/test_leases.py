"""Limits at several gateways: what they admit together, and what happens while nobody adds up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from harness.scripted import until

from serve_app.cluster import limits_actor
from serve_app.cluster.limits_actor import (
    DAILY,
    DAY_S,
    LIVE_S,
    Counted,
    Sums,
    Told,
    decode,
    decode_told,
    encode,
)
from serve_app.gateway import leases
from serve_app.gateway.leases import AT_ONCE, LIMITS, REQUESTS, TODAY, TOKENS, Counts, Leases, Limit

NOON = 19_700 * DAY_S + 43200.0


class Gateways:
    """Several gateways that exchange their counts when a test says so."""

    def __init__(self, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = NOON
        self.sums = Sums({})
        self.counts = [Counts() for _ in range(number)]
        monkeypatch.setattr(leases.time, "monotonic", lambda: self.now)

    def exchange(self, *which: int) -> None:
        """One after the other: the first does not hear what the others took since they told."""
        for n in which or range(len(self.counts)):
            self.counts[n].heard(*self.ask(f"g{n}", self.counts[n].report(self.now)))

    def ask(self, gateway: str, counted: Counted) -> tuple[Told, int]:
        others, live = self.sums.exchange(gateway, decode(encode(counted)), self.now)
        return decode_told(encode(others)), live

    def admitted(self, n: int, limit: Limit, most: float, amount: float = 1.0) -> bool:
        """Whether a gateway takes a request."""
        if self.counts[n].room("a", limit, most, amount, self.now).wait:
            return False
        self.counts[n].take("a", limit, amount, self.now)
        return True

    def flood(self, n: int, limit: Limit, most: float, amount: float = 1.0) -> int:
        """How many requests in a row a gateway takes."""
        return next(k for k in range(10**6) if not self.admitted(n, limit, most, amount))


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateways]:
    gateways = Gateways(4, monkeypatch)
    gateways.exchange()
    gateways.exchange()
    yield gateways


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.setting)
def test_a_flood_at_all_gateways_overshoots_by_less_than_a_lease_of_each(
    four: Gateways, limit: Limit
) -> None:
    took = []
    for _ in range(8):
        took.append(sum(four.flood(n, limit, 100) for n in range(4)))
        four.exchange()
    assert took[0] == 100
    assert sum(took[1:]) < 50  # theirs were 18, 12, 6 and 0
    assert took[2:] == [0] * 6


def test_an_exchange_costs_the_same_with_many_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gateway exchanges twice a second: what all cost grows with their number, not with its
    square."""
    added: list[int] = []

    def counted_(sums: Counted, more: Counted) -> None:
        added.append(len(more))
        add(sums, more)

    add = limits_actor._add
    monkeypatch.setattr(limits_actor, "_add", counted_)
    sums = Sums({})
    told = {f"key-{n}": {REQUESTS.setting: {1: 2.0}} for n in range(5)}
    cost = []
    for gateway in range(20):
        added.clear()
        others, live = sums.exchange(f"g{gateway}", told, NOON)
        cost.append(sum(added))
        assert live == gateway + 1
        assert others == {key: {REQUESTS.setting: {1: 2.0 * gateway}} for key in told if gateway}
    assert max(cost) == 5
    added.clear()
    more = told | {"key-3": {REQUESTS.setting: {1: 3.0, 2: 1.0}}}
    others, _ = sums.exchange("g0", more, NOON)
    assert sum(added) == 1 and others["key-3"] == {REQUESTS.setting: {1: 38.0}}
    others, _ = sums.exchange("g1", told, NOON)
    assert others["key-3"] == {REQUESTS.setting: {1: 39.0, 2: 1.0}}


def test_a_flood_at_one_gateway_gets_all_of_the_limit(four: Gateways) -> None:
    took = []
    for _ in range(4):
        took.append(four.flood(0, REQUESTS, 100))
        four.exchange()
    assert took == [25, 18, 57, 0]
    assert [four.flood(n, REQUESTS, 100) for n in range(4)] == [0, 0, 0, 0]


def test_a_key_that_moves_to_another_gateway_takes_what_is_left_there(four: Gateways) -> None:
    for _ in range(4):
        assert four.flood(0, REQUESTS, 100, 10) <= 6
        four.exchange()
    four.now += 65
    four.exchange()
    four.exchange()
    took = 0
    for _ in range(40):
        took += four.flood(1, REQUESTS, 100)
        four.exchange()
    assert took == 50  # the other half of what was taken before still counts


def test_each_gateway_has_room_for_one_request_that_is_larger_than_its_share(
    four: Gateways,
) -> None:
    assert [four.flood(n, TOKENS, 100, 60) for n in range(4)] == [1, 1, 1, 1]
    four.exchange()
    four.exchange()
    assert [four.flood(n, TOKENS, 100, 1) for n in range(4)] == [0, 0, 0, 0]


def test_the_wait_counts_what_the_others_took(four: Gateways) -> None:
    four.counts[0].take("a", REQUESTS, 100, four.now)
    four.exchange()
    four.exchange()
    assert four.counts[1].room("a", REQUESTS, 100, 1, four.now).left == 0
    assert four.counts[1].room("a", REQUESTS, 100, 50, four.now).wait == pytest.approx(65)
    four.now += 66
    four.exchange()
    assert four.admitted(1, REQUESTS, 100)


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.setting)
def test_without_the_actor_each_goes_on_with_its_share(four: Gateways, limit: Limit) -> None:
    took = 0
    for _ in range(3):
        four.exchange()
        took += four.flood(0, limit, 100)
    assert took == 100  # all is the share of the first
    if limit is AT_ONCE:  # the others' windows fade; these end one by one
        four.counts[0].correct("a", AT_ONCE, 0, -took, four.now)
    four.now += DAY_S if limit is TODAY else 100  # and no exchange any more
    assert [four.flood(n, limit, 100) for n in range(4)] == [100, 25, 25, 25]
    assert [four.flood(n, limit, 100) for n in range(4)] == [0, 0, 0, 0]


def test_what_a_gone_gateway_ran_does_not_count_but_what_it_took_does(four: Gateways) -> None:
    for limit in (AT_ONCE, REQUESTS, TODAY):
        four.counts[0].take("a", limit, 7, four.now)
    four.exchange()
    four.exchange()
    left = [four.counts[1].room("a", x, 10, 1, four.now).left for x in (AT_ONCE, REQUESTS, TODAY)]
    assert left == [3, 3, 3]
    four.now += LIVE_S + 1
    four.exchange(1, 2, 3)
    four.exchange(1)
    left = [four.counts[1].room("a", x, 10, 1, four.now).left for x in (AT_ONCE, TODAY)]
    assert left == [10, 3]
    assert four.counts[1]._live == 3


def test_a_day_outlives_the_actor_and_all_gateways(four: Gateways) -> None:
    four.counts[0].take("a", TODAY, 600, four.now)
    four.counts[1].take("a/m", TODAY, 30, four.now)
    four.counts[1].take("a", REQUESTS, 1, four.now)
    four.exchange()
    kept = four.sums.days(four.now)
    day = int(four.now // DAY_S)
    assert kept == {"g0": {"a": {DAILY: {day: 600}}}, "g1": {"a/m": {DAILY: {day: 30}}}}
    four.sums = Sums(kept)
    four.exchange(0)  # one that went on counts once
    new = Counts()
    new.heard(*four.ask("new", {}))
    assert new.room("a", TODAY, 1000, 1, four.now).left == 400
    four.now += DAY_S
    new.heard(*four.ask("new", {}))
    assert new.room("a", TODAY, 1000, 1, four.now).left == 1000
    assert four.sums.days(four.now) == {}


def test_what_does_not_count_any_more_is_forgotten() -> None:
    counts = Counts()
    for limit in (REQUESTS, TOKENS, AT_ONCE, TODAY):
        counts.take("a", limit, 5, NOON)
    counts.correct("a", AT_ONCE, 0, -5, NOON)
    assert counts.report(NOON + 80)["a"].keys() >= {DAILY}
    assert counts.report(NOON + DAY_S) == {}
    counts.correct("a", REQUESTS, int(NOON // 10), -5, NOON + DAY_S)
    assert counts.report(NOON + DAY_S) == {}


class Away:
    """A coordinator that fails or hangs as told."""

    def __init__(self) -> None:
        self.fails: Exception | None = None
        self.hangs = False
        self.told: list[Counted] = []

    async def exchange(self, gateway: str, counted: Counted) -> tuple[Told, int]:
        if self.hangs:
            await asyncio.Event().wait()
        if self.fails:
            raise self.fails
        self.told.append(decode(encode(counted)))
        return decode_told(encode({"a": {REQUESTS.setting: {int(NOON // 10): 9.0}}})), 2


async def test_a_failed_exchange_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "EVERY_S", 0.01)
    monkeypatch.setattr(leases, "_TIMEOUT_S", 0.01)
    away, counts, wanted, connected = Away(), Counts(), [False], []

    def connect() -> Any:
        connected.append(1)
        return away

    counts.take("a", TODAY, 1, leases.time.time())
    running = asyncio.create_task(Leases(counts, connect, lambda: wanted[0]).run())
    await asyncio.sleep(0.05)
    assert connected == []  # without limits there is no actor
    wanted[0] = True
    away.fails = RuntimeError("dead")
    assert await until(lambda: len(connected) > 2)
    away.fails, away.hangs = None, True
    before = len(connected)
    assert await until(lambda: len(connected) > before + 2)
    assert away.told == []
    away.hangs = False
    assert await until(lambda: counts.room("a", REQUESTS, 10, 1, NOON).left == 1)
    assert away.told[0]["a"].keys() == {DAILY}
    running.cancel()


async def test_an_actor_that_still_starts_is_not_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leases, "EVERY_S", 0.01)
    monkeypatch.setattr(leases, "_TIMEOUT_S", 0.01)
    away, counts, tries = Away(), Counts(), []

    def connect() -> Any:
        tries.append(1)
        return away

    async def tried(times: int) -> bool:
        before = len(tries)
        return bool(await until(lambda: len(tries) > before + times))

    away.hangs = True
    running = asyncio.create_task(Leases(counts, connect, lambda: True).run())
    assert await tried(3)
    assert caplog.messages == []
    away.hangs = False
    assert await until(lambda: counts._exchanges > 0)
    away.hangs = True  # from now on it is
    assert await tried(3)
    assert caplog.messages == ["the limits' actor is away: TimeoutError()"]
    running.cancel()

    caplog.clear()
    monkeypatch.setattr(leases, "_START_S", 0.0)
    running = asyncio.create_task(Leases(Counts(), connect, lambda: True).run())
    assert await tried(3)
    assert caplog.messages == ["the limits' actor is away: TimeoutError()"]
    running.cancel()

    caplog.clear()
    away.hangs, away.fails = False, RuntimeError("no head")  # no wait, but a reason
    running = asyncio.create_task(Leases(Counts(), connect, lambda: True).run())
    assert await tried(3)
    assert caplog.messages == ["the limits' actor is away: RuntimeError('no head')"]
    running.cancel()

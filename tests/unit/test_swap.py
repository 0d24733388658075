"""Who of a swap group is awake: the decisions alone, then members and coordinators that fail at any
moment, with a lock for each slot as the kernel has it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from harness.scripted import until
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.cluster import swap_actor
from serve_app.cluster.swap import LISTEN_S, LIVE_S, Group, Order, Report
from serve_app.config.document import MODEL_IMPORT_PATH
from serve_app.config.settings import SwapGroup

TERMS = SwapGroup(awake=1, min_awake_s=10, max_wait_s=30, drain_s=5)


def decided(*reports: Report, terms: SwapGroup = TERMS, now: float = 100.0) -> dict[str, Order]:
    """The orders that a coordinator gives on these reports."""
    group = Group("c", 0.0)
    for report in reports:
        group.report(report, now)
    group.decide(terms, now)
    return {it.member: order for it in reports if (order := group.order(it.member))}


def awake(
    member: str, slot: int = 0, *, busy: bool = True, s: float = 100, cost: float = 1
) -> Report:
    return Report(member, "awake", slot, busy=busy, awake_s=s, evict_cost=cost)


def asleep(member: str, wants_s: float | None = None) -> Report:
    return Report(member, "asleep", wants_s=wants_s)


def test_a_free_slot_goes_to_who_has_waited_longest() -> None:
    orders = decided(asleep("a", 1), asleep("b", 5), asleep("c"))
    assert set(orders) == {"b"}
    assert orders["b"].wake and orders["b"].slot == 0


def test_nobody_is_sent_to_sleep_for_nobody() -> None:
    assert decided(awake("a"), asleep("b")) == {}
    assert decided(awake("a", busy=False), asleep("b")) == {}


def test_a_model_that_has_loaded_sleeps_once_when_nobody_asks_for_it() -> None:
    loaded = replace(awake("a", busy=False, s=3), slept=False)
    orders = decided(loaded, asleep("b"))
    assert not orders["a"].wake and orders["a"].slot == 0
    assert decided(replace(loaded, busy=True), asleep("b")) == {}
    assert decided(replace(loaded, slept=True), asleep("b")) == {}


def test_an_idle_model_sleeps_as_soon_as_another_is_asked_for() -> None:
    orders = decided(awake("a", busy=False, s=0), asleep("b", 0))
    assert not orders["a"].wake and orders["a"].drain_s == TERMS.drain_s
    assert "b" not in orders  # its slot is not free yet


@pytest.mark.parametrize(("awake_s", "wants_s", "swaps"), [
    (100, 29, False), (100, 30, True), (9, 100, False), (10, 100, True),
])  # fmt: skip
def test_a_busy_model_sleeps_when_it_had_its_time_and_another_has_waited(
    awake_s: float, wants_s: float, swaps: bool
) -> None:
    assert ("a" in decided(awake("a", s=awake_s), asleep("b", wants_s))) is swaps


def test_the_time_since_the_reports_counts() -> None:
    group = Group("c", 0.0)
    group.report(awake("a", s=8), 100)
    group.report(asleep("b", 28), 100)
    group.decide(TERMS, 101)
    assert group.order("a") is None
    group.decide(TERMS, 102)
    assert group.order("a") is not None


def test_the_cheapest_to_evict_sleeps() -> None:
    two = TERMS.model_copy(update={"awake": 2})
    orders = decided(awake("a", 0, cost=2), awake("b", 1, cost=1), asleep("c", 99), terms=two)
    assert set(orders) == {"b"}
    orders = decided(awake("a", 0, s=50), awake("b", 1, s=60), asleep("c", 99), terms=two)
    assert set(orders) == {"b"}  # at the same cost, the one that woke first


def test_two_that_want_get_two_slots_and_a_third_makes_one_more_sleep() -> None:
    two = TERMS.model_copy(update={"awake": 2})
    orders = decided(awake("a", 0, busy=False), asleep("b", 5), asleep("c", 4), terms=two)
    assert {k: (it.wake, it.slot) for k, it in orders.items()} == {"b": (True, 1), "a": (False, 0)}


def test_one_that_falls_asleep_is_enough_for_one_that_waits() -> None:
    two = TERMS.model_copy(update={"awake": 2})
    falling = Report("a", "falling", 0)
    assert decided(falling, awake("b", 1, busy=False), asleep("c", 99), terms=two) == {}
    orders = decided(
        falling, awake("b", 1, busy=False), asleep("c", 99), asleep("d", 98), terms=two
    )
    assert set(orders) == {"b"}


def test_fewer_slots_than_before_are_left_by_whoever_has_one_too_many() -> None:
    orders = decided(awake("a", 0), awake("b", 1))
    assert set(orders) == {"b"} and not orders["b"].wake


def test_a_new_coordinator_listens_first() -> None:
    group = Group("c", 100.0)
    group.report(asleep("b", 50), 100)
    group.decide(TERMS, 100 + LISTEN_S - 0.1)
    assert group.order("b") is None
    group.report(awake("a"), 101)
    group.decide(TERMS, 100 + LISTEN_S)
    assert group.order("b") is None and group.order("a") is not None


def test_an_order_stands_until_it_is_heard_and_is_given_once() -> None:
    group = Group("c", 0.0)
    group.report(asleep("b", 5), 100)
    group.decide(TERMS, 100)
    order = group.order("b")
    assert order
    group.report(asleep("b", 6), 101)  # sent before it heard
    group.report(asleep("c", 50), 101)
    group.decide(TERMS, 101)
    assert group.order("b") == order and group.order("c") is None
    group.report(Report("b", "waking", 0, heard=order.id), 102)
    group.decide(TERMS, 102)
    assert group.order("b") is None and group.order("c") is None


def test_a_silent_member_is_gone_and_its_slot_is_free() -> None:
    group = Group("c", 0.0)
    group.report(awake("a"), 100)
    group.report(asleep("b", 0), 100 + LIVE_S)
    group.decide(TERMS, 100 + LIVE_S)
    order = group.order("b")
    assert order and order.wake and not group.empty
    group.decide(TERMS, 200)
    assert group.empty


# --- at every step, anything may fail -----------------------------------------------------


@dataclass
class Played:
    """A member as :mod:`serve_app.replica.swap` is one, with its lock's file a key of ``locks``."""

    name: str
    locks: dict[int, str]
    state: str = "asleep"
    slot: int | None = None
    heard: str = ""
    since: float = 0.0
    loaded: bool = False
    slept: bool = False
    requests: list[float] = field(default_factory=list)
    """When each of them came."""

    def report(self, now: float) -> Report:
        wants = None
        if not self.loaded:
            wants = now - self.since
        elif self.state == "asleep" and self.requests:
            wants = now - min(self.requests)
        awake_s = now - self.since if self.state == "awake" else 0.0
        return Report(
            self.name, self.state, self.slot, wants,  # type: ignore[arg-type]
            busy=bool(self.requests), awake_s=awake_s, slept=self.slept, heard=self.heard,
        )  # fmt: skip

    def hear(self, order: Order) -> None:
        if order.id == self.heard:
            return
        self.heard = order.id
        if order.wake and self.state == "asleep":
            self.state, self.slot = "waking", order.slot
        elif not order.wake and self.state == "awake":
            self.state = "falling"

    def go_on(self, now: float) -> None:
        """End what it is doing."""
        if self.state == "waking":
            assert self.slot is not None
            if self.locks.setdefault(self.slot, self.name) == self.name:
                self.state, self.since, self.loaded = "awake", now, True
            elif self.loaded:  # one that is to load waits for the lock
                self.state, self.slot = "asleep", None
        elif self.state == "falling":
            self._unlock()
            self.state, self.slot, self.since, self.slept = "asleep", None, now, True
        elif self.state == "awake":
            self.requests.clear()

    def die(self, now: float) -> Played:
        """The kernel frees its locks; Serve starts another."""
        self._unlock()
        return Played(self.name + "'", self.locks, since=now)

    def _unlock(self) -> None:
        for slot in [it for it, of in self.locks.items() if of == self.name]:
            del self.locks[slot]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["report", "report", "late", "go on", "go on", "request", "time", "die", "new", "old"]
        ),
        st.integers(0, 2),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(1, 2), st.randoms(use_true_random=False))
def test_whatever_fails_no_slot_has_two_and_whoever_waits_is_woken(
    steps: list[tuple[str, int]], slots: int, chance: random.Random
) -> None:
    """Members die, coordinators are replaced, old ones go on giving orders, and answers are late:
    the locks hold; and once nothing fails any more, everyone who waits gets awake."""
    terms = TERMS.model_copy(update={"awake": slots})
    locks: dict[int, str] = {}
    members = [Played(name, locks) for name in "abc"]
    now = 0.0
    group = old = Group("c0", now)
    late: list[tuple[int, str, Order]] = []

    def awake_ones() -> list[Played]:
        return [it for it in members if it.state == "awake"]

    for number, (step, which) in enumerate(steps):
        member = members[which]
        if step in ("report", "late", "old"):
            to = old if step == "old" else group
            to.report(member.report(now), now)
            to.decide(terms, now)
            if order := to.order(member.name):
                if step == "late":
                    late.append((which, member.name, order))
                else:
                    member.hear(order)
        elif step == "go on":
            member.go_on(now)
            for which, name, order in late:  # their answers arrive only now
                if members[which].name == name:
                    members[which].hear(order)
            late.clear()
        elif step == "request":
            member.requests.append(now)
        elif step == "time":
            now += chance.choice([0.1, 1.0, 5.0, 40.0])
        elif step == "die":
            members[which] = member.die(now)
        else:
            old, group = group, Group(f"c{number}", now)
        held = [it.slot for it in awake_ones()]
        assert len(held) == len(set(held)) <= slots
        assert all(locks.get(it.slot or 0) == it.name for it in awake_ones())

    # From here on nothing fails. Each gets requests; each must be served.
    waiting = {it.name for it in members}
    for it in members:
        it.requests.append(now)
    for _ in range(600):
        now += 0.5
        for it in members:
            group.report(it.report(now), now)
            group.decide(terms, now)
            if order := group.order(it.name):
                it.hear(order)
        for it in members:
            if it.state != "awake" or it.since + 2 <= now:
                it.go_on(now)
            if it.state == "awake" and not it.requests:
                waiting.discard(it.name)
        assert len(awake_ones()) <= slots
        if not waiting:
            return
    raise AssertionError(f"never woken: {waiting}")


def test_under_load_of_all_each_has_its_time_and_none_waits_for_ever() -> None:
    """All always have requests: a turn lasts min_awake_s at least, and nobody waits for more than
    everybody else's turns."""
    locks: dict[int, str] = {}
    members = {name: Played(name, locks, loaded=True) for name in "abc"}
    group, now = Group("c", 0.0), LISTEN_S
    turns: list[tuple[str, float]] = []
    slept_at = dict.fromkeys(members, 0.0)
    longest = 0.0
    for _ in range(1200):
        now += 0.5
        for it in members.values():
            it.requests = it.requests or [now]
        for it in members.values():
            group.report(it.report(now), now)
            group.decide(TERMS, now)
            if order := group.order(it.name):
                it.hear(order)
        for it in members.values():
            before = it.state
            if before != "awake":
                it.go_on(now)
            if before == "waking" and it.state == "awake":
                longest = max(longest, now - slept_at[it.name])
            if before == "falling":
                turns.append((it.name, now - it.since))
                slept_at[it.name] = now
                it.requests = [now]
    assert {name for name, _ in turns} == set("abc")
    assert all(now - at < 200 for at in slept_at.values())
    assert longest <= 2 * (TERMS.max_wait_s + 5)


# --- the life of a coordinator ---------------------------------------------------------------


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of a coordinator and its GPU; it looks every few milliseconds."""
    import ray

    done: list[str] = []
    monkeypatch.setattr(swap_actor, "LEAVE_S", 0.05)
    monkeypatch.setattr(swap_actor, "TERMS_S", 0.01)
    monkeypatch.setattr(swap_actor, "_give_back", lambda name: done.append(f"GPU of {name}"))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="me"))
    monkeypatch.setattr(ray, "kill", lambda actor: done.append(actor))
    return done


async def test_a_group_without_applications_gives_its_gpu_back_and_its_coordinator_ends(
    monkeypatch: pytest.MonkeyPatch, ended: list[str]
) -> None:
    async def reported() -> dict[str, Any]:
        return {"applications": applications}

    def application(group: str) -> dict[str, Any]:
        args = {"model": "m", "resources": {"swap_group": group}}
        config = {"import_path": MODEL_IMPORT_PATH, "args": args}
        return {"status": "DEPLOYING", "deployments": {}, "deployed_app_config": config}

    monkeypatch.setattr(swap_actor.serve, "report_async", reported)
    applications = {"other": application("other"), "a": application("g")}
    actor = swap_actor.SwapActor("g")
    await actor.begin()
    try:
        await asyncio.sleep(0.2)  # four times as long as it waits
        assert not ended
        del applications["a"]
        assert await until(lambda: len(ended) > 1)
        assert ended[:2] == ["GPU of g", "me"]
    finally:
        for task in actor._tasks:
            task.cancel()


async def test_a_report_is_answered_when_there_is_an_order_and_by_the_newest_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def away() -> dict[str, Any]:
        raise ConnectionError("no controller")

    monkeypatch.setattr(swap_actor.serve, "report_async", away)
    monkeypatch.setattr(swap_actor, "HOLD_S", 30.0)
    actor = swap_actor.SwapActor("g")
    decode = swap_actor._order
    try:
        first = asyncio.create_task(actor.exchange(swap_actor.encode(awake("a", busy=True))))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(actor.exchange(swap_actor.encode(awake("a", busy=False))))
        assert decode(await first) is None
        asks = asyncio.create_task(actor.exchange(swap_actor.encode(asleep("b", 0.1))))
        order = decode(await second)
        assert order and not order.wake
        asleep_now = replace(asleep("a"), heard=order.id)
        again = asyncio.create_task(actor.exchange(swap_actor.encode(asleep_now)))
        order = decode(await asks)
        assert order and order.wake and not again.done()
        again.cancel()
    finally:
        for task in actor._tasks:
            task.cancel()


async def test_a_newer_report_is_not_forgotten_with_the_one_that_it_replaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The older call had its order when the newer report came, and had not returned yet."""

    async def away() -> dict[str, Any]:
        raise ConnectionError("no controller")

    monkeypatch.setattr(swap_actor.serve, "report_async", away)
    actor = swap_actor.SwapActor("g")
    try:
        older = asyncio.create_task(actor.exchange(swap_actor.encode(awake("a"))))
        await asyncio.sleep(0)
        actor._held["a"].set_result(None)
        newer = asyncio.create_task(actor.exchange(swap_actor.encode(awake("a"))))
        await older
        assert "a" in actor._held and not actor._held["a"].done()
        await newer
    finally:
        for task in actor._tasks:
            task.cancel()

"""A replica's weight beside its siblings: slow start, outliers by faults and by TTFT."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import pytest

from serve_app.cluster.exchange import Usage
from serve_app.gateway import standing
from serve_app.gateway.ledger import Entry
from serve_app.gateway.policy import FewestRequests
from serve_app.gateway.replicas import Board, Replica
from serve_app.gateway.standing import (
    ENOUGH,
    FAULTS,
    LEAST,
    MOST_OUT_S,
    OUT,
    OUT_OF_DATE_S,
    OUT_S,
    SLOW_START_S,
    Outliers,
    Standing,
)


class Replicas:
    """The replicas r0, r1, … of the model ``m``, and a clock that a test sets."""

    def __init__(self, count: int) -> None:
        self.now = 0.0
        self.board = Board()
        self.board.publish("m", {f"r{n}": ("h", n) for n in range(count)})
        self.outliers = Outliers(self.board, lambda: self.now)

    def __getitem__(self, n: int) -> Replica:
        return self.board.replicas_of("m")[n]

    def weights(self) -> list[float]:
        return [round(it.weight(self.now), 3) for it in self.board.replicas_of("m")]

    def ended(self, n: int, times: int = 1, **more: Any) -> None:
        entry = Entry(
            "x", "x", "", "m", "m", "/", f"r{n}", "answered", 200, 0.0, 0.0, None, 1.0, 0, None
        )
        for _ in range(times):
            self.outliers.entered(replace(entry, **more))

    def stream(
        self, n: int, ttft: float, prompt: int = 1000, cached: int = 0, times: int = 1, **more: Any
    ) -> None:
        """``times`` streams, the last of which is compared."""
        for _ in range(times):
            self.now += 2
            usage = Usage(prompt, cached, 10)
            self.ended(n, first_byte_s=ttft, usage=usage, streamed=True, **more)


# --- slow start -----------------------------------------------------------------------------------


def test_a_new_replica_s_weight_grows_to_1() -> None:
    new = Standing(since=100.0)
    after = [0, SLOW_START_S / 2, SLOW_START_S, 1000]
    assert [new.weight(100 + s) for s in after] == [LEAST, 0.5, 1, 1]


def test_those_that_were_there_first_are_not_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    board = Board()
    board.publish("m", {})
    board.publish("m", {"a": ("h", 1), "b": ("h", 2)})
    board.publish("m", {"a": ("h", 1), "b": ("h", 2), "c": ("h", 3)})
    assert [it.weight(100.0) for it in board.replicas_of("m")] == [1, 1, LEAST]
    board.publish("m", {"d": ("h", 4)})  # all others have gone
    assert [it.weight(100.0) for it in board.replicas_of("m")] == [1]
    board.add("m", {"e": ("h", 5)})
    board.add("cold", {"f": ("h", 6)})
    assert [board.replicas_of(m)[-1].weight(100.0) for m in ("m", "cold")] == [LEAST, 1]


def test_one_that_stays_keeps_its_standing() -> None:
    replicas = Replicas(2)
    replicas.ended(0, FAULTS, status=500)
    places = {it.id: (it.host, it.port) for _, it in replicas.board.all()}
    replicas.board.publish("m", places)
    assert replicas.weights() == [OUT, 1]


# --- the policy -----------------------------------------------------------------------------------


def test_the_fewest_requests_are_those_for_a_weight() -> None:
    replicas = Replicas(3)
    policy = FewestRequests(lambda: replicas.now)
    live = replicas.board.live("m")
    replicas[2].standing.since = -SLOW_START_S / 4  # a fourth of the others' weight
    got: Counter[str] = Counter()
    for _ in range(90):
        chosen = policy.choose(live, cast(Any, None))
        chosen.began()
        got[chosen.id] += 1
    assert got == {"r0": 40, "r1": 40, "r2": 10}


def test_an_only_replica_gets_all_whatever_its_weight() -> None:
    replicas = Replicas(1)
    replicas.ended(0, 3 * FAULTS, status=500)
    replicas.stream(0, ttft=100.0, times=2 * ENOUGH)
    assert replicas.weights() == [1]
    policy = FewestRequests(lambda: replicas.now)
    assert policy.choose(replicas.board.live("m"), cast(Any, None)).id == "r0"


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [{"status": 500}, {"status": 502, "end": "lost"}, {"status": 504, "end": "refused"}],
)
def test_faults_in_a_row_make_an_outlier_that_comes_back(fault: dict[str, Any]) -> None:
    replicas = Replicas(3)
    replicas.ended(1, FAULTS - 1, **fault)
    assert replicas.weights() == [1, 1, 1]
    replicas.ended(1, **fault)
    assert replicas.weights() == [1, OUT, 1]
    replicas.now = OUT_S + SLOW_START_S / 2
    assert replicas.weights() == [1, 0.5, 1]
    replicas.now = OUT_S + SLOW_START_S
    assert replicas.weights() == [1, 1, 1]


@pytest.mark.parametrize(
    "well",
    [{}, {"status": 400}],
)
def test_an_answer_ends_the_row(well: dict[str, Any]) -> None:
    replicas = Replicas(2)
    for _ in range(3):
        replicas.ended(0, FAULTS - 1, status=500)
        replicas.ended(0, **well)
    assert replicas.weights() == [1, 1]


def test_what_is_not_the_replica_s_fault_is_none() -> None:
    replicas = Replicas(2)
    replicas.ended(0, 3 * FAULTS, end="refused", status=503)  # asleep, or the queue's
    replicas.ended(0, 3 * FAULTS, end="left", status=499)
    replicas.ended(0, 3 * FAULTS, end="failed", status=500)  # a bug of the gateway
    replicas.ended(9, 3 * FAULTS, status=500)  # a replica that has gone
    assert replicas.weights() == [1, 1]


def test_each_time_it_is_out_for_longer_and_in_the_end_that_is_forgotten() -> None:
    replicas = Replicas(2)
    out = []
    for _ in range(12):
        replicas.ended(0, FAULTS, status=500)
        out.append(replicas[0].standing.since - replicas.now)
        replicas.now = replicas[0].standing.since
    assert out == [min(MOST_OUT_S, OUT_S * n) for n in range(1, 13)]
    replicas.now += MOST_OUT_S + 1
    replicas.ended(0, FAULTS, status=500)
    assert replicas[0].standing.since - replicas.now == OUT_S


def test_requests_that_fail_everywhere_make_no_outlier() -> None:
    replicas = Replicas(4)
    for _ in range(4 * FAULTS):
        for n in range(4):
            replicas.ended(n, status=500)
    assert sum(weight < 1 for weight in replicas.weights()) <= 2
    replicas = Replicas(3)
    for standings in replicas.board.replicas_of("m"):
        standings.standing.faults = FAULTS  # such as after minutes of it
    replicas.ended(0, status=500)
    assert replicas.weights() == [1, 1, 1]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_never_more_than_half_are_out(count: int) -> None:
    replicas = Replicas(count)
    for n in range(count):
        replicas.ended(n, FAULTS, status=500)
        for other in range(n + 1, count):
            replicas.ended(other)
    assert sum(weight < 1 for weight in replicas.weights()) == count // 2
    replicas = Replicas(count)
    for _ in range(3 * ENOUGH):
        for n in range(count):
            replicas.stream(n, ttft=0.1 * 5**n)  # each is an outlier beside those before it
    replicas.ended(0, FAULTS, status=500)
    assert sum(weight < 1 for weight in replicas.weights()) <= count // 2


# --- TTFT -----------------------------------------------------------------------------------------


def test_a_replica_that_is_slower_gets_as_much_less() -> None:
    replicas = Replicas(3)
    for _ in range(2 * ENOUGH):
        replicas.stream(0, ttft=0.1)
        replicas.stream(1, ttft=0.5)
        replicas.stream(2, ttft=0.1)
    assert replicas.weights() == [1, 0.2, 1]
    for _ in range(2 * ENOUGH):  # it is well again
        replicas.stream(0, ttft=0.1)
        replicas.stream(1, ttft=0.1)
    assert replicas.weights() == [1, 1, 1]


def test_one_of_two_is_compared_with_the_other() -> None:
    replicas = Replicas(2)
    for _ in range(2 * ENOUGH):
        replicas.stream(0, ttft=0.1)
        replicas.stream(1, ttft=100.0)
    assert replicas.weights() == [1, LEAST]


def test_it_comes_back_where_nothing_is_known_any_more() -> None:
    replicas = Replicas(2)
    for _ in range(2 * ENOUGH):
        replicas.stream(0, ttft=0.1)
        replicas.stream(1, ttft=0.5)
    assert replicas.weights()[1] < 1
    replicas.now += OUT_OF_DATE_S
    assert replicas.weights() == [1, 1]
    replicas.stream(1, ttft=0.5)  # one alone proves nothing
    assert replicas.weights() == [1, 1]


def test_long_prompts_and_cached_ones_are_compared_by_what_was_computed() -> None:
    replicas = Replicas(3)
    base = standing.BASE_TOKENS
    for _ in range(2 * ENOUGH):
        replicas.stream(0, ttft=1e-4 * (20000 + base), prompt=20000)
        replicas.stream(1, ttft=1e-4 * (100 + base), prompt=20000, cached=19900)
        replicas.stream(2, ttft=1e-4 * (100 + base), prompt=100)
    assert replicas.weights() == [1, 1, 1]


def test_only_a_stream_that_one_replica_had_alone_tells_its_ttft() -> None:
    replicas = Replicas(2)
    replicas.stream(0, ttft=0.1, times=2 * ENOUGH)
    replicas.stream(1, ttft=9.0, times=2 * ENOUGH, retries=1)
    usage = Usage(1000, 0, 500)
    replicas.ended(1, 2 * ENOUGH, first_byte_s=9.0, usage=usage)  # its first byte is its last
    replicas.ended(1, 2 * ENOUGH, first_byte_s=9.0, streamed=True)  # nobody has told its tokens
    replicas.stream(1, ttft=9.0, times=2 * ENOUGH, queued_s=8.9)  # it waited in the gateway
    assert replicas.weights() == [1, 1]


def test_replicas_that_are_equal_stay_equal() -> None:
    """With TTFTs that differ by chance, as much as an exponential distribution's."""
    chance = random.Random(19)
    replicas = Replicas(4)
    less = 0
    for _ in range(2000):
        for n in range(4):
            replicas.stream(n, ttft=chance.expovariate(10))
        less += sum(weight < 1 for weight in replicas.weights())
    assert less < 0.01 * 4 * 2000

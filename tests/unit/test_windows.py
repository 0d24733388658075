"""The sliding window: what counts in it, and when there is room again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from serve_app.gateway.windows import Span

MINUTE, DAY, ALWAYS = Span(10.0, 6), Span(86400.0), Span(float("inf"))
START = 1_700_000_000.0


def test_a_minute_fades_by_its_oldest_bucket() -> None:
    taken = {MINUTE.bucket(START): 100.0}
    assert [MINUTE.used(taken, START + s) for s in (0, 30, 60, 65, 69, 70, 600)] == pytest.approx(
        [100, 100, 100, 50, 10, 0, 0]
    )
    MINUTE.prune(taken, START + 69)
    assert taken
    MINUTE.prune(taken, START + 70)
    assert not taken


def test_a_day_begins_anew() -> None:
    midnight = 19_700 * 86400.0
    taken = {DAY.bucket(midnight - 1): 5.0}
    assert (DAY.used(taken, midnight - 1), DAY.used(taken, midnight)) == (5, 0)
    assert DAY.wait(taken, 1, midnight - 60) == 60


def test_what_is_given_back_never_ends_by_itself() -> None:
    assert ALWAYS.used({ALWAYS.bucket(START): 3.0}, START + 1e9) == 3
    assert ALWAYS.wait({0: 3.0}, 1, START) == float("inf")


@given(
    some.dictionaries(some.integers(-8, 0), some.floats(0.5, 1e6), min_size=1),
    some.floats(0, 9.9),
    some.floats(0.01, 1),
)
def test_after_the_wait_there_is_room_and_not_before(
    back: dict[int, float], into: float, part: float
) -> None:
    now = START + into
    taken = {MINUTE.bucket(START) + bucket: amount for bucket, amount in back.items()}
    used = MINUTE.used(taken, now)
    if not used:
        return
    wait = MINUTE.wait(taken, used * part, now)
    left = used * (1 - part)
    assert MINUTE.used(taken, now + wait) == pytest.approx(left, abs=used * 1e-5)
    assert MINUTE.used(taken, now + wait - 0.1) > left

"""Further front ends that give no sign of life, without processes of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import SimpleNamespace
from typing import Any

import pytest
from harness.scripted import until

from serve_app.replica import front_ends
from serve_app.replica.front_ends import FrontEnds, Further

HANG_S, START_S = 0.4, 1.2


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two, of which the first listens and the second starts; and which of them were ended."""
    monkeypatch.setattr(front_ends, "HANG_S", HANG_S)
    monkeypatch.setattr(front_ends, "START_S", START_S)
    ours: Any = FrontEnds.__new__(FrontEnds)
    ended: list[int] = []
    ours.further = [Further(1), Further(2)]
    for one in ours.further:
        one.reported = time.monotonic()
        one.listening = asyncio.get_running_loop().create_future()
        one.process = SimpleNamespace(kill=lambda one=one: ended.append(one.index))
    ours.further[0].listening.set_result(None)
    watching = asyncio.create_task(ours._watch())
    yield ours.further, ended
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching


async def test_one_that_hangs_and_one_that_never_listens_are_ended(watched: Any) -> None:
    (first, _), ended = watched
    assert await until(lambda: ended)
    assert ended == [1]
    first.reported = time.monotonic() + 10 * START_S  # started again, it is well
    assert await until(lambda: ended != [1], 60)
    assert ended == [1, 2]


async def test_the_first_ones_own_standstill_is_not_the_others_fault(watched: Any) -> None:
    (first, _), ended = watched
    await asyncio.sleep(HANG_S / 20)
    time.sleep(2 * HANG_S)  # noqa: ASYNC251 - their reports wait meanwhile
    await asyncio.sleep(HANG_S / 40)  # the watch is first
    first.reported = time.monotonic()
    await asyncio.sleep(HANG_S / 4)
    assert ended == []

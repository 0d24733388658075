"""All objects are looked at while little is open (serve_app/gateway/garbage.py)."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
from harness.scripted import until

from serve_app.gateway import garbage
from serve_app.gateway.garbage import FEW, LONGEST_S, is_due


@pytest.mark.parametrize(
    ("grown", "running", "since_s", "due"),
    [
        (1, 0, 60.0, True),
        (1, FEW, 60.0, True),
        (1, FEW + 1, 60.0, False),
        (1, FEW + 1, LONGEST_S, True),
        (0, 0, 2 * LONGEST_S, False),
    ],
)
def test_when_all_is_looked_at(grown: int, running: int, since_s: float, due: bool) -> None:
    assert is_due(grown, running, since_s) is due


@pytest.fixture
def restored() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


class Ring:
    """Refers to itself, so that only the collector finds that nothing else does."""

    def __init__(self) -> None:
        self.ring = self


@pytest.mark.usefixtures("restored")
async def test_the_old_are_left_alone_while_much_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "_LOOK_S", 0.01)
    running = FEW + 1
    looking = asyncio.create_task(garbage.run(lambda: running))
    await asyncio.sleep(0.05)
    rings = [Ring() for _ in range(100)]
    left = weakref.WeakSet(rings)
    gc.collect(1)  # which makes them old
    del rings
    made = []
    for _ in range(20):  # Python alone would look at all after ten of these
        made.append([[] for _ in range(10_000)])
        await asyncio.sleep(0.01)
    assert len(left) == 100
    running = 0
    assert await until(lambda: not left)
    looking.cancel()

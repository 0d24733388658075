"""A replica of a swap group, with as much of an engine as it reaches; and the slot's real lock."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from harness.scripted import until

from serve_app.cluster.swap import Order, Report
from serve_app.replica import health, slot, swap
from serve_app.replica.swap import Member


class Replica:
    """An engine and its front ends: what happened to them, in order."""

    def __init__(self) -> None:
        self.llm = self.engine_core = self
        self.done: list[str] = []
        self.wakes = self.busy = False
        self.running = 0
        self.fails_to_tell = 0
        self.stopped = False
        self._waiting = 0
        self.waited_s = 0.0
        self.taken = ""
        self.fails: Exception | None = None

    @property
    def waiting(self) -> int:
        if self.fails_to_tell:
            self.fails_to_tell -= 1
            raise RuntimeError("dictionary changed size during iteration")
        return self._waiting

    @waiting.setter
    def waiting(self, requests: int) -> None:
        self._waiting = requests

    async def call_utility_async(self, method: str, *args: Any) -> str:
        if self.stopped:
            await asyncio.Event().wait()
        if method == slot.TAKE:
            self.done.append("take" if not self.taken else "refused")
            await asyncio.sleep(0.01)
            return self.taken
        self.done.append("leave")
        return ""

    async def sleep(self, level: int, mode: str) -> None:
        if self.fails:
            raise self.fails
        self.done.append(f"sleep {level} {mode}")

    async def wake_up(self) -> None:
        self.done.append("wake")

    async def asleep(self, asleep: bool) -> None:
        self.done.append("refuses" if asleep else "serves")

    def tell_gateways(self) -> None:
        self.done.append("told")


class Coordinator:
    """Answers a report with the next order, if there is one."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.orders: list[Order] = []
        self.away = False

    def exchange(self, report: Report, news: Callable[[], bool]) -> Order | None:
        self.reports.append(report)
        if self.away:
            raise ConnectionError("no coordinator")
        for _ in range(20):
            if self.orders:
                return self.orders.pop(0)
            if news():
                break
            swap.time.sleep(0.005)
        return None

    @property
    def last(self) -> Report:
        return self.reports[-1]


WAKE, SLEEP = Order("c/1", True, 0), Order("c/2", False, 0, 0.05)


@asynccontextmanager
async def loaded() -> AsyncIterator[tuple[Member, Replica, Coordinator]]:
    """A member that has had its turn to load."""
    coordinator, engine = Coordinator(), Replica()
    coordinator.orders.append(WAKE)
    with TemporaryDirectory() as folder:
        turn = Path(folder) / "turn"
        member = Member("r", "g", 1.0, coordinator.exchange, turn)
        assert await until(turn.exists)
    try:
        replica: Any = engine
        member.loaded(replica, replica)
        assert await until(lambda: coordinator.last.state == "awake")
        yield member, engine, coordinator
    finally:
        member.stop()


async def test_it_may_load_when_it_is_told_so(tmp_path: Path) -> None:
    coordinator, turn = Coordinator(), tmp_path / "turn"
    member = Member("r", "g", 2.0, coordinator.exchange, turn)
    try:
        assert os.environ[slot.TURN_ENV] == str(turn)
        assert await until(lambda: len(coordinator.reports) > 2)
        assert coordinator.last.state == "asleep" and coordinator.last.evict_cost == 2.0
        assert (coordinator.last.wants_s or 0) > 0 and not turn.exists()
        coordinator.orders.append(WAKE)
        assert await until(turn.exists)
        assert turn.read_text() == slot.file("g", 0)
        assert await until(lambda: coordinator.last.state == "waking")
        assert (coordinator.last.slot, coordinator.last.heard) == (0, "c/1")
        member.loaded(Replica(), Replica())  # type: ignore[arg-type]
        assert slot.TURN_ENV not in os.environ
        assert await until(lambda: coordinator.last.state == "awake")
    finally:
        member.stop()


async def test_it_sleeps_and_wakes_as_ordered_and_tells_the_gateways() -> None:
    async with loaded() as (_, engine, coordinator):
        coordinator.orders.append(SLEEP)
        assert await until(lambda: coordinator.last.state == "asleep")
        assert engine.done == ["refuses", "told", "sleep 1 keep", "leave"]
        assert coordinator.last.slot is None and coordinator.last.wants_s is None
        engine.done.clear()
        engine.waiting, engine.waited_s = 1, 7.0
        assert await until(lambda: coordinator.last.wants_s == 7.0)
        coordinator.orders.append(Order("c/3", True, 1))
        assert await until(lambda: coordinator.last.state == "awake")
        assert engine.done == ["take", "wake", "serves", "told"]
        assert coordinator.last.slot == 1


@pytest.mark.parametrize("running", [3, 0])  # 0: one that is answered in the background
async def test_requests_that_do_not_end_are_paused_and_want_to_go_on(running: int) -> None:
    async with loaded() as (_, engine, coordinator):
        engine.running, engine.busy = running, True
        coordinator.orders.append(SLEEP)
        assert await until(lambda: coordinator.last.state == "asleep")
        assert engine.done[2] == "sleep 1 keep"
        assert coordinator.last.wants_s is not None and coordinator.last.busy
        engine.running, engine.busy = 0, False  # its clients have left
        assert await until(lambda: coordinator.last.wants_s is None)


async def test_an_order_is_done_once_and_one_that_does_not_apply_not_at_all() -> None:
    async with loaded() as (member, engine, coordinator):
        member.hear(Order("c/9", True, 1))  # it is awake
        assert await until(lambda: coordinator.last.heard == "c/9")
        coordinator.orders += [SLEEP, SLEEP]
        assert await until(lambda: coordinator.last.state == "asleep")
        coordinator.orders.append(SLEEP)
        assert await until(lambda: not coordinator.orders)
        assert engine.done.count("sleep 1 keep") == 1


async def test_a_slot_that_another_has_is_not_woken_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "TRY_S", 0.05)
    async with loaded() as (_, engine, coordinator):
        coordinator.orders.append(SLEEP)
        assert await until(lambda: coordinator.last.state == "asleep")
        engine.taken = "another engine has the slot"
        coordinator.orders.append(Order("c/3", True, 0))
        assert await until(lambda: "refused" in engine.done and coordinator.last.state == "asleep")
        assert "wake" not in engine.done and coordinator.last.slot is None
        engine.taken = ""
        coordinator.orders.append(Order("c/4", True, 0))
        assert await until(lambda: coordinator.last.state == "awake")


async def test_who_could_not_wake_queues_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one for which the GPU has no room would be tried for ever, and all others wait."""
    monkeypatch.setattr(slot, "TRY_S", 0.05)
    async with loaded() as (_, engine, coordinator):
        coordinator.orders.append(SLEEP)
        assert await until(lambda: coordinator.last.state == "asleep")
        engine.waiting, engine.waited_s = 1, 500.0
        assert await until(lambda: coordinator.last.wants_s == 500.0)
        engine.taken = "60.0 GiB of the GPU are needed, and 1.0 are free"
        coordinator.orders.append(Order("c/3", True, 0))
        assert await until(lambda: "refused" in engine.done and coordinator.last.state == "asleep")
        assert coordinator.last.wants_s is not None and coordinator.last.wants_s < 500
        engine.taken = ""
        coordinator.orders.append(Order("c/4", True, 0))
        assert await until(lambda: coordinator.last.state == "awake")
        coordinator.orders.append(Order("c/5", False, 0))
        assert await until(lambda: coordinator.last.wants_s == 500.0)


async def test_an_engine_that_cannot_sleep_ends_its_replica(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(swap.os, "_exit", ended.append)
    async with loaded() as (_, engine, coordinator):
        engine.fails = RuntimeError("no host memory")
        coordinator.orders.append(SLEEP)
        assert await until(lambda: ended)
        assert ended == [1] and "leave" not in engine.done


async def test_without_a_coordinator_who_is_awake_stays_awake_and_asks_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(swap, "_AGAIN_S", 0.01)
    async with loaded() as (_, engine, coordinator):
        coordinator.away = True
        seen = len(coordinator.reports)
        assert await until(lambda: len(coordinator.reports) > seen + 3)
        assert not engine.done
        assert caplog.text.count("coordinator does not answer") == 1
        coordinator.away = False
        coordinator.orders.append(SLEEP)
        assert await until(lambda: coordinator.last.state == "asleep")


def test_members_lock_the_same_files_whatever_their_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's `env` may have a TMPDIR, and another's not."""
    before = slot.file("g", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is looked up once
    assert slot.file("g", 0) == before


_ENGINE_CORE = """
import sys
from serve_app.replica import slot
print(slot._lock(sys.argv[1]), flush=True)
input()
slot._leave()
print("left", flush=True)
input()
"""
"""A process with the slot's lock, or without."""

Started = subprocess.Popen[str]


@pytest.fixture
def process() -> Iterator[Callable[[str], tuple[Started, bool]]]:
    """Starts one; ends all."""
    started: list[Started] = []

    def start(path: str) -> tuple[Started, bool]:
        command = [sys.executable, "-c", _ENGINE_CORE, path]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        one = subprocess.Popen(command, text=True, **pipes)
        started.append(one)
        assert one.stdout
        return one, one.stdout.readline() == "True\n"

    yield start
    for one in started:
        one.kill()
        one.communicate()


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_a_slot_has_one_process_until_that_leaves_or_dies(
    tmp_path: Path, process: Any, end: str
) -> None:
    path = str(tmp_path / "g.0")
    first, has = process(path)
    assert has
    assert not process(path)[1]
    assert process(str(tmp_path / "g.1"))[1]
    if end == "leaves":
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.stdout.readline() == "left\n"
    else:
        first.kill()
        first.wait()
    assert process(path)[1]


def test_an_engine_wakes_when_the_gpu_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed neighbour's lock is free before its memory is."""
    monkeypatch.setattr(slot, "_asleep_bytes", lambda: 60 << 30)
    free = [1 << 30, 1 << 30, 70 << 30]
    monkeypatch.setattr(slot, "_free_bytes", lambda: free.pop(0) if len(free) > 1 else free[0])
    assert slot._take(str(tmp_path / "g.0")) == ""
    slot._leave()
    monkeypatch.setattr(slot, "MEMORY_S", 0.05)
    free[:] = [1 << 30]
    assert slot._take(str(tmp_path / "g.0")) == "60.0 GiB of the GPU are needed, and 1.0 are free"
    assert slot._held is None


def test_an_engine_loads_when_the_memory_of_a_dead_one_is_back() -> None:
    free = [10 << 30, 30 << 30, 60 << 30, 60 << 30, 80 << 30]
    slept: list[float] = []
    slot._settle(lambda: free.pop(0), slept.append)
    assert free == [80 << 30] and len(slept) == 3


async def test_an_engine_that_sleeps_with_requests_paused_does_not_count_as_hanging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended

    monkeypatch.setattr(health.os, "_exit", end)
    monkeypatch.setattr(health, "_PERIOD_S", 0.01)
    engine: Any = SimpleNamespace(dead=False, asleep=True)
    front_ends: Any = SimpleNamespace(busy=True)
    load: Any = SimpleNamespace(last_step=1.0, first_request_done=True)
    watch = asyncio.create_task(health.exit_with_engine(engine, front_ends, load, 0.05))
    await asyncio.sleep(0.3)
    assert not watch.done()
    engine.asleep = False  # from now on it owes steps
    with pytest.raises(Ended):
        await asyncio.wait_for(watch, 10)


async def test_an_engine_that_does_not_answer_when_it_is_to_wake_ends_its_replica(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it would be waking for ever, and nobody else could have the slot."""
    ended: list[int] = []
    monkeypatch.setattr(swap.os, "_exit", ended.append)
    monkeypatch.setattr(swap, "STEP_S", 0.1)
    async with loaded() as (_, engine, coordinator):
        coordinator.orders.append(SLEEP)
        assert await until(lambda: coordinator.last.state == "asleep")
        engine.stopped = True
        coordinator.orders.append(Order("c/3", True, 0))
        assert await until(lambda: ended)


async def test_it_reports_on_when_a_report_fails() -> None:
    """The thread reads what the event loop changes."""
    async with loaded() as (_, engine, coordinator):
        engine.fails_to_tell = 3
        assert await until(lambda: not engine.fails_to_tell)
        coordinator.orders.append(SLEEP)
        assert await until(lambda: coordinator.last.state == "asleep")


async def test_the_slot_of_who_is_awake_does_not_grow_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines remove files from /tmp that nothing has touched for days: the next engine would lock
    a new one."""
    touched: list[str] = []
    monkeypatch.setattr(slot.os, "utime", touched.append)
    async with loaded() as (_, _, coordinator):
        assert await until(lambda: touched)
        coordinator.orders.append(SLEEP)
        assert await until(lambda: coordinator.last.state == "asleep")
    assert set(touched) == {slot.file("g", 0)}

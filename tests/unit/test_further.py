"""A further front end's process, as the replica's own tells it what to do; no engine."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from harness.scripted import until

from serve_app.replica import further
from serve_app.replica.channel import Channel
from serve_app.replica.prompts import Prompts


class Process:
    """One in this process, and the pipe to it."""

    def __init__(self) -> None:
        self.engine = SimpleNamespace(asleep=False, busy=False)
        self.front_end = SimpleNamespace(
            running=0,
            reports=SimpleNamespace(due=0, prompts=Prompts()),
            port=1,
            serving_models=SimpleNamespace(lora_requests={}),
            listen=_nothing,
        )
        self.pipe, self.theirs = multiprocessing.Pipe()

    @contextlib.asynccontextmanager
    async def runs(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
        monkeypatch.setattr(further.Engine, "join", lambda *_: self.engine)
        order: Any = SimpleNamespace(
            args=None,
            config=SimpleNamespace(parallel_config=SimpleNamespace()),
            host="127.0.0.1",
            front_end=lambda *_: _nothing(result=self.front_end),
        )
        client: Any = None
        serving = asyncio.create_task(further._serve(1, order, client, 0, self.theirs))
        async with asyncio.timeout(10):
            yield
        serving.cancel()
        asyncio.get_running_loop().remove_reader(self.theirs.fileno())

    async def heard(self) -> Any:
        """The next message, read as by a process that answers nothing by itself."""
        assert await until(self.pipe.poll)
        return self.pipe.recv()


async def _nothing(*_: Any, result: Any = None) -> Any:
    return result


async def test_what_it_is_busy_with_is_told_before_it_says_that_it_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the engine is put to sleep with a request that came just before."""
    monkeypatch.setattr(further, "REPORT_S", 3600)
    process = Process()
    heard: list[Any] = []
    reported = asyncio.Event()

    def report(running: int, due: int, busy: bool, records: list[Any]) -> None:
        heard.append((running, busy))
        reported.set()

    async with process.runs(monkeypatch):
        channel = Channel(
            process.pipe,
            {"is_asleep": lambda: False, "listening": lambda port: None, "report": report},
            lost=lambda: None,
        )
        await reported.wait()
        process.front_end.running = 1
        process.front_end.reports.prompts.add("gateway", "key")
        await channel.ask("asleep", True)
        await channel.ask("dropped")
        channel.close()
    assert process.engine.asleep
    assert process.front_end.reports.prompts.after(0, "another") == []
    assert heard == [(0, False), (1, False)]


async def test_reports_do_not_pile_up_in_the_pipe_while_nobody_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full pipe would hold up all of this front end's streams."""
    monkeypatch.setattr(further, "REPORT_S", 0.01)
    process = Process()
    async with process.runs(monkeypatch):
        name, number, _ = await process.heard()
        assert name == "is_asleep"
        process.pipe.send(("answer", number, (False,)))
        assert await process.heard() == ("listening", None, (1,))
        name, number, state = await process.heard()
        assert (name, state) == ("report", (0, 0, False, []))
        for running in (1, 2, 3):
            process.front_end.running = running
            await asyncio.sleep(0.1)
        assert not process.pipe.poll()
        process.pipe.send(("answer", number, (None,)))
        name, _, state = await process.heard()
        assert (name, state) == ("report", (3, 0, False, []))

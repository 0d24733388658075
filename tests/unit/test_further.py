"""A further front end's process, as the replica's own tells it what to do; no engine."""

from __future__ import annotations

import asyncio
import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.replica import further
from serve_app.replica.channel import Channel


async def test_what_it_is_busy_with_is_told_before_it_says_that_it_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the engine is put to sleep with a request that came just before."""
    engine = SimpleNamespace(asleep=False, busy=False)
    front_end = SimpleNamespace(
        running=0, port=1, serving_models=SimpleNamespace(lora_requests={}), listen=_nothing
    )
    order: Any = SimpleNamespace(
        args=None,
        config=SimpleNamespace(parallel_config=SimpleNamespace()),
        host="127.0.0.1",
        front_end=lambda *_: _nothing(result=front_end),
    )
    monkeypatch.setattr(further.Engine, "join", lambda *_: engine)
    monkeypatch.setattr(further, "REPORT_S", 3600)
    heard: list[Any] = []
    reported = asyncio.Event()

    def report(running: int, busy: bool, records: list[Any]) -> None:
        heard.append((running, busy))
        reported.set()

    ours, theirs = multiprocessing.Pipe()
    channel = Channel(
        ours,
        {
            "is_asleep": lambda: False,
            "listening": lambda port: None,
            "report": report,
        },
        lost=lambda: None,
    )
    serving = asyncio.create_task(further._serve(1, order, None, 0, theirs))  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        await reported.wait()
        front_end.running = 1
        await channel.ask("asleep", True)
    assert engine.asleep
    assert heard == [(0, False), (1, False)]
    serving.cancel()
    asyncio.get_running_loop().remove_reader(theirs.fileno())
    channel.close()


async def _nothing(*_: Any, result: Any = None) -> Any:
    return result

"""One replica's part of ``serve-app admin``; the rest is in test_life_and_death.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from serve_app import admin


class Engine:
    """As much of an engine as sleeping takes, without a GPU."""

    def __init__(self, *, fails: bool = False) -> None:
        self.load = SimpleNamespace(asleep=False)
        self.llm = self
        model_config = SimpleNamespace(enable_sleep_mode=True)
        self.vllm_config = SimpleNamespace(model_config=model_config)
        self.slept: list[Any] = []
        self._fails = fails

    async def wake_up(self) -> None:
        assert self.load.asleep

    async def sleep(self, level: int, mode: str) -> None:
        self.slept.append((level, mode, self.load.asleep))
        if self._fails:
            raise RuntimeError("no host memory")


async def test_new_requests_are_refused_before_an_engine_falls_asleep() -> None:
    engine: Any = Engine()
    assert await admin.act(engine, "sleep") == "asleep"
    assert engine.slept == [(1, "wait", True)]
    assert engine.load.asleep
    assert await admin.act(engine, "wake") == "awake"
    assert not engine.load.asleep


async def test_an_engine_that_cannot_sleep_serves_on() -> None:
    engine: Any = Engine(fails=True)
    with pytest.raises(RuntimeError, match="no host memory"):
        await admin.act(engine, "sleep")
    assert not engine.load.asleep

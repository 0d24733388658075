"""What a swap group's lock counts on in the installed vLLM."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from serve_app.replica import slot


def test_engine_core_loads_plugins_before_anything_that_uses_a_gpu() -> None:
    from vllm.v1.engine import core

    source = inspect.getsource(core.EngineCore.__init__)
    assert source.index("load_general_plugins()") < source.index("executor_class(vllm_config)")


def test_the_process_of_an_engine_has_the_name_that_is_looked_for() -> None:
    from vllm.v1.engine import utils

    source = inspect.getsource(utils.CoreEngineProcManager.__init__)
    assert 'else "EngineCore"' in source and "name=" in source


def test_an_engine_can_be_asked_for_both_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine import core

    asked: list[Any] = []
    monkeypatch.setattr(slot, "_take", lambda path: asked.append(path) or "taken")
    monkeypatch.setattr(slot, "_leave", lambda: asked.append("leave"))
    monkeypatch.setattr(slot.multiprocessing.current_process(), "_name", "EngineCore")
    monkeypatch.delenv(slot.TURN_ENV, raising=False)
    for name in (slot.TAKE, slot.LEAVE):
        monkeypatch.setattr(core.EngineCore, name, None, raising=False)
    slot.prepare()
    engine = object.__new__(core.EngineCore)
    assert getattr(engine, slot.TAKE)("/g.0") == "taken"
    getattr(engine, slot.LEAVE)()
    assert asked == ["/g.0", "leave"]


def test_what_an_engine_maps_when_it_wakes_is_told_by_its_allocator() -> None:
    source = inspect.getsource(pytest.importorskip("vllm.device_allocator.cumem"))
    assert "instance:" in source
    assert "def get_current_usage(self) -> int:" in source
    assert "def unmap_and_release" in source or "unmap_and_release(" in source


def test_a_sleep_can_keep_the_requests() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore

    assert {"level", "mode"} <= inspect.signature(AsyncLLM.sleep).parameters.keys()
    assert "reset_running_requests: bool = True" in inspect.getsource(EngineCore._reset_caches)

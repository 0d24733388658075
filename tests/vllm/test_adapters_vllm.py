"""What an engine does with adapters, with vLLM's own requests for them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.config.settings import Adapter
from serve_app.errors import UserError
from serve_app.replica import adapters


class FakeEngine:
    """As much of vLLM's engine, its OpenAIServingModels and a replica's front ends as adapters are
    kept in."""

    def __init__(self) -> None:
        self.first = SimpleNamespace(serving_models=self)
        self.vllm_config = SimpleNamespace(lora_config=object())
        self.lora_resolvers: list[Any] = []
        self.lora_requests: dict[str, Any] = {}
        self.lora_resolver_lock: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.did: list[str] = []

    async def load_lora_adapter(self, request: Any) -> Any:
        self.did.append(f"load {request.lora_path}")
        if "broken" in request.lora_path:
            return SimpleNamespace(error=SimpleNamespace(message="no adapter_config.json"))
        self.put(request.lora_name, request.lora_path)
        return "Success"

    async def forget(self, name: str) -> None:
        assert name not in self.lora_requests  # else a front end that asks would get it again
        self.did.append(f"forget {name}")

    def put(self, name: str, path: str) -> None:
        self.lora_requests[name] = SimpleNamespace(lora_int_id=path, lora_path=path)

    async def remove_lora(self, path: str) -> None:
        self.did.append(f"remove {path}")

    async def reset_prefix_cache(self, reset_running_requests: bool) -> None:
        self.did.append("reset")


async def test_an_adapter_that_changed_where_it_lies_takes_the_place_of_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = {"s3://poet": "/cache/poet/1", "s3://other": "/cache/other/1"}
    monkeypatch.setattr(adapters, "fetch", lambda path: versions[path])
    engine: Any = FakeEngine()
    listed = adapters.Adapters(engine, engine)
    wanted = [Adapter(name="poet", path="s3://poet"), Adapter(name="other", path="s3://other")]
    await listed.apply(wanted)
    versions["s3://poet"] = "/cache/poet/2"
    engine.did.clear()
    await listed.apply(wanted)
    assert engine.did == [
        "forget poet", "remove /cache/poet/1", "reset", "load /cache/poet/2",
    ]  # fmt: skip


async def test_an_adapter_whose_change_cannot_be_loaded_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    versions = {"s3://poet": "/cache/poet/1"}
    monkeypatch.setattr(adapters, "fetch", lambda path: versions[path])
    engine: Any = FakeEngine()
    listed = adapters.Adapters(engine, engine)
    await listed.apply([Adapter(name="poet", path="s3://poet")])
    versions["s3://poet"] = "/cache/poet/broken"  # its upload is still going on
    await listed.apply([Adapter(name="poet", path="s3://poet")])
    assert engine.lora_requests["poet"].lora_path == "/cache/poet/1"
    assert "no adapter_config.json; it stays as it was" in caplog.text


async def test_an_adapter_that_cannot_be_unloaded_stops_neither_the_others_nor_the_replica(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(adapters, "fetch", lambda path: path)
    engine: Any = FakeEngine()
    listed = adapters.Adapters(engine, engine)
    await listed.apply([Adapter(name=name, path=f"/{name}") for name in ("a", "b")])

    async def remove(path: str) -> None:
        raise RuntimeError("the engine is busy")

    monkeypatch.setattr(engine, "remove_lora", remove)
    await listed.apply([Adapter(name="c", path="/c")])
    assert engine.lora_requests.keys() == {"c"}
    assert caplog.text.count("cannot be unloaded: the engine is busy") == 2


async def test_an_adapter_that_a_request_is_loading_is_unloaded_after_it() -> None:
    engine: Any = FakeEngine()
    listed = adapters.Adapters(engine, engine)
    listed._wanted = {"poet": "/poet"}
    async with engine.lora_resolver_lock["poet"]:  # as vLLM holds it while it loads
        applying = asyncio.create_task(listed.apply([]))
        await asyncio.sleep(0.05)
        engine.put("poet", "/poet")
    await applying
    assert (engine.lora_requests, engine.did) == ({}, ["forget poet", "remove /poet", "reset"])


async def test_a_request_for_one_that_cannot_be_read_is_not_an_error_of_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fetch(path: str) -> str:
        raise UserError(f"{path} cannot be read")

    monkeypatch.setattr(adapters, "fetch", fetch)
    engine: Any = FakeEngine()
    listed = adapters.Adapters(engine, engine)
    address = "s3://adapters/team/novelist"
    listed._wanted = {"novelist": address}
    request = await listed.resolve_lora("base", "novelist")
    assert request.lora_path == address  # vLLM fails on it, and says so to the client
    assert f"adapter 'novelist': {address} cannot be read" in caplog.text
    assert await listed.resolve_lora("base", "unknown") is None

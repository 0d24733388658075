"""How far the start of a replica is: from its file to the GCS, to GET /ready and to clients."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import scripted
from harness.processes import eventually
from harness.scripted import GatewayProcess, reported

from serve_app.cluster import capacity, kv, progress
from serve_app.cluster.capacity import Node
from serve_app.cluster.progress import Phase
from serve_app.gateway import directory
from serve_app.replica.start import progress as start
from serve_app.replica.start.progress import Progress


class Store:
    """The GCS's key-value store, with the names that Ray gives to what is used of it."""

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.puts: list[bytes] = []

    def _internal_kv_put(self, key: bytes, value: bytes, overwrite: bool) -> None:
        self.kept[key] = value
        self.puts.append(value)

    def _internal_kv_get(self, key: bytes) -> bytes | None:
        return self.kept.get(key)

    def _internal_kv_del(self, key: bytes) -> None:
        self.kept.pop(key, None)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store()
    monkeypatch.setattr(kv, "internal_kv", store)
    monkeypatch.setattr(start, "PERIOD_S", 0.01)
    yield store


def phase(replica: str) -> str:
    found = progress.read([replica]).get(replica)
    return found.name if found else ""


# --- in the replica ------------------------------------------------------------------------------


def test_phases_are_published_as_they_come_and_gone_in_the_end(
    store: Store, tmp_path: Path
) -> None:
    file = tmp_path / "phase"
    with Progress("r1", file):
        assert eventually(lambda: phase("r1") == "starting the engine")
        file.write_text("loading weights")
        assert eventually(lambda: phase("r1") == "loading weights")
        file.write_text("warming up")
        assert eventually(lambda: phase("r1") == "warming up")
        assert progress.read(["r1", "r2"]).keys() == {"r1"}
    assert store.kept == {}
    assert len(store.puts) == 3


def test_a_start_that_fails_leaves_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model"), Progress("r1", tmp_path / "phase"):
        assert eventually(lambda: store.kept)
        raise ValueError("no such model")
    assert store.kept == {}


def test_a_start_goes_on_without_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(*args: Any, **kwargs: Any) -> None:
        tried.append(args)
        raise ConnectionError("the GCS is down")

    monkeypatch.setattr(store, "_internal_kv_put", fail)
    with Progress("r1", tmp_path / "phase") as followed:
        assert eventually(lambda: not followed._thread.is_alive())
    assert len(tried) == 1


# --- in the gateway ------------------------------------------------------------------------------


def starting(args: dict[str, Any] | None = None, **replicas: str | None) -> dict[str, Any]:
    """An application whose replicas start, each on the node that is given."""
    application = reported(args, status="DEPLOYING")
    application["deployments"]["ModelServer"]["replicas"] = [
        {"state": "STARTING", "replica_id": id, "start_time_s": time.time() - 42, "node_id": node}
        for id, node in replicas.items()
    ]
    return application


def look(before: dict[str, Phase], **applications: Any) -> dict[str, Phase]:
    models = directory.read_details({"applications": applications}).values()
    return directory._phases(models, before)


def test_the_gateway_reads_what_starts_and_deletes_what_was_killed(
    store: Store, tmp_path: Path
) -> None:
    with Progress("r1", tmp_path / "one"), Progress("r2", tmp_path / "two"):
        assert eventually(lambda: len(store.kept) == 2)
        found = look({}, m=starting(r1="node", r2="node"))
        assert {id: p.name for id, p in found.items()} == dict.fromkeys(
            ("r1", "r2"), "starting the engine"
        )
        left = look(found, m=starting(r2="node"))
        assert left == {"r2": found["r2"]}
        assert phase("r1") == ""
        assert look(left, m=reported()) == {}
        assert store.kept == {}


def test_a_replica_without_a_node_says_what_it_waits_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Node("10.0.0.1", {"CPU": 8}, {"CPU": 1})
    monkeypatch.setattr(capacity, "nodes", lambda: [busy])
    args = {"resources": {"device": "cpu", "num_cpus": 4}}
    found = look({}, m=starting(args, r1=None))
    assert found["r1"].name == ("waiting for a node with 4 CPU; 10.0.0.1 has 1 of 8 CPUs free")
    assert look({}, m=starting(args | {"resources": {"device": "cpu"}}, r1="node")) == {}


def test_what_cannot_be_read_is_as_it_was(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(key: bytes) -> None:
        raise ConnectionError("the GCS is down")

    monkeypatch.setattr(store, "_internal_kv_get", fail)
    before = {"r1": Phase("loading weights", 1.0)}
    assert look(before, m=starting(r1="node")) == before


async def test_ready_names_the_phase_of_each_replica_that_starts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    applications = {"m": starting(r1="node", r2="node")}
    # However long this machine takes until it asks.
    monkeypatch.setattr(directory, "time", SimpleNamespace(time=lambda: now))
    async with GatewayProcess(applications=applications) as gateway:
        gateway.directory._phases = {"r1": Phase("loading weights", now - 7)}
        answer = await gateway.client.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["models"]["m"]["starting"] == [
        {"replica": "r1", "phase": "loading weights", "seconds": 7},
        {"replica": "r2", "phase": "starting the process", "seconds": 42},
    ]


async def test_a_request_that_waited_too_long_is_told_the_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @asynccontextmanager
    async def never(handle: Any) -> Any:
        raise TimeoutError
        yield

    monkeypatch.setattr(scripted._Handle, "choose_replica", never)
    async with GatewayProcess(
        applications={"m": starting(r1="node")}, cold_start_timeout_s=5
    ) as gateway:
        gateway.board.forget("m")
        gateway.directory._phases = {"r1": Phase("compiling", time.time() - 30)}
        answer = await gateway.client.post("/v1/chat/completions", json={"model": "m"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
    assert answer.json()["error"]["message"] == (
        "The model 'm' did not start within 5 seconds; it is compiling (30 s)."
    )

"""Gateways that come and go with the requests: a real engine on the CPU, behind each proxy.

Ray is told of 16 cores, for which ``auto`` gives three gateways at most. No time is asserted on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from harness import servers
from harness.load import Load
from harness.processes import eventually, free_port, title
from harness.servers import Cluster
from rich.console import Console

from benchmarks.tiny_model import tiny_model
from serve_app.config.document import GATEWAY_DEPLOYMENT
from serve_app.gateway import scaling

MODEL = "tiny"
PATIENCE_S = 180.0
LONG = 1500
"""Tokens of a stream, long enough to be running when its gateway is taken away."""


@pytest.fixture(params=["python", "haproxy"])
def growing(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Cluster]:
    """A cluster with as many gateways as ``auto`` makes them."""
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 16}')
    folder = tmp_path_factory.mktemp(request.param)
    engine: dict[str, Any] = {"enforce_eager": True, "dtype": "float32", "max_num_seqs": 16}
    # Its weights are random: any length is as good as the one that it was made for.
    engine |= {"max_model_len": 8192, "hf_overrides": {"max_position_embeddings": 8192}}
    path = tiny_model(folder / "model", Console(quiet=True))
    model = servers.application(MODEL, model=str(path), engine=engine)
    config = servers.document(free_port(), model, gateways="auto")
    with servers.running(config, folder, request.param) as cluster:
        yield cluster


def gateways(cluster: Cluster) -> dict[str, int]:
    """Pids of the gateways that run, by id."""
    return cluster.replicas("gateway", deployment=GATEWAY_DEPLOYMENT)


def requests_at(id: str) -> int:
    """The requests that Serve counts at one gateway."""
    gateway = ray.get_actor(f"SERVE_REPLICA::gateway#{GATEWAY_DEPLOYMENT}#{id}", "serve")
    return int(ray.get(gateway.get_num_ongoing_requests.remote(), timeout=30))


def test_they_grow_with_the_requests_and_one_that_goes_finishes_its_streams(
    growing: Cluster,
) -> None:
    [alone] = gateways(growing)
    config = growing.deployed()
    sooner = scaling.autoscaling(scaling.most(16)) | {"downscale_delay_s": 30}
    config["applications"][-1]["deployments"] = [
        {"name": GATEWAY_DEPLOYMENT, "autoscaling_config": sooner}
    ]
    clients = scaling.REQUESTS + 40
    with Load(growing.base_url, MODEL, streaming=clients, whole=0, max_tokens=24) as much:
        since = time.monotonic()
        assert eventually(lambda: len(gateways(growing)) == 2, PATIENCE_S, 0.2)
        grown = time.monotonic()
        first = gateways(growing).keys()
        assert alone in first
        # An override that was not there makes it another version: both are replaced.
        growing.deploy(config)
        assert eventually(
            lambda: len(gateways(growing)) == 2 and not gateways(growing).keys() & first,
            PATIENCE_S,
        )
    assert much.lost() == []

    before = gateways(growing)
    assert len(before) == 2
    with Load(growing.base_url, MODEL, streaming=8, whole=0, max_tokens=LONG) as little:
        assert eventually(lambda: all(requests_at(id) for id in before), 20)
        assert eventually(lambda: len(gateways(growing)) == 1, PATIENCE_S, 0.2)
        shrunk = time.monotonic()
        [gone] = before.keys() - gateways(growing).keys()
        assert requests_at(gone) > 0
    ended = time.monotonic()
    assert little.lost() == []
    assert eventually(lambda: not title(before[gone]), PATIENCE_S)
    print(
        f"\nMEASURED the second gateway {grown - since:.1f} s after {clients} clients began; "
        f"{len(much.requests)} requests, none failed; one gateway taken {ended - shrunk:.1f} s "
        f"before the last stream ended; {len(little.requests)} streams, none failed"
    )

"""Models that grow, shrink, fall asleep and wake under load: real engines on the CPU.

The engine is a small random one, of four requests at a time. No time is asserted on: what was
measured is printed (``-rP`` or ``-s``) and kept in docs/operations.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from harness import servers
from harness.load import Load, ask
from harness.processes import eventually, free_port, title
from harness.servers import Cluster
from rich.console import Console

from benchmarks.tiny_model import tiny_model
from serve_app.config.document import DEPLOYMENT

SCALED, ALIAS = "scaled", "team/scaled"
PATIENCE_S = 180.0
"""With replicas that start and stop beside a load on the same two cores."""

LONG = 8000
"""Tokens of a stream that outlasts the decision to take its replica away, many times over."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """``args`` of a small random model that takes long prompts."""
    path = tiny_model(tmp_path_factory.mktemp("tiny") / "model", Console(quiet=True))
    engine = {"enforce_eager": True, "dtype": "float32", "max_num_seqs": 4, "max_model_len": 8192}
    # Its weights are random: any length is as good as the one that it was made for.
    engine["hf_overrides"] = {"max_position_embeddings": 8192}
    return {"model": str(path), "engine": engine}


@pytest.fixture(scope="module")
def scaled(model: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with one model, which sleeps."""
    scaling = {"min_replicas": 0, "max_replicas": 2, "upscale_delay_s": 1, "downscale_delay_s": 5}
    args = model | {"served_as": [ALIAS], "autoscaling": scaling}
    config = servers.document(free_port(), servers.application(SCALED, **args))
    with servers.running(config, tmp_path_factory.mktemp("scaled"), "python") as cluster:
        yield cluster


def count(cluster: Cluster, name: str, number: int) -> float:
    """Wait until so many replicas run; when that was."""
    assert eventually(lambda: len(cluster.replicas(name)) == number, PATIENCE_S, 0.2)
    return time.monotonic()


def test_it_grows_with_the_load_and_shrinks_without_failing_a_request(scaled: Cluster) -> None:
    with Load(scaled.base_url, SCALED) as much:
        since = time.monotonic()
        woken = count(scaled, SCALED, 1)
        grown = count(scaled, SCALED, 2)
    assert much.lost() == []

    before, ports = scaled.replicas(SCALED), servers.model_ports(SCALED)
    with Load(scaled.base_url, SCALED, streaming=2, whole=0, max_tokens=LONG) as little:
        calm = time.monotonic()
        # The gateway gives each replica one of the two, so whichever goes has one to finish.
        assert eventually(lambda: {requests_in(port) for port in ports.values()} == {1})
        shrunk = count(scaled, SCALED, 1)
        [gone] = before.keys() - scaled.replicas(SCALED).keys()
        assert requests_in(ports[gone]) == 1
    assert little.lost() == []
    ended = time.monotonic()
    assert eventually(lambda: not title(before[gone]), PATIENCE_S)
    print(
        f"\nMEASURED autoscaling: first replica after {woken - since:.1f} s, second "
        f"{grown - woken:.1f} s later; {len(much.requests)} requests, none failed; one less "
        f"{shrunk - calm:.1f} s after the load fell, {ended - shrunk:.1f} s before its last "
        f"stream ended; {len(little.requests)} streams, none failed"
    )


def requests_in(port: servers.ModelPort) -> float:
    return port.metric("vllm:num_requests_running")


def test_without_requests_it_falls_asleep_and_several_at_once_wake_one_replica(
    scaled: Cluster,
) -> None:
    quiet = time.monotonic()
    asleep = count(scaled, SCALED, 0)
    ids = {card["id"] for card in httpx.get(f"{scaled.base_url}/v1/models").json()["data"]}
    assert {SCALED, ALIAS} <= ids

    body = {"prompt": "Once", "max_tokens": 8}
    asked = time.monotonic()
    with ThreadPoolExecutor() as pool:
        names = [SCALED, ALIAS] * 3
        answers = list(pool.map(lambda name: ask(scaled.base_url, body | {"model": name}), names))
    assert [a.ending for a in answers] == ["whole"] * 6, answers
    assert len(scaled.replicas(SCALED, "STARTING", "RUNNING")) == 1
    print(
        f"\nMEASURED asleep {asleep - quiet:.1f} s after the last request; six requests were "
        f"answered {max(a.ended or 0 for a in answers) - asked:.1f} s after they were sent"
    )


@pytest.mark.parametrize(("where", "kept"), [("args", 0), ("deployments", 1)])
def test_one_replica_less_by_config_fails_nothing(
    scaled: Cluster, model: dict[str, Any], where: str, kept: int
) -> None:
    """Serve replaces every replica when ``args`` change, and none for a number elsewhere."""
    name = f"fixed-by-{where}"
    fixed = servers.application(name, **model)
    config = servers.document(scaled.port, fixed)

    def deploy(replicas: int) -> None:
        if where == "args":
            fixed["args"]["replicas"] = replicas
        else:
            fixed["deployments"] = [{"name": DEPLOYMENT, "num_replicas": replicas}]
        scaled.deploy(config)

    deploy(2)
    count(scaled, name, 2)
    before = scaled.replicas(name).keys()
    with Load(scaled.base_url, name, streaming=4, whole=2) as load:
        assert eventually(lambda: load.streaming_now >= 3, 60)
        deploy(1)
        since = time.monotonic()

        def shrunk() -> bool:
            there = scaled.replicas(name, "STARTING", "RUNNING", "STOPPING").keys()
            return len(there) == 1 and len(there & before) == kept

        assert eventually(shrunk, PATIENCE_S, 0.2)
        back = time.monotonic()
    assert load.lost() == []
    print(
        f"\nMEASURED 2 -> 1 in {where}: {len(load.requests)} requests, none failed; one replica "
        f"after {back - since:.1f} s, {kept} of those from before"
    )

"""Two models in a swap group, real engines on the CPU, while their processes are killed at each
step of a swap. The GPU that they share is a stand-in (harness/gpu_stand_in.py); all else is real.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import gpu_stand_in, servers
from harness.processes import descendants, eventually, free_port, in_session, title
from harness.servers import Cluster

PATIENCE_S = 200.0
"""For an answer while replicas start on two cores."""

A, B, C = "a", "b", "c"
"""Two models, and a third one that is scaled to zero while nobody asks for it."""


class Fleet:
    """The cluster, and the stand-in's folder."""

    def __init__(self, cluster: Cluster, gpu: Path) -> None:
        self.cluster, self.gpu = cluster, gpu

    def ask(self, model: str, tokens: int = 4) -> httpx.Response:
        body = {"model": model, "prompt": "The capital of France is", "max_tokens": tokens,
                "temperature": 0, "ignore_eos": True}  # fmt: skip
        url = f"{self.cluster.base_url}/v1/completions"
        return httpx.post(url, json=body, timeout=PATIENCE_S)

    def answers(self, model: str) -> bool:
        """Whether it answers in the end; a request may be lost with what is killed."""

        def answered() -> bool:
            try:
                return self.ask(model).status_code == 200
            except httpx.HTTPError:
                return False

        return bool(eventually(answered, PATIENCE_S, 0.5))

    def replica(self, model: str) -> int:
        [pid] = self.cluster.replicas(model).values()
        return pid

    def engine(self, model: str) -> int:
        replica = self.replica(model)
        [pid] = [it for it in descendants(replica) if title(it).startswith("VLLM::EngineCore")]
        return pid

    def phase(self, model: str) -> str:
        return gpu_stand_in.phase(self.gpu, self.engine(model))

    @contextmanager
    def asking(self, model: str, tokens: int = 4) -> Iterator[list[Any]]:
        """A request meanwhile; what it got, once the block has ended."""
        got: list[Any] = []

        def ask() -> None:
            try:
                got.append(self.ask(model, tokens))
            except httpx.HTTPError as error:
                got.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        yield got
        thread.join()

    def is_well(self) -> None:
        """Both answer, in turn, and the GPU never had two."""
        for model in (A, B, A):
            assert self.answers(model), self.cluster.tail()
        assert not gpu_stand_in.out_of_memory(self.gpu)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder, gpu = tmp_path_factory.mktemp("swap"), tmp_path_factory.mktemp("gpu")
    args = servers.demo_args("smollm2-135m")
    del args["served_as"]
    args |= {
        "resources": {"device": "cpu", "num_cpus": 0, "swap_group": "pair"},
        "env": gpu_stand_in.environment(gpu),
    }
    models = [servers.application(name, **args) for name in (A, B, C)]
    models[2]["args"] |= {
        "autoscaling": {"min_replicas": 0, "downscale_delay_s": 2, "max_replicas": 1}
    }
    config = servers.document(free_port(), *models, gateways=2)
    terms = {"min_awake_s": 0.5, "max_wait_s": 1, "drain_s": 0.5}
    config["applications"][-1]["args"]["swap_groups"] = {"pair": terms}
    with servers.running(config, folder, "python") as cluster:
        yield Fleet(cluster, gpu)


def test_each_loads_alone_and_a_request_wakes_the_other(fleet: Fleet) -> None:
    for model, other in ((A, B), (B, A), (A, B)):
        assert fleet.ask(model).status_code == 200
        assert (fleet.phase(model), fleet.phase(other)) == ("awake", "asleep")
    listed = httpx.get(f"{fleet.cluster.base_url}/v1/models").json()["data"]
    assert {it["id"] for it in listed} == {A, B, C}
    assert not gpu_stand_in.out_of_memory(fleet.gpu)


def test_a_request_that_is_paused_says_what_it_would_have_said(fleet: Fleet) -> None:
    whole = fleet.ask(A, 120).json()["choices"][0]["text"]
    with fleet.asking(A, 120) as got:
        time.sleep(1.0)  # it is in the midst of it: 120 tokens take longer than its turn
        assert fleet.ask(B).status_code == 200
        assert not got
    assert got[0].json()["choices"][0]["text"] == whole
    assert "asleep with 1 requests paused" in fleet.cluster.log.read_text(errors="replace")


def test_under_load_of_both_each_has_its_turns_and_no_request_is_lost(fleet: Fleet) -> None:
    """Clients of both that ask again at once, until each model has slept twice."""
    over = threading.Event()

    def client(model: str) -> list[int]:
        said = []
        while not over.is_set():
            said.append(fleet.ask(model, 16).status_code)
        return said

    def slept(model: str) -> int:
        log = fleet.cluster.log.read_text(errors="replace")
        return len(re.findall(rf"ServeReplica:{model}:.*swap: asleep", log))

    before = {model: slept(model) for model in (A, B)}
    with ThreadPoolExecutor() as pool:
        clients = [pool.submit(client, model) for model in (A, B, A, B)]
        try:
            assert eventually(
                lambda: all(slept(model) >= before[model] + 2 for model in (A, B)), PATIENCE_S, 0.5
            )
        finally:
            over.set()
    for one in clients:
        assert set(one.result()) == {200}
    assert not gpu_stand_in.out_of_memory(fleet.gpu)


def test_one_that_is_scaled_to_zero_starts_in_its_turn_and_ends_asleep_or_awake(
    fleet: Fleet,
) -> None:
    for other in (A, None):
        assert not fleet.cluster.replicas(C)
        assert fleet.ask(C).status_code == 200
        if other:
            assert fleet.ask(other).status_code == 200
            assert fleet.phase(C) == "asleep"
        assert eventually(lambda: not fleet.cluster.replicas(C, "RUNNING", "STOPPING"), PATIENCE_S)
    fleet.is_well()


@pytest.mark.parametrize("process", ["engine", "replica"])
@pytest.mark.parametrize("moment", ["awake", "sleeping", "asleep", "waking"])
def test_a_member_may_die_at_every_step(fleet: Fleet, moment: str, process: str) -> None:
    """The one that dies is ``a``; ``b`` is the other one of the swap."""
    first, then = (B, A) if moment in ("asleep", "waking") else (A, B)
    assert fleet.answers(first)
    engine = fleet.engine(A)
    victim = engine if process == "engine" else fleet.replica(A)
    if moment in ("sleeping", "waking"):
        with fleet.asking(then):
            assert eventually(
                lambda: gpu_stand_in.phase(fleet.gpu, engine) == moment, PATIENCE_S, 0.01
            )
            os.kill(victim, signal.SIGKILL)
    else:
        assert gpu_stand_in.phase(fleet.gpu, engine) == moment
        os.kill(victim, signal.SIGKILL)
        assert fleet.ask(B).status_code == 200  # without waiting for the other to start again
    fleet.is_well()


def test_a_member_may_die_while_it_loads(fleet: Fleet) -> None:
    assert fleet.answers(A)
    os.kill(fleet.replica(A), signal.SIGKILL)

    def loads() -> bool:
        starting = fleet.cluster.replicas(A, "STARTING").values()
        engines = [it for pid in starting if pid for it in descendants(pid)]
        loading = [it for it in engines if gpu_stand_in.phase(fleet.gpu, it) == "loading"]
        for engine in loading:
            os.kill(engine, signal.SIGKILL)
        return bool(loading)

    assert eventually(loads, PATIENCE_S, 0.02)
    fleet.is_well()


@pytest.mark.parametrize("moment", ["sleeping", "waking"])
def test_the_coordinator_may_die_at_every_step(fleet: Fleet, moment: str) -> None:
    processes = in_session(fleet.cluster.process.pid)
    [coordinator] = [pid for pid, title in processes.items() if "SwapActor" in title]
    assert fleet.answers(A)
    engine = fleet.engine(A if moment == "sleeping" else B)
    with fleet.asking(B) as got:
        assert eventually(lambda: gpu_stand_in.phase(fleet.gpu, engine) == moment, PATIENCE_S, 0.01)
        os.kill(coordinator, signal.SIGKILL)
    assert got[0].status_code == 200
    fleet.is_well()


def test_the_gateways_may_die_while_a_request_waits(fleet: Fleet) -> None:
    assert fleet.answers(A)
    gateways = fleet.cluster.replicas("gateway", deployment="Gateway").values()
    engine = fleet.engine(A)
    with fleet.asking(B):
        assert eventually(
            lambda: gpu_stand_in.phase(fleet.gpu, engine) == "sleeping", PATIENCE_S, 0.01
        )
        for gateway in gateways:
            os.kill(gateway, signal.SIGKILL)
    fleet.is_well()

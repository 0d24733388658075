"""One replica's part of ``serve-app admin``; the rest is in test_life_and_death.py."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from harness.command import refusal

from serve_app.cli import cli
from serve_app.cluster.exchange import Answer
from serve_app.cluster.serve import Application, ReplicaStatus
from serve_app.config.document import GATEWAY_IMPORT_PATH, MODEL_IMPORT_PATH
from serve_app.errors import UserError
from serve_app.local import admin
from serve_app.replica import sleep
from serve_app.replica.front_ends import FrontEnds
from serve_app.replica.load import EngineLoad


class Replica:
    """As much of an engine and its front ends as sleeping takes, without a GPU."""

    def __init__(self, *, running: int = 0, fails: bool = False) -> None:
        self.refuses = self.wakes = False
        self.llm = self
        model_config = SimpleNamespace(enable_sleep_mode=True)
        self.vllm_config = SimpleNamespace(model_config=model_config)
        self.running = running
        self.done: list[str] = []
        self._drained = asyncio.Event()
        self._fails = fails

    def finish(self) -> None:
        self.running = 0
        self._drained.set()

    async def asleep(self, asleep: bool) -> None:
        self.refuses = asleep

    async def drain(self, timeout_s: float) -> None:
        assert self.refuses  # nothing new comes in
        if self.running:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._drained.wait()

    async def sleep(self, level: int) -> None:
        assert level == 1 and not self.running
        self.done.append("sleep")
        if self._fails:
            raise RuntimeError("no host memory")

    async def wake_up(self) -> None:
        self.done.append("wake")


async def test_an_engine_falls_asleep_once_it_has_answered_what_it_has() -> None:
    engine: Any = Replica(running=2)
    its = sleep.Sleep(engine, engine)
    asked = asyncio.create_task(its.act("sleep"))
    woken = asyncio.create_task(its.act("wake"))
    await asyncio.sleep(0.05)
    assert engine.refuses and not engine.done
    engine.finish()
    assert (await asked, await woken) == ("asleep", "awake")
    assert engine.done == ["sleep", "wake"]  # one after the other
    assert not engine.refuses


async def test_an_engine_whose_requests_do_not_end_stays_awake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sleep, "DRAIN_S", 0.05)
    engine: Any = Replica(running=2)
    assert (
        await sleep.Sleep(engine, engine).act("sleep")
        == "not asleep: 2 requests still run; try again"
    )
    assert not engine.refuses and not engine.done


async def test_an_engine_that_cannot_sleep_serves_on() -> None:
    engine: Any = Replica(fails=True)
    with pytest.raises(RuntimeError, match="no host memory"):
        await sleep.Sleep(engine, engine).act("sleep")
    assert engine.done == ["sleep", "wake"]  # vLLM schedules nothing until it is woken
    assert not engine.refuses


@pytest.mark.parametrize("action", ["sleep", "wake"])
async def test_a_model_of_a_swap_group_sleeps_by_itself_alone(action: str) -> None:
    engine: Any = Replica()
    engine.wakes = True
    said = await sleep.Sleep(engine, engine).act(action)
    assert said == "refused: a model of a swap group sleeps and wakes by itself"
    assert not engine.done


def deployed(name: str, import_path: str, state: str) -> Application:
    replica = ReplicaStatus("r", state, "node", 0.0)
    return Application(name, "RUNNING", "", {"import_path": import_path}, 0.0, (replica,))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gateway", r"there is no model 'gateway' \(models: up, starting\)"),
        ("startin", "did you mean 'starting'"),
        ("starting", "'starting' has no running replica"),
    ],
)
def test_what_has_no_replica_to_call_is_refused(name: str, said: str) -> None:
    """Serve's own call waits for a replica without end."""
    applications = {
        "gateway": deployed("gateway", GATEWAY_IMPORT_PATH, "RUNNING"),
        "up": deployed("up", MODEL_IMPORT_PATH, "RUNNING"),
        "starting": deployed("starting", MODEL_IMPORT_PATH, "STARTING"),
    }
    admin.refuse("up", applications)
    with pytest.raises(UserError, match=said):
        admin.refuse(name, applications)


def test_a_cluster_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = refusal("admin", "m", "sleep", "--address", "127.0.0.1:9")
    assert line == (
        "serve-app: no Ray cluster answers at 127.0.0.1:9 (--address): Connection refused; start "
        "one there (`ray start --head`), or correct --address"
    )
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    [line] = refusal("admin", "m", "sleep")
    assert line.startswith("serve-app: no Ray cluster answers at 127.0.0.1:9 (RAY_ADDRESS)")


@pytest.mark.parametrize(
    ("said", "status"),
    [("asleep", 0), ("refused: sleep needs engine.enable_sleep_mode: true", 1),
     ("not asleep: 2 requests still run; try again", 1)],
)  # fmt: skip
def test_the_command_ends_as_its_replicas_do(
    monkeypatch: pytest.MonkeyPatch, said: str, status: int
) -> None:
    monkeypatch.setattr(admin, "broadcast", lambda *_: [("r1", "asleep"), ("r2", said)])
    done = CliRunner().invoke(cli, ["admin", "m", "sleep", "--address", "127.0.0.1:1"])
    assert (done.exit_code, done.output) == (status, f"r1: asleep\nr2: {said}\n")


@pytest.mark.parametrize("asleep", [True, False])
def test_gateways_hear_whether_the_engine_sleeps(asleep: bool) -> None:
    ours: Any = FrontEnds.__new__(FrontEnds)
    ours.first, ours.further, ours.over_plan = SimpleNamespace(running=0), [], 0
    ours._engine = SimpleNamespace(asleep=asleep, busy=False, wakes=True, cache_drops=0)
    told = ours.told(EngineLoad("m"))
    assert Answer.decode(Answer("", 0, load=told).encode()).load == told
    assert (told.asleep, told.wakes) == (asleep, True)

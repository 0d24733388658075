"""The model of costs, the fleet that is played, and what of Ray's private parts it stands for."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any, get_args

import pytest
from ray.serve._private import application_state, deployment_state, replica

from benchmarks.scale import stand_in
from benchmarks.scale.fleet import Fleet
from benchmarks.scale.model import BUSY, COSTS, plan
from benchmarks.scale.model import Fleet as Wanted
from serve_app.gateway.directory import read_details


def test_events_decide_the_number_of_gateways() -> None:
    few, many = plan(Wanted(1000)), plan(Wanted(10_000))
    assert few.gateways < many.gateways and few.late_gateways <= few.gateways
    assert plan(Wanted(10_000, tokens_per_s=3)).gateways < many.gateways
    assert plan(Wanted(10_000), slower=0.5).gateways < many.gateways
    each = many.relaying_cores / many.gateways + many.knowing_cores
    assert each <= BUSY < each * many.gateways / (many.gateways - 1)


def test_streams_that_are_silent_need_gateways_for_their_sockets() -> None:
    silent = Wanted(100_000, tokens_per_s=0, requests_per_s=0, replicas=500)
    assert plan(silent, files=20_000).gateways == 11
    assert plan(silent, files=20_000).gateway_files <= 20_000


def test_a_fleet_that_no_gateway_can_know_is_refused() -> None:
    with pytest.raises(ValueError, match="knowing the replicas"):
        plan(Wanted(1, replicas=int(1 / COSTS.front_end_s)))


def test_the_controller_gets_busier_with_replicas_and_with_gateways_and_never_more_than_busy() -> (
    None
):
    busy = [plan(Wanted(n, replicas=m)).controller for m in (10, 1000) for n in (10, 10_000)]
    assert busy == sorted(busy) and busy[0] < 0.05
    assert plan(Wanted(10**6, replicas=5000)).controller <= 1


def test_a_played_fleet_is_what_the_gateway_reads() -> None:
    fleet = Fleet(models=3, replicas=8, first_port=20_000)
    models = read_details(fleet.report())
    assert {name: it.replicas for name, it in models.items()} == {
        name: len(fleet.places(name)) for name in fleet.names
    }
    assert all(
        it.up and it.config and it.ids[1:] == (f"alias-of-{it.name}",) for it in models.values()
    )
    places = [place for name in fleet.names for place in fleet.places(name).values()]
    assert sorted(port for _, port in places) == [*range(20_000, 20_008)]


def test_a_played_replica_answers_as_ray_s_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stand_in.FIRST_PORT_ENV, "20000")
    players = stand_in.Players()

    async def ready(id: str) -> tuple[Any, ...]:
        return await players.ready(id, "m", "version", "config", "rank", None)

    one, two = asyncio.run(ready("a")), asyncio.run(ready("b"))
    assert len(one) == len(get_args(replica.ReplicaMetadata))
    assert (one[0], one[1], one[7]) == ("config", "version", "rank")
    assert [it[-1]["port"] for it in (one, two, asyncio.run(ready("a")))] == [20000, 20001, 20000]


def test_ray_still_has_what_is_replaced() -> None:
    start = inspect.signature(deployment_state.ActorReplicaWrapper.start)
    assert "deployment_info" in start.parameters
    made = inspect.getsource(deployment_state.DeploymentReplica.__init__)
    assert "ActorReplicaWrapper(" in made
    assert callable(application_state.build_serve_application._function)

"""Placement on a real Ray control plane: fake nodes with fake GPUs, no engine.

One cluster for the whole module: nodes a, b and c with 8, 8 and 4 GPUs. Fillers take GPUs away.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from harness import fake_nodes
from harness.processes import title
from ray import serve
from ray.cluster_utils import Cluster
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from serve_app.cluster import capacity, kv, placement
from serve_app.cluster import serve as serve_cluster
from serve_app.cluster.replicas import Watcher
from serve_app.config.settings import ModelConfig, Resources
from serve_app.errors import ConfigError
from serve_app.gateway.replicas import Board
from serve_app.local import named
from serve_app.replica import gang
from serve_app.replica.start import plugin

TOTAL = {"a": 8, "b": 8, "c": 4}


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The cluster's node ids and their names."""
    with fake_nodes.connected(start):
        yield {node["NodeID"]: node["Labels"].get("name", "head") for node in ray.nodes()}


def start(fake: Cluster) -> None:
    fake.add_node(num_cpus=2, include_dashboard=False, **fake_nodes.SMALL)
    for name, gpus in TOTAL.items():
        fake.add_node(
            num_cpus=8,
            num_gpus=gpus,
            labels={"name": name},
            resources={"accelerator_type:L40S" if name == "c" else "accelerator_type:H100": 1},
            **fake_nodes.SMALL,
        )


def until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.05)


@pytest.fixture
def keep(cluster: dict[str, str]) -> Iterator[Callable[[PlacementGroup], PlacementGroup]]:
    """Placement groups that are removed after the test."""
    groups: list[PlacementGroup] = []

    def remember(group: PlacementGroup) -> PlacementGroup:
        groups.append(group)
        return group

    yield remember
    for group in groups:
        remove_placement_group(group)
    until(lambda: free_gpus() == TOTAL, "free cluster")


def free_gpus() -> dict[str, int]:
    by_node = ray._private.state.available_resources_per_node()
    return {
        node["Labels"]["name"]: int(by_node.get(node["NodeID"], {}).get("GPU", 0))
        for node in ray.nodes()
        if "name" in node["Labels"]
    }


def take(keep: Callable[[PlacementGroup], PlacementGroup], **gpus: int) -> None:
    """Leave only these GPUs free."""
    for name, free in gpus.items():
        if free < TOTAL[name]:
            bundle = {"GPU": TOTAL[name] - free}
            group = placement_group([bundle], bundle_label_selector=[{"name": name}])
            assert keep(group).wait(30)
    until(lambda: free_gpus() == gpus, "filled cluster")


def place(**engine: Any) -> placement.Placement:
    resources = engine.pop("resources", Resources())
    return placement.of(ModelConfig(model="m", engine=engine, resources=resources))


def ask(found: placement.Placement) -> PlacementGroup:
    """What Serve does with the options (ray/serve/_private/default_impl.py:60)."""
    return placement_group(found.bundles * found.ranks, strategy="PACK")


def is_placed(group: PlacementGroup) -> bool:
    return bool(placement_group_table(group)["state"] == "CREATED")


def nodes_of(group: PlacementGroup, names: dict[str, str]) -> list[str]:
    table = placement_group_table(group)["bundles_to_node_id"]
    return [names[table[bundle]] for bundle in sorted(table)]


@pytest.mark.parametrize(
    ("tp", "pp", "free", "expected"),
    [
        (8, 1, (6, 8, 4), ["b"]),
        (4, 2, (4, 8, 4), ["b", "b"]),  # the world fits on one node
        (4, 2, (6, 2, 4), ["a", "c"]),  # 6 + 2 would be 8 GPUs, in the wrong places
        (4, 2, (4, 3, 4), ["a", "c"]),
        (4, 2, (7, 3, 3), None),
        (2, 3, (2, 2, 2), ["a", "b", "c"]),
        (2, 3, (3, 1, 4), ["a", "c", "c"]),
        (3, 4, (8, 5, 4), ["a", "a", "b", "c"]),
        (8, 2, (8, 7, 4), None),
    ],
)
def test_a_group_lies_on_one_node_or_nothing_is_taken(
    cluster: dict[str, str],
    keep: Callable[[PlacementGroup], PlacementGroup],
    tp: int,
    pp: int,
    free: Sequence[int],
    expected: list[str] | None,
) -> None:
    take(keep, **dict(zip(TOTAL, free, strict=True)))
    found = place(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    now = capacity.nodes()
    capacity.refuse_unplaceable(found, now)
    group = keep(ask(found))
    if expected is None:
        waiting = capacity.waiting_for(found, now)
        assert waiting is not None
        assert f"has {free[0]} of 8 H100 GPUs free" in waiting
        assert not group.wait(1)
        assert free_gpus() == dict(zip(TOTAL, free, strict=True))
    else:
        assert capacity.waiting_for(found, now) is None
        assert group.wait(30)
        nodes = nodes_of(group, cluster)
        assert sorted(nodes) == expected
        order = placement.stage_bundles(nodes, pp)
        assert order[0] == 0
        crossings = sum(nodes[a] != nodes[b] for a, b in itertools.pairwise(order))
        assert crossings == len(set(nodes)) - 1


def test_what_waits_is_placed_once_there_is_room(
    cluster: dict[str, str], keep: Callable[[PlacementGroup], PlacementGroup]
) -> None:
    blocker = placement_group([{"GPU": 5}], bundle_label_selector=[{"name": "a"}])
    assert blocker.wait(30)
    take_b = keep(placement_group([{"GPU": 8}], bundle_label_selector=[{"name": "b"}]))
    assert take_b.wait(30)
    group = keep(ask(place(tensor_parallel_size=4, pipeline_parallel_size=2)))
    assert not group.wait(1)
    remove_placement_group(blocker)
    assert group.wait(30)
    assert nodes_of(group, cluster) == ["a", "a"]


def test_replicas_that_ask_at_once_get_all_or_wait(
    cluster: dict[str, str], keep: Callable[[PlacementGroup], PlacementGroup]
) -> None:
    take(keep, a=4, b=8, c=4)  # room for four groups of four
    found = place(tensor_parallel_size=4, pipeline_parallel_size=2)
    with ThreadPoolExecutor(3) as threads:
        groups = [keep(group) for group in threads.map(ask, [found] * 3)]
    until(lambda: sum(map(is_placed, groups)) == 2, "two placed replicas")
    (waits,) = [group for group in groups if not is_placed(group)]
    placed = [group for group in groups if group != waits]
    assert sorted(nodes_of(placed[0], cluster) + nodes_of(placed[1], cluster)) == [
        "a", "b", "b", "c",
    ]  # fmt: skip
    remove_placement_group(placed[0])
    assert waits.wait(30)


def test_the_type_of_gpu_is_honoured(
    cluster: dict[str, str], keep: Callable[[PlacementGroup], PlacementGroup]
) -> None:
    resources = Resources(accelerator_type="L40S")
    group = keep(ask(place(tensor_parallel_size=2, pipeline_parallel_size=2, resources=resources)))
    assert group.wait(30)
    assert nodes_of(group, cluster) == ["c", "c"]
    wider = place(tensor_parallel_size=8, resources=resources)
    with pytest.raises(ConfigError, match="no room for the model"):
        capacity.refuse_impossible(wider)


def test_nothing_is_refused_where_nodes_may_still_come(
    cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    too_large = place(tensor_parallel_size=16)
    with pytest.raises(ConfigError, match="has 8 of 8 H100 GPUs free"):
        capacity.refuse_impossible(too_large)
    monkeypatch.setenv("RAY_CLUSTER_NAME", "made by KubeRay")
    capacity.refuse_impossible(too_large)


def test_vllms_executor_starts_each_rank_in_its_stages_bundle(
    cluster: dict[str, str], keep: Callable[[PlacementGroup], PlacementGroup]
) -> None:
    """vLLM's own executor code, in a process that joins Ray as EngineCore does: as a new job.

    Only its workers are stand-ins, which tell where they are.
    """
    pytest.importorskip("vllm.v1.executor.ray_executor_v2")
    take(keep, a=2, b=8, c=2)
    group = keep(
        placement_group(
            [{"GPU": 2, "CPU": 1}, {"GPU": 2}, {"GPU": 2}],
            bundle_label_selector=[{"name": "b"}, {"name": "a"}, {"name": "b"}],
        )
    )
    assert group.wait(30)
    order = placement.stage_bundles(nodes_of(group, cluster), 3)
    assert order == [0, 2, 1]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fake_engine_core.py")), group.id.hex()],
        env=os.environ
        | {
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "PYTHONPATH": str(Path(placement.__file__).parents[1]),
            placement.STAGES_ENV: ",".join(map(str, order)),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["job"] != ray.get_runtime_context().get_job_id()
    ranks = told["ranks"]
    assert [cluster[rank["node"]] for rank in ranks] == ["b", "b", "b", "b", "a", "a"]
    assert [rank["bundle"] for rank in ranks] == [0, 0, 2, 2, 1, 1]
    assert [rank["local_rank"] for rank in ranks] == [0, 1, 2, 3, 0, 1]
    assert len({(rank["node"], rank["gpu"]) for rank in ranks}) == 6


def test_a_gang_is_placed_as_one_and_its_members_find_rank_0(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    """Two data-parallel ranks of TP 2, PP 2, deployed by Serve."""
    last_request, ends = tmp_path / "last request", tmp_path / "the other ends"
    model = ModelConfig(
        model="m",
        engine={"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 2},
    )
    found = placement.of(model)

    @serve.deployment(num_replicas=found.ranks, **found.options())
    class Member:
        async def __init__(self) -> None:
            self.joined = await gang.join(found.stages, timeout_s=60)
            group = ray.util.get_current_placement_group()
            table = placement_group_table(group)["bundles_to_node_id"]
            nodes = [table[bundle] for bundle in sorted(table)]
            self.joined["stages"] = placement.stage_bundles(nodes, found.stages, gang.member())
            self.joined["gpus"] = ray.get_runtime_context().get_assigned_resources().get("GPU", 0)

        def record_replica_metadata(self) -> dict[str, Any]:
            return {"host": "127.0.0.1", "port": 1 + gang.member(), "max_model_len": 4}

        def __call__(self) -> dict[str, Any]:
            return self.joined

        async def __del__(self) -> None:
            if gang.member() == 1:
                await asyncio.sleep(3)  # still has requests
                last_request.touch()
            await gang.drained(60)
            if gang.member() == 0:
                ends.write_text(f"after the last request: {last_request.exists()}")

    serve.start(proxy_location="Disabled")
    handle = serve.run(Member.bind(), name="gang", route_prefix=None)
    members: dict[int, dict[str, Any]] = {}

    def asked_both() -> bool:
        member = handle.remote().result(timeout_s=30)
        members[member["data_parallel_rank"]] = member
        return len(members) == 2

    until(asked_both, "answer of both members")
    assert sorted(members) == [0, 1]
    assert members[0]["data_parallel_rpc_port"] == members[1]["data_parallel_rpc_port"]
    assert members[0]["data_parallel_address"] == members[1]["data_parallel_address"]
    assert sorted(members[0]["stages"]) == [0, 1]
    assert sorted(members[1]["stages"]) == [2, 3]
    assert members[0]["gpus"] == members[1]["gpus"] == 0  # its workers take them, not it
    assert sum(TOTAL.values()) - sum(free_gpus().values()) == 8
    its_place_in_serve_is_read(cluster, "gang", "Member", replicas=2)
    serve.delete("gang")
    # A rank that ended while the other one has requests would take those along.
    assert ends.read_text() == "after the last request: True"
    until(lambda: free_gpus() == TOTAL, "GPUs given back")


def its_place_in_serve_is_read(
    cluster: dict[str, str], application: str, deployment: str, replicas: int
) -> None:
    """All that is asked of Serve without a public function for it, of the pinned Ray."""
    report = serve_cluster.report(timeout_s=30)
    found = serve_cluster.applications(report or {})[application]
    assert (found.status, found.message) == ("RUNNING", "")
    assert [r.state for r in found.replicas] == ["RUNNING"] * replicas
    assert {r.node for r in found.replicas} <= cluster.keys()
    assert all(0 < time.time() - r.started < 600 for r in found.replicas)

    async def fed() -> Board:
        told = asyncio.Event()

        class Told(Board):
            def publish(self, *args: Any) -> None:
                super().publish(*args)
                told.set()

        board = Told()
        Watcher(board, deployment).watch(application)
        async with asyncio.timeout(30):
            await told.wait()
        return board

    board = asyncio.run(fed())
    live = board.live(application)
    assert {r.id for r in live} == {r.id for r in found.replicas}
    assert sorted((r.host, r.port) for r in live) == [("127.0.0.1", 1), ("127.0.0.1", 2)]
    assert board.max_model_len == {application: 4}

    address = ray.get_runtime_context().gcs_address
    asked, listens, applications = named._ask(address)
    assert (asked, applications) == (address, [application])
    assert listens is not None and listens["port"] == 8000

    # By their names `serve-app logs` tells models apart (serve_app.kuberay.live.podlogs).
    names = {f"replica_{application}_{deployment}_{r.id}.log" for r in found.replicas}
    logs = Path(os.environ["RAY_TMPDIR"]).glob("**/logs/serve/replica_*.log")
    assert {log.name for log in logs} == names


def test_a_value_in_the_gcs_is_put_read_and_deleted(cluster: dict[str, str]) -> None:
    kv.put_first("test", b"1")
    kv.put_first("test", b"2")
    assert (kv.get("test"), kv.exists("test")) == (b"1", True)
    kv.put("test", b"3")
    assert kv.get("test") == b"3"
    kv.delete("test")
    assert (kv.get("test"), kv.exists("test")) == (None, False)


def parts_on_gpus(shares: Sequence[float], kind: str, names: dict[str, str]) -> list[list[Any]]:
    """Where Serve and Ray put a replica for each share: its node and its GPU there."""

    @serve.deployment
    class Part:
        def __call__(self) -> list[Any]:
            context = ray.get_runtime_context()
            [gpu] = ray.get_gpu_ids()
            assert os.environ["CUDA_VISIBLE_DEVICES"] == str(gpu)
            return [names[context.get_node_id()], int(gpu)]

    found = []
    try:
        for number, share in enumerate(shares):
            resources = Resources(gpu_share=share, accelerator_type=kind, num_cpus=0.1)
            options = place(resources=resources).options()
            part = Part.options(**options).bind()  # type: ignore[attr-defined]
            handle = serve.run(part, name=f"part-{number}", route_prefix=None)
            found.append(handle.remote().result())
    finally:
        with ThreadPoolExecutor() as pool:  # Serve gives each some seconds to drain
            list(pool.map(serve.delete, [f"part-{number}" for number in range(len(shares))]))
    until(lambda: free_gpus() == TOTAL, "GPUs given back")
    return found


def test_parts_fill_one_gpu_of_a_node_before_the_next(cluster: dict[str, str]) -> None:
    """What planner/together.py adds up: the fullest GPU that has room."""
    found = parts_on_gpus((0.5, 0.3, 0.4, 0.2, 0.6), "L40S", cluster)
    assert {node for node, _ in found} == {"c"}
    first, *others = [gpu for _, gpu in found]
    assert others == [first, others[1], first, others[1]] and others[1] != first


def test_serve_spreads_parts_over_nodes_of_a_kind(cluster: dict[str, str]) -> None:
    """Each node's GPUs are filled one by one, but the nodes are taken in turn."""
    assert {node for node, _ in parts_on_gpus((0.3, 0.3), "H100", cluster)} == {"a", "b"}


def test_an_engines_worker_does_not_outlive_its_raylet(cluster: dict[str, str]) -> None:
    """The last test of this file: it costs a node."""

    @ray.remote(num_cpus=0, resources={"accelerator_type:L40S": 0.001})
    class Worker:
        """As vLLM starts its workers: by name they are the engine's, and they load its plugins."""

        def __init__(self) -> None:
            os.environ[plugin.START_FOLDER] = "/nowhere"
            plugin.prepare()

        def pids(self) -> tuple[int, int]:
            return os.getpid(), os.getppid()

    worker = Worker.remote()
    pid, raylet = ray.get(worker.pids.remote())
    assert "raylet" in title(raylet)
    os.kill(raylet, signal.SIGKILL)
    until(lambda: not title(pid), "end of the worker")

"""Swap groups on a real Ray control plane: fake nodes with fake GPUs, no engine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from harness import fake_nodes
from harness.processes import eventually
from ray import serve
from ray.cluster_utils import Cluster

from serve_app.cluster import swap_actor
from serve_app.cluster.swap import Order, Report
from serve_app.cluster.swap_actor import Coordinator, part, reserve


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A head without GPUs and two nodes with two each."""
    with fake_nodes.connected(start, namespace="serve"):
        serve.start(proxy_location="Disabled")
        yield


def start(fake: Cluster) -> None:
    fake.add_node(num_cpus=4, include_dashboard=False, **fake_nodes.SMALL)
    for _ in range(2):
        fake.add_node(num_cpus=8, num_gpus=2, **fake_nodes.SMALL)


@serve.deployment
class Member:
    """A replica that tells where it is."""

    def __call__(self) -> tuple[str, list[Any], str | None]:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids(), visible


def test_models_of_a_swap_group_share_one_gpu_and_nobody_else_gets_it(cluster: None) -> None:
    """Two groups of three at once, beside whoever asks for parts of a GPU or for whole ones."""
    ids = {group: reserve(group, {"GPU": 1.0}) for group in ("big", "small")}
    assert ids["big"] == reserve("big", {"GPU": 1.0}) == swap_actor.id_of("big") != ids["small"]

    def run(actors: dict[str, dict[str, Any]]) -> list[tuple[str, list[Any], str | None]]:
        """What a replica of each says that asks Ray for this."""
        targets = [
            serve.RunTarget(
                Member.options(ray_actor_options={"num_cpus": 0.1} | asked).bind(),  # type: ignore[attr-defined]
                name=name,
                route_prefix=None,
            )
            for name, asked in actors.items()
        ]
        return [handle.remote().result() for handle in serve.run_many(targets)]

    members = {(group, n): {"num_gpus": 0, "resources": part(id, gpu=True)}
               for n in range(3) for group, id in ids.items()}  # fmt: skip
    found = run({f"{group}{n}": asked for (group, n), asked in members.items()})
    at = dict(zip(members, found, strict=True))
    shares = run({f"share{n}": {"num_gpus": 0.5} for n in range(4)})
    places = {group: {(node, *gpus) for (of, _), (node, gpus, _) in at.items() if of == group}
              for group in ids}  # fmt: skip
    assert [len(it) for it in places.values()] == [1, 1]
    assert places["big"] != places["small"]
    assert all(visible == str(gpus[0]) for _, gpus, visible in at.values())
    elsewhere = {(node, *gpus) for node, gpus, _ in shares}
    assert not elsewhere & (places["big"] | places["small"]) and len(elsewhere) == 2


def test_the_coordinator_answers_reports_and_knows_all_again_after_a_kill(cluster: None) -> None:
    member = Coordinator("orders")
    asleep = Report("a", "asleep", wants_s=1.0)

    def ordered() -> Order | None:
        return member.exchange(asleep, lambda: False)

    order = eventually(ordered, 20)
    assert order and order.wake and order.slot == 0
    actor = swap_actor._actor("orders")
    ray.kill(actor, no_restart=False)
    awake = Report("a", "awake", 0, busy=False, awake_s=9.0, heard=order.id)
    other = Coordinator("orders")

    def asked_to_sleep() -> bool:
        try:
            other.exchange(Report("b", "asleep", wants_s=0.5), lambda: True)
            order = member.exchange(awake, lambda: False)
        except Exception:  # it is just restarting
            time.sleep(0.1)
            return False
        return bool(order and not order.wake)

    assert eventually(asked_to_sleep, 60)


def test_news_is_not_held_up_by_an_answer_that_has_nothing_to_say(cluster: None) -> None:
    member = Coordinator("news")
    news = iter([False, True])
    assert member.exchange(Report("a", "asleep"), lambda: next(news)) is None

"""What is asked of Ray, when it can be had, and which bundle is whose: without a cluster."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import serve

from serve_app.cluster import capacity, placement
from serve_app.cluster.capacity import Node
from serve_app.cluster.placement import Placement
from serve_app.config.settings import ModelConfig, Resources
from serve_app.errors import ConfigError


def place(**engine: Any) -> Placement:
    resources = engine.pop("resources", Resources())
    return placement.of(ModelConfig(model="m", engine=engine, resources=resources))


def gpus(*free: float, of: float | None = None, cpus: float = 64, kind: str = "") -> list[Node]:
    """A cluster of nodes with ``free`` GPUs each."""
    kinds = {f"accelerator_type:{kind}": 1.0} if kind else {}
    return [
        Node(
            f"10.0.0.{index}",
            {"GPU": float(of or number), "CPU": cpus, **kinds},
            {"GPU": float(number), "CPU": cpus, **kinds},
        )
        for index, number in enumerate(free, 1)
    ]


# What is asked for


def test_one_gpu_is_one_bundle_and_the_replica_itself_takes_none() -> None:
    options = place().options()
    assert options["placement_group_bundles"] == [{"CPU": 1.0, "GPU": 1.0}]
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0}


def test_a_tensor_parallel_group_is_one_bundle() -> None:
    options = place(tensor_parallel_size=8).options()
    assert options["placement_group_bundles"] == [{"CPU": 1.0, "GPU": 8.0}]


def test_each_pipeline_stage_is_a_bundle() -> None:
    found = place(tensor_parallel_size=4, pipeline_parallel_size=2)
    assert found.bundles == [{"CPU": 1.0, "GPU": 4.0}, {"GPU": 4.0}]
    assert found.options()["placement_group_strategy"] == "PACK"
    assert found.engine_defaults == {"distributed_executor_backend": "ray"}


def test_context_parallel_ranks_belong_to_the_stage() -> None:
    assert place(tensor_parallel_size=2, prefill_context_parallel_size=2).bundles == [
        {"CPU": 1.0, "GPU": 4.0}
    ]


def test_the_replicas_own_needs_are_in_the_first_bundle_alone() -> None:
    resources = Resources(num_cpus=6, memory_gib=2, accelerator_type="H100")
    found = place(tensor_parallel_size=2, pipeline_parallel_size=2, resources=resources)
    kind = {"accelerator_type:H100": 0.001}
    assert found.bundles == [
        {"CPU": 6.0, "memory": 2 * 2**30, "GPU": 2.0, **kind},
        {"GPU": 2.0, **kind},
    ]
    assert found.options()["ray_actor_options"] == {
        "num_cpus": 6.0,
        "num_gpus": 0,
        "memory": 2 * 2**30,
    }


def test_data_parallel_ranks_are_a_gang() -> None:
    options = place(data_parallel_size=4, tensor_parallel_size=2).options()
    assert options["placement_group_bundles"] == [{"CPU": 1.0, "GPU": 2.0}]
    assert options["gang_scheduling_config"]["gang_size"] == 4
    assert options["gang_scheduling_config"]["runtime_failure_policy"] == "RESTART_GANG"
    assert "placement_group_strategy" not in options  # Serve refuses both


def test_a_cpu_model_asks_for_no_placement_group() -> None:
    found = place(tensor_parallel_size=2, resources=Resources(device="cpu", num_cpus=2))
    assert found.options() == {"ray_actor_options": {"num_cpus": 2.0, "num_gpus": 0}}
    assert found.engine_defaults == {"distributed_executor_backend": "mp"}
    assert place(resources=Resources(device="cpu")).engine_defaults == {}


def test_vllms_own_processes_need_the_replica_to_hold_the_gpus() -> None:
    resources = Resources(accelerator_type="L40S")
    found = place(
        distributed_executor_backend="mp",
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        resources=resources,
    )
    assert found.options() == {
        "ray_actor_options": {
            "num_cpus": 1.0,
            "num_gpus": 4.0,
            "resources": {"accelerator_type:L40S": 0.001},
        }
    }


def test_a_part_of_a_gpu_is_the_replicas_own_without_a_placement_group() -> None:
    found = place(resources=Resources(gpu_share=0.3, accelerator_type="L40S"))
    assert found.options() == {
        "ray_actor_options": {
            "num_cpus": 1.0,
            "num_gpus": 0.3,
            "resources": {"accelerator_type:L40S": 0.001},
        }
    }
    assert found.engine_defaults == {"distributed_executor_backend": "uni"}
    assert str(found) == "0.3 of an L40S GPU on one node with 1 CPU"


def test_parts_of_two_gpus_do_not_add_up_to_one() -> None:
    found = place(resources=Resources(gpu_share=0.6))
    assert capacity.fits(found, [gpus(1)[0].total])
    assert not capacity.fits(found, [{"GPU": 0.5, "CPU": 9}])
    each = [placement.of(ModelConfig(model="m", resources=Resources(gpu_share=0.3)))] * 2
    assert capacity._times(each[0].head, {"GPU": 2.0, "CPU": 64}) == 6  # three on each
    assert capacity._times(found.head, {"GPU": 2.4, "CPU": 64}) == 2
    assert "0.6 of a GPU on one node" in str(capacity.waiting_for(found, gpus(0.5, of=1)))


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"tensor_parallel_size": 4, "pipeline_parallel_size": 2},
        {"tensor_parallel_size": 4, "data_parallel_size": 2},
        {"distributed_executor_backend": "mp", "tensor_parallel_size": 2},
    ],
)
@pytest.mark.parametrize("resources", [{}, {"accelerator_type": "H100", "memory_gib": 1}])
def test_serve_takes_the_options(engine: dict[str, Any], resources: dict[str, Any]) -> None:
    found = place(**engine, resources=Resources(**resources))

    @serve.deployment
    class Deployment:
        pass

    built = Deployment.options(num_replicas=found.ranks, **found.options())
    assert built.ray_actor_options["num_cpus"] == 1.0


@pytest.mark.parametrize(
    ("engine", "part"),
    [
        ({"distributed_executor_backend": "external_launcher"}, "can run 'ray'"),
        ({"data_parallel_size_local": 2}, "data_parallel_size_local is not yours"),
        ({"data_parallel_external_lb": True}, "data_parallel_external_lb is not yours"),
        ({"data_parallel_backend": "ray"}, "data_parallel_backend is not yours"),
    ],
)
def test_other_launchers_are_refused(engine: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        place(**engine)


def test_rays_executor_is_refused_on_cpus() -> None:
    with pytest.raises(ConfigError, match="cannot do on CPUs"):
        place(distributed_executor_backend="ray", resources=Resources(device="cpu"))


def test_the_order_of_ranks_is_not_the_users() -> None:
    config = ModelConfig(model="m", env={"VLLM_RAY_BUNDLE_INDICES": "0"})
    with pytest.raises(ConfigError, match="not yours to set"):
        placement.of(config)


# Whether it can be had


def free(cluster: Sequence[Node]) -> list[Mapping[str, float]]:
    return [node.free for node in cluster]


@pytest.mark.parametrize(
    ("tp", "pp", "nodes", "fits"),
    [
        (4, 2, (8,), True),
        (4, 2, (4, 4), True),
        (4, 2, (6, 2), False),  # eight GPUs, but no second group of four
        (4, 2, (6, 4), True),
        (2, 3, (2, 2, 2), True),
        (2, 3, (3, 3), False),
        (2, 3, (5, 3), True),
        (8, 1, (4, 4), False),
        (8, 1, (7, 8, 1), True),
        (1, 1, (), False),
        (1, 8, (1,) * 8, True),
    ],
)
def test_groups_are_counted_node_by_node(
    tp: int, pp: int, nodes: tuple[int, ...], fits: bool
) -> None:
    found = place(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    assert capacity.fits(found, free(gpus(*nodes))) is fits


def test_the_replica_needs_cores_on_one_of_the_nodes() -> None:
    found = place(tensor_parallel_size=4, pipeline_parallel_size=2, resources=Resources(num_cpus=8))
    assert not capacity.fits(found, free(gpus(4, 4, cpus=7)))
    assert capacity.fits(found, free([*gpus(4, cpus=0), *gpus(4, cpus=8)]))


def test_a_gang_fits_as_a_whole_or_not() -> None:
    found = place(data_parallel_size=4, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert capacity.fits(found, free(gpus(8, 8)))
    assert not capacity.fits(found, free(gpus(8, 7)))


def test_the_type_of_gpu_is_honoured() -> None:
    found = place(tensor_parallel_size=4, resources=Resources(accelerator_type="H100"))
    assert not capacity.fits(found, free(gpus(8, kind="L40S")))
    assert capacity.fits(found, free(gpus(8, kind="H100")))


cluster_of = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 4), st.integers(0, 3)), max_size=4
).map(
    lambda nodes: [{"GPU": float(g), "CPU": float(c), "memory": m * 2.0**30} for g, c, m in nodes]
)
wanted = st.builds(
    lambda tp, pp, dp, cpus, memory: place(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        data_parallel_size=dp,
        resources=Resources(num_cpus=cpus, memory_gib=memory),
    ),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.sampled_from([None, 1, 2]),
)


@settings(max_examples=300, deadline=None)
@given(wanted, cluster_of)
def test_it_fits_exactly_where_some_assignment_exists(
    found: Placement, nodes: list[dict[str, float]]
) -> None:
    bundles = found.bundles * found.ranks
    exists = any(
        _holds(nodes, bundles, chosen)
        for chosen in itertools.product(range(len(nodes)), repeat=len(bundles))
    )
    assert capacity.fits(found, nodes) is exists


@settings(max_examples=500, deadline=None)
@given(wanted, cluster_of)
def test_rays_packing_places_whatever_fits_and_splits_no_group(
    found: Placement, nodes: list[dict[str, float]]
) -> None:
    bundles = found.bundles * found.ranks
    chosen = _ray_pack(nodes, bundles)
    assert (chosen is not None) is capacity.fits(found, nodes)
    if chosen is not None:
        assert _holds(nodes, bundles, chosen)


def _holds(
    nodes: list[dict[str, float]], bundles: list[dict[str, float]], chosen: Sequence[int]
) -> bool:
    left = [dict(node) for node in nodes]
    for bundle, node in zip(bundles, chosen, strict=True):
        for name, amount in bundle.items():
            left[node][name] = left[node].get(name, 0) - amount
            if left[node][name] < 0:
                return False
    return True


def _ray_pack(nodes: list[dict[str, float]], bundles: list[dict[str, float]]) -> list[int] | None:
    """Ray's PACK (src/ray/raylet/scheduling/policy/bundle_scheduling_policy.cc).

    Bundles by size; the best node for the first, then all others that fit on it; then the rest
    on the nodes that are left. The best node is the one with the largest share left free.
    """
    order = sorted(
        range(len(bundles)),
        key=lambda i: tuple(-bundles[i].get(name, 0) for name in ("GPU", "memory", "CPU")),
    )
    left = {index: dict(node) for index, node in enumerate(nodes)}
    chosen: dict[int, int] = {}

    def has_room(node: dict[str, float], bundle: dict[str, float]) -> bool:
        return all(node.get(name, 0) >= amount for name, amount in bundle.items())

    def score(node: dict[str, float], bundle: dict[str, float]) -> float:
        return sum((node[name] - amount) / node[name] for name, amount in bundle.items() if amount)

    while order:
        first = bundles[order[0]]
        candidates = [index for index, node in left.items() if has_room(node, first)]
        if not candidates:
            return None
        best = max(candidates, key=lambda index: score(left[index], first))
        node = left.pop(best)
        for index in list(order):
            if has_room(node, bundles[index]):
                chosen[index] = best
                order.remove(index)
                for name, amount in bundles[index].items():
                    node[name] -= amount
    return [chosen[index] for index in range(len(bundles))]


# What is said when it cannot


def refusal(found: Placement, cluster: list[Node]) -> str:
    with pytest.raises(ConfigError) as refused:
        capacity.refuse_unplaceable(found, cluster)
    return str(refused.value)


def test_a_refusal_says_what_every_node_has_and_what_would_fit() -> None:
    assert refusal(place(tensor_parallel_size=8), gpus(4, 1, of=4, kind="L40S")) == (
        "this cluster has no room for the model: a replica needs 8 GPUs on one node with "
        "1 CPU; 10.0.0.1 has 4 of 4 L40S GPUs free, 10.0.0.2 has 1 of 4 L40S GPUs free; "
        "tensor_parallel_size 4 with pipeline_parallel_size 2 would fit"
    )


def test_a_refusal_without_any_gpu() -> None:
    laptop = [Node("laptop", {"CPU": 8.0}, {"CPU": 8.0})]
    assert "no node of the cluster has a GPU" in refusal(place(), laptop)


def test_a_refusal_for_the_type_names_the_types_there_are() -> None:
    found = place(resources=Resources(accelerator_type="H100"))
    text = refusal(found, gpus(8, kind="L40S"))
    assert "1 H100 GPU on one node" in text
    assert "8 of 8 L40S GPUs free" in text
    assert text.endswith("change resources.accelerator_type (here: L40S)")


def test_a_refusal_names_what_else_is_short() -> None:
    found = place(tensor_parallel_size=4, resources=Resources(num_cpus=96, memory_gib=0.5))
    cluster = [Node("10.0.0.1", {"GPU": 4, "CPU": 64, "memory": 2**30}, {"GPU": 4, "CPU": 7})]
    text = refusal(found, cluster)
    assert "4 GPUs on one node with 96 CPU and 0.5 GiB of memory" in text
    assert "has 4 of 4 GPUs and 7 of 64 CPUs and 0 of 1 GiB of memory free" in text
    assert text.endswith("lower resources.num_cpus")


def test_a_cpu_model_is_told_about_cores() -> None:
    found = place(resources=Resources(device="cpu", num_cpus=16))
    text = refusal(found, [Node("laptop", {"CPU": 8.0}, {"CPU": 6.0})])
    assert "needs a node with 16 CPU; laptop has 6 of 8 CPUs free" in text


def test_busy_gpus_are_waited_for_and_not_refused() -> None:
    found = place(tensor_parallel_size=4, pipeline_parallel_size=2)
    busy = gpus(6, 2, of=8)
    capacity.refuse_unplaceable(found, busy)
    waiting = capacity.waiting_for(found, busy)
    assert waiting is not None
    assert "2 groups of 4 GPUs, each group on one node" in waiting
    assert "10.0.0.1 has 6 of 8 GPUs free, 10.0.0.2 has 2 of 8 GPUs free" in waiting
    assert capacity.waiting_for(found, gpus(6, 4, of=8)) is None


def test_a_large_cluster_is_not_listed_in_full() -> None:
    text = refusal(place(tensor_parallel_size=8), gpus(*[4] * 30))
    assert text.count("has 4 of 4") == 8
    assert "and 22 more" in text


# Inside a replica


def test_stages_on_one_node_are_neighbours_and_the_first_stays_first() -> None:
    assert placement.by_node(["a", "b", "a"]) == [0, 2, 1]
    assert placement.by_node(["b", "a", "a", "b"]) == [0, 3, 1, 2]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8))
def test_the_order_of_stages_crosses_nodes_as_rarely_as_possible(nodes: list[str]) -> None:
    order = placement.by_node(nodes)
    assert order[0] == 0
    assert sorted(order) == list(range(len(nodes)))
    crossings = sum(nodes[a] != nodes[b] for a, b in itertools.pairwise(order))
    assert crossings == len(set(nodes)) - 1


def test_a_gangs_member_orders_its_own_bundles() -> None:
    nodes = ["a", "b", "a", "b", "c", "b"]  # two members of three stages
    assert placement.stage_bundles(nodes, 3, member=0) == [0, 2, 1]
    assert placement.stage_bundles(nodes, 3, member=1) == [3, 5, 4]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.integers(1, 3))
def test_data_parallel_ranks_on_one_node_are_consecutive(heads: list[str], stages: int) -> None:
    nodes = [head for head in heads for _ in range(stages)]
    ranks = [placement.data_parallel_rank(nodes, stages, member) for member in range(len(heads))]
    assert sorted(ranks) == list(range(len(heads)))
    assert ranks[0] == 0
    by_rank = [heads[ranks.index(rank)] for rank in range(len(heads))]
    assert sum(a != b for a, b in itertools.pairwise(by_rank)) == len(set(heads)) - 1

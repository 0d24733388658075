"""Where the models of a swap group are: what they ask Ray for, and what they cannot have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from serve_app.cli import cli
from serve_app.cluster import swap_actor
from serve_app.cluster.placement import of
from serve_app.cluster.serve import Application
from serve_app.cluster.swap_actor import part, terms_of
from serve_app.config.document import GATEWAY_IMPORT_PATH, Fleet, parse_document
from serve_app.config.settings import (
    Autoscaling,
    GatewayConfig,
    ModelConfig,
    Resources,
    SwapGroup,
    parse,
)
from serve_app.errors import ConfigError
from serve_app.kuberay.render.profile import ClusterProfile
from serve_app.kuberay.render.workers import groups_of
from serve_app.planner import check_machine, swap
from serve_app.planner.check_machine import Limits
from serve_app.planner.hardware import GIB, gpus

GROUP = "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-32B-FP8"


def in_group(engine: dict[str, Any] | None = None, **args: Any) -> ModelConfig:
    resources = {"swap_group": "big", **args.pop("resources", {})}
    return ModelConfig(model="m", engine=engine or {}, resources=Resources(**resources), **args)


def test_a_model_of_a_swap_group_takes_no_gpu_of_its_own() -> None:
    place = of(in_group(resources={"accelerator_type": "H100"}))
    assert "GPU" not in place.head and not place.uses_group
    assert place.shared == {"GPU": 1.0, "accelerator_type:H100": 0.001}
    assert place.alone.head["GPU"] == 1.0
    assert place.options()["ray_actor_options"]["num_gpus"] == 0
    assert place.engine_defaults["enable_sleep_mode"] is True
    assert place.engine_defaults["distributed_executor_backend"] == "uni"


def test_on_a_cpu_it_shares_a_node() -> None:
    place = of(in_group(resources={"device": "cpu"}))
    assert place.shared == {"CPU": 0.001} and "enable_sleep_mode" not in place.engine_defaults


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: in_group({"tensor_parallel_size": 2}), "engine.tensor_parallel_size is 2"),
        (lambda: in_group({"data_parallel_size": 2}), "engine.data_parallel_size is 2"),
        (lambda: in_group({"distributed_executor_backend": "mp"}), "is not yours to set"),
        (lambda: in_group({"enable_sleep_mode": False}), "the models of a swap group sleep"),
        (lambda: in_group({"enable_lora": True}), "cannot have adapters"),
        (lambda: in_group(replicas=2), "replicas is 2, but a model of a swap group"),
        (
            lambda: in_group(autoscaling=Autoscaling(max_replicas=3)),
            "max_replicas is 3, but a model",
        ),
    ],
)
def test_what_cannot_be_in_a_swap_group_is_refused(
    config: Callable[[], ModelConfig], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        of(config())


def test_a_model_of_a_swap_group_may_be_scaled_to_zero() -> None:
    assert of(in_group(autoscaling=Autoscaling(min_replicas=0))).shared


def test_each_asks_for_a_part_of_the_groups_gpu() -> None:
    assert part("ab12", gpu=True) == {"GPU_group_ab12": 0.01}
    assert part("ab12", gpu=False) == {"bundle_group_ab12": 0.01}


def gateway(args: dict[str, Any]) -> dict[str, Application]:
    config = {"import_path": GATEWAY_IMPORT_PATH, "args": args}
    return {"g": Application("g", "RUNNING", "", config, 0.0, ())}


def test_the_coordinator_reads_the_terms_of_the_deployed_gateway() -> None:
    two, three = SwapGroup(awake=2), SwapGroup(awake=3)
    assert terms_of("big", gateway({"swap_groups": {"big": {"awake": 2}}}), three) == two
    for args in ({}, {"swap_groups": {"other": {"awake": 2}}}):
        assert terms_of("big", gateway(args), three) == SwapGroup()
    # While its args are refused, or it is being deployed, they stay as they were.
    assert terms_of("big", gateway({"swap_groups": 7}), three) == three
    assert terms_of("big", {}, three) == three


def test_a_group_that_has_a_gpu_is_not_moved_to_another_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its models would run on the old one, whatever they ask for."""
    h100, l40s = (
        of(in_group(resources={"accelerator_type": it})).shared for it in ("H100", "L40S")
    )
    there = SimpleNamespace(bundle_specs=[dict(h100)], id=SimpleNamespace(hex=lambda: "1f"))
    actor = SimpleNamespace(begin=SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr(swap_actor, "_found", lambda name: there)
    monkeypatch.setattr(swap_actor, "_actor", lambda name: actor)
    assert swap_actor.reserve("big", h100) == "1f"
    with pytest.raises(ConfigError, match="swap group 'big' has 1 H100 GPU, and this model asks"):
        swap_actor.reserve("big", l40s)


@pytest.mark.parametrize(
    ("application", "args", "said"),
    [
        ("m", {"resources": {"swap_group": "BIG"}}, "resources.swap_group is 'BIG', but a group's"),
        ("m", {"resources": {"evict_cost": 3}}, "evict_cost is 3, but the model is in no swap gro"),
        ("g", {"swap_groups": {3: {}}}, "swap_groups: the name 3 must be text; put it in quotes"),
    ],
)
def test_a_wrong_setting_is_told_in_its_own_words(
    application: str, args: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        if application == "g":
            parse(GatewayConfig, args, "args")
        else:
            parse(ModelConfig, {"model": "m", **args}, "args")


# --- does it fit? -----------------------------------------------------------------------


def fleet(
    *resources: dict[str, Any],
    terms: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    order: tuple[int, int] = (0, 1),
) -> Fleet:
    """A model for each of ``resources``, all in one group unless these say otherwise."""
    models = [
        {
            "name": f"m{n}",
            "route_prefix": None,
            "import_path": "serve_app.model:app",
            "args": {
                "model": GROUP[order[n % 2]],
                "engine": {"max_model_len": 8192, **(engine or {})},
                "resources": {"accelerator_type": "H100", "swap_group": "big", **it},
            },
        }
        for n, it in enumerate(resources)
    ]
    args = {"swap_groups": {"big": {}} if terms is None else terms}
    door = {"name": "g", "route_prefix": "/", "import_path": GATEWAY_IMPORT_PATH, "args": args}
    return parse_document({"applications": [*models, door]}, Path("f.yaml"))


def found(fleet: Fleet) -> list[tuple[str, str]]:
    return [(it.status, it.text) for it in swap.problems(fleet, gpus()["H100"])]


def test_a_group_that_fits_is_told_with_what_stays_on_the_gpu_and_in_host_memory() -> None:
    [(status, said)] = found(fleet({}, {}))
    assert status == "ok"
    assert said.startswith("'big': 1 of 2 awake on one H100 take ")
    awake, left, both = map(float, re.findall(r"(?:take|sleep|together) ([0-9.]+)", said)[:3])
    assert awake + left == pytest.approx(both, abs=0.11) and both < 79.2
    assert "56.4 GiB of host memory" in said  # 1.2 × 15.0 and 32.0: of 8B bf16 and 32B fp8


def test_a_model_that_leaves_no_room_for_those_that_sleep_is_refused_with_what_would_fit() -> None:
    [(status, said)] = found(fleet({}, {}, {}, engine={"gpu_memory_utilization": 0.97}))
    assert status == "fail"
    most = float(said.split("gpu_memory_utilization to ")[1].split(" ")[0])
    assert 0.85 < most < 0.97
    [(status, _)] = found(fleet({}, {}, {}, engine={"gpu_memory_utilization": most}))
    assert status == "ok"


def test_where_equal_parts_do_not_hold_a_member_parts_of_its_own_are_advised() -> None:
    """A third of an H100 for each of three would be too little for the 32B."""
    three = {"big": {"awake": 3}}
    [_, (status, said)] = found(fleet({}, {}, {}, terms=three))
    assert status == "fail" and "gpu_memory_utilization to less in each (m0 0." in said
    least = {name: float(it) for name, it in re.findall(r"(m[012]) (0\.[0-9]+)", said)}
    models = fleet({}, {}, {}, terms=three)
    for name, config in models.models.items():
        config.engine["gpu_memory_utilization"] = least[name]
    assert [status for status, _ in found(models)] == ["warn", "ok"]


@pytest.mark.parametrize(
    ("terms", "fix"),
    [
        ({"big": {"awake": 5}}, "lower awake, or take models out of the group"),
        ({"big": {}}, "; take models out of the group"),
    ],
)
def test_where_no_parts_would_do_models_are_to_be_taken_out(
    terms: dict[str, Any], fix: str
) -> None:
    small = {"accelerator_type": "L4"}
    many = fleet(*[small] * 30, terms=terms, order=(0, 0), engine={"max_model_len": 2048})
    assert any(said.endswith(fix) for status, said in found(many) if status == "fail")


def test_a_group_whose_models_no_machine_can_hold_asleep_is_refused() -> None:
    many = fleet(*[{}] * 12, order=(1, 1), engine={"gpu_memory_utilization": 0.6})
    [on_gpu, (status, said)] = found(many)
    assert on_gpu[0] == "ok" and status == "fail"
    assert "GiB of host memory, where its 12 models sleep, and no EC2 machine gives more" in said
    # This machine may be larger than those of EC2.
    assert [it.status for it in swap.problems(many, gpus()["H100"], anywhere=False)] == ["ok"]
    with pytest.raises(ConfigError, match=r"with 1 GPU, .*; take models out of swap group 'big'"):
        groups_of(many, ClusterProfile())


def test_a_group_without_a_type_is_on_the_smallest_whose_machines_hold_it_asleep() -> None:
    def untyped(count: int) -> Fleet:
        any_gpu = {"accelerator_type": None}
        return fleet(*[any_gpu] * count, order=(1, 1), engine={"gpu_memory_utilization": 0.6})

    two, five = (swap.smallest("big", untyped(count).models) for count in (2, 5))
    assert two and five and two.memory_bytes < five.memory_bytes
    assert [it.status for it in swap.problems(untyped(5))] == ["ok"]
    assert [it.status for it in swap.problems(untyped(12))] == ["ok", "fail"]


def test_a_group_is_planned_on_the_gpu_that_is_asked_for() -> None:
    config = Path(__file__).parents[2] / "configs/swap.yaml"
    done = CliRunner().invoke(cli, ["plan", str(config), "--gpu", "L4"])
    assert done.exit_code == 1
    done = CliRunner().invoke(cli, ["plan", str(config), "--gpu", "H200"])
    assert "'big': 1 of 3 awake on one H200" in done.output


def test_reserved_memory_must_hold_the_weights_that_sleep() -> None:
    [(status, said), _] = found(fleet({"memory_gib": 4}, {}))
    assert status == "fail"
    assert "memory_gib is 4, and the weights of 'm0' take 18.0 GiB of host memory" in said


def test_a_group_of_one_without_terms_may_be_a_typo() -> None:
    typo = fleet({"swap_group": "bg"}, {}, {})
    [said] = [said for status, said in found(typo) if status == "warn"]
    assert said.startswith("'bg' has 1 of 1 awake, so none ever sleeps; did you mean 'big'?")


@pytest.mark.parametrize(("awake", "members"), [(1, 1), (2, 2)])
def test_a_group_in_which_none_ever_sleeps_is_told(awake: int, members: int) -> None:
    small = {"gpu_memory_utilization": 0.49}
    group = fleet(*[{}] * members, terms={"big": {"awake": awake}}, engine=small)
    assert ("warn", f"'big' has {awake} of {members} awake, so none ever sleeps") in [
        (status, said.split(";")[0]) for status, said in found(group)
    ]


def test_two_that_are_awake_must_fit_together() -> None:
    two = {"big": {"awake": 2}}
    [(status, said)] = found(fleet({}, {}, {}, terms=two))
    assert status == "fail" and "2 of 3 awake need" in said
    [_, (status, _)] = found(fleet({}, {}, terms=two, engine={"gpu_memory_utilization": 0.49}))
    assert status == "ok"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: fleet({}, {"accelerator_type": "L4"}), "resources.accelerator_type differs"),
        (lambda: fleet({}, {}, terms={"bigg": {}}), "'bigg', of which no model is; did you mean"),
        (lambda: fleet({}, {}, terms={"big": {"awake": 3}}), "awake is 3, and the group has 2"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong: Callable[[], Fleet], said: str) -> None:
    assert any(status == "fail" and said in text for status, text in found(wrong()))


def test_what_a_group_needs_is_the_same_in_any_order() -> None:
    """All want the same of the GPU; the fp8 leaves more of it when it sleeps."""
    said = {found(fleet({}, {}, order=order))[0][1] for order in ((0, 1), (1, 0))}
    assert len(said) == 1


def test_a_kv_cache_of_a_set_size_counts_as_that() -> None:
    [(status, said)] = found(fleet({}, {}, engine={"kv_cache_memory_bytes": 42 * GIB}))
    assert status == "fail" and "1 of 2 awake need" in said  # 36.1 beside them


def test_a_group_of_which_no_type_is_said_is_planned_on_one_gpu(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "configs/swap.yaml").read_text()
    config = tmp_path / "any.yaml"
    config.write_text(text.replace("accelerator_type: H100, ", ""))
    done = CliRunner().invoke(cli, ["plan", "--json", str(config)])
    assert done.exit_code == 0
    planned = json.loads(done.output)
    assert len({it["gpu"] for it in planned["models"]}) == 1
    assert planned["swap_groups"][0]["status"] == "ok"
    assert "1 of 3 awake on one " in planned["swap_groups"][0]["message"]


def test_one_model_is_planned_with_what_is_wrong_with_the_groups(tmp_path: Path) -> None:
    config = yaml.safe_load((Path(__file__).parents[2] / "configs/swap.yaml").read_text())
    model, door = config["applications"][0], config["applications"][-1]
    model["args"]["resources"].pop("swap_group")
    door["args"]["swap_groups"] = {"nobody": {}}
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump(config | {"applications": [model, door]}))
    done = CliRunner().invoke(cli, ["plan", "--json", str(file)])
    planned = json.loads(done.output)
    assert done.exit_code == 1 and planned["fits"] is False
    assert planned["name"] == model["name"] and planned["swap_groups"][0]["status"] == "fail"
    assert "terms of 'nobody', of which no model is" in planned["swap_groups"][0]["message"]


def test_a_group_on_the_cpu_is_not_said_not_to_fit() -> None:
    on_cpu = {"device": "cpu", "accelerator_type": None}
    group = list(swap.problems(fleet(on_cpu, on_cpu)))
    shown = Console(record=True)
    swap.show(group, shown)
    assert [it.status for it in group] == ["warn"]
    assert "does not fit" not in shown.export_text()


def test_a_machine_needs_one_gpu_and_the_host_memory_of_all() -> None:
    ours = fleet({}, {}, {})
    h100 = gpus()["H100"]
    roomy = Limits((h100,), 16, 128 * GIB, None)
    assert list(check_machine.lacks(ours, roomy)) == []
    [finding] = check_machine.lacks(ours, Limits((h100,), 16, 70 * GIB, None))
    assert "sleep in 74.4 GiB of host memory, and this machine has 70.0 GiB" in finding.message


def test_a_pod_holds_the_group() -> None:
    [_, group] = groups_of(fleet({"num_cpus": 2}, {"num_cpus": 2}, {}), ClusterProfile())
    assert (group.gpus, group.min_pods, group.max_pods) == (1, 1, 2)
    assert group.cpu >= 5
    assert group.memory_gib >= 3 * 12 + 74


def test_plan_tells_of_the_groups_and_counts_one_machine_for_each(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "configs/swap.yaml"
    done = CliRunner().invoke(cli, ["plan", str(config)])
    assert done.exit_code == 0
    [line] = [it for it in done.output.splitlines() if it.startswith("swap group")]
    assert "'big': 1 of 3 awake on one H100" in line
    assert done.output.startswith("all 3 models fit; together: 1 × p5.4xlarge\n")
    full = tmp_path / "full.yaml"
    full.write_text(
        config.read_text().replace("max_model_len: 8192", "gpu_memory_utilization: 0.98")
    )
    done = CliRunner().invoke(cli, ["plan", str(full)])
    assert done.exit_code == 1 and "swap group does not fit: " in done.output
    assert done.output.startswith("each model fits, but what shares a GPU does not: see below\n")
    assert "together:" not in done.output  # there is no machine for what does not fit

"""A machine that `plan` names takes the pod that `render` makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.models import kept

from serve_app.config.document import load
from serve_app.config.settings import ModelConfig
from serve_app.kuberay.render.profile import ClusterProfile
from serve_app.kuberay.render.workers import shape_of
from serve_app.planner import choose, ec2, hardware
from serve_app.planner.loading import load_model

CONFIGS = Path(__file__).parents[3] / "configs"
PROFILE = ClusterProfile(cluster_name="c")
SMALL = "meta-llama/Llama-3.1-8B-Instruct"


def named(config: ModelConfig, gpu: str) -> list[str]:
    """The machines that `plan` names for a replica, the best first."""
    plan = choose.plan_on(load_model(config), choose.arguments_of(config), hardware.find(gpu)[0])
    return [it.instance.name for it in ec2.machines(plan, config)[0]]


@pytest.mark.parametrize("gpu", ["T4", "L4", "A10G", "L40S"])
@pytest.mark.parametrize(
    "more",
    [{}, {"frontends": 3}, {"resources": {"num_cpus": 6}}, {"resources": {"memory_gib": 100}}],
    ids=str,
)
def test_plan_and_render_take_the_same_machines(gpu: str, more: dict[str, Any]) -> None:
    resources = {"accelerator_type": hardware.find(gpu)[0].ray_name} | more.get("resources", {})
    engine = {"max_model_len": 2048, "dtype": "half"}
    config = ModelConfig.model_validate(
        {"model": SMALL, "engine": engine} | more | {"resources": resources}
    )
    rendered = shape_of("m", config, PROFILE).instance_types
    assert rendered and set(named(config, gpu)) == set(rendered)


def test_16_gib_of_host_memory_are_too_little() -> None:
    plan = choose.plan_on(kept(SMALL), {"max_model_len": 8192}, hardware.gpus()["L4"])
    good, refused = ec2.machines(plan, ModelConfig(model=SMALL))
    assert good[0].instance.name == "g6.2xlarge"
    assert [(it.name, it.reason) for it in refused] == [
        ("g6.xlarge", "a pod with 1 GPU takes 2 cores and 20 GiB, and there are 2 and 11")
    ]


def test_what_is_kept_for_each_engine_counts_once_for_each() -> None:
    """Also where the layout is the planner's, and not in the config."""
    gpu = hardware.gpus()["L40S"]
    engine = {"kv_offloading_size": 100, "max_model_len": 8192}
    of = kept("meta-llama/Llama-3.3-70B-Instruct")
    plan = choose.smallest(of, engine, gpu).plan
    assert plan and plan.parallel.tensor == 4
    good, _ = ec2.machines(plan, ModelConfig(model="m", engine=engine))
    assert good[0].instance.name == "g6e.12xlarge"


def test_the_shipped_configs() -> None:
    checked = set()
    for path in sorted(CONFIGS.glob("*.yaml")):
        for name, config in load(path).models.items():
            gpu = config.resources.accelerator_type
            if gpu is None or config.resources.swap_group:
                continue
            assert named(config, gpu)[0] in shape_of(name, config, PROFILE).instance_types
            checked.add(path.stem)
    assert {"llama70b", "llama70b-2node", "fleet"} <= checked

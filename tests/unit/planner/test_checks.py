"""What `serve-app run` refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.configs import LLAMA_70B, write

from serve_app.config.document import (
    GATEWAY_IMPORT_PATH,
    MODEL_IMPORT_PATH,
    Fleet,
    load,
    parse_document,
)
from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError
from serve_app.planner import hardware
from serve_app.planner.check_machine import Limits, lacks
from serve_app.planner.check_model import checked, refuse
from serve_app.planner.hardware import GIB
from serve_app.planner.loading import load_model
from serve_app.planner.model import metadata


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": {"tensor_parallel_size": 1}}, "weights.* smallest that fits on H100 is TP"),
        ({"engine": {"tensor_parallel_size": 6}}, "can be 1, 2, 4, 8"),
        ({"resources": {"accelerator_type": "V100"}}, "too old"),
        ({"engine": {"max_model_len": 200_000}}, "above the model's 131072; set it to 131072 or"),
        (
            {"engine": {"tensor_parallel_size": 2, "max_model_len": 131_072}},
            "tokens of one request, but max_model_len is 131072; the smallest that fits",
        ),
        (
            {"engine": {"tensor_parallel_size": 1}, "resources": {"device": "cpu"}},
            "max_model_len is 8192; lower engine.max_model_len, or raise env.VLLM_CPU_KVCACHE",
        ),
    ],
)
def test_run_refuses_what_cannot_work(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"application 'llama': .*{words}") as refused:
        refuse(load(write(tmp_path, **changes)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # An estimate says no, by less than its own error.
        {"engine": {"tensor_parallel_size": 2, "max_model_len": 24_000}},
        {"engine": {"max_model_len": 200_000}, "env": {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": 1}},
        {"engine": {"tensor_parallel_size": 16}},  # no EC2 machine, but there are others
        {"engine": {"tensor_parallel_size": 2, "max_model_len": 32_768, "cpu_offload_gb": 20}},
        {"engine": {"tensor_parallel_size": 1}, "resources": {}},  # on which GPU is not said
        {"engine": {"tensor_parallel_size": 1}, "resources": {"accelerator_type": "MI300X"}},
        {"engine": {"tensor_parallel_size": 1, "hf_overrides": {"num_hidden_layers": 20}}},
        {"engine": {"tensor_parallel_size": 6, "hf_overrides": "my_module.changed"}},
        {"model": "nobody/nothing"},
        {
            "model": "./models/other",  # may be any model, whatever it is called
            "served_as": [LLAMA_70B["model"]],
            "engine": {"tensor_parallel_size": 1},
        },
    ],
)
def test_run_starts_whatever_might_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    judged = []
    monkeypatch.setattr(metadata, "_from_hub", judged.append)
    refuse(load(write(tmp_path, **changes)))
    assert not judged  # the hub was not asked


def test_run_starts_every_shipped_config() -> None:
    configs = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
    for path in configs:
        refuse(load(path))
    assert len(configs) > 5


SMALL = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "engine": {"max_model_len": 2048}}
"""A model whose metadata comes with serve_app."""


def fleet_of(
    tmp_path: Path, *models: dict[str, Any], gateway: dict[str, Any] | None = None
) -> Fleet:
    applications: list[dict[str, Any]] = [
        {"name": f"m{n}", "route_prefix": None, "import_path": MODEL_IMPORT_PATH}
        | ({"deployments": one.pop("deployments")} if "deployments" in one else {})
        | {"args": SMALL | one}
        for n, one in enumerate(map(dict, models))
    ]
    if gateway is not None:
        applications.append(
            {"name": "gateway", "import_path": GATEWAY_IMPORT_PATH, "args": gateway}
        )
    return parse_document({"applications": applications}, tmp_path / "config.yaml")


def machine(*gpus: str, cores: int = 8, gib: float = 16, free: float | None = None) -> Limits:
    return Limits(
        tuple(hardware.gpus()[name] for name in gpus),
        cores,
        int(gib * GIB),
        None if free is None else int(free * GIB),
    )


CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("models", "here", "told"),
    [
        (
            [{"resources": CPU | {"num_cpus": 64}}],
            machine(),
            "resources.num_cpus is 64, and this machine has 8 cores; lower it",
        ),
        (
            [{"resources": CPU, "replicas": 10}],
            machine(),
            "all replicas together reserve 10 CPU cores (m0 alone 10 × 1), and this "
            "machine has 8 cores; lower resources.num_cpus, or replicas",
        ),
        (
            [{"resources": CPU | {"memory_gib": 20}}],
            machine(),
            "resources.memory_gib is 20, and this machine has 16.0; lower it",
        ),
        (
            [{"model": LLAMA_70B["model"], "resources": CPU}],
            machine(free=12),
            "it takes about 134.4 GiB of memory on the CPU, and this machine has 12.0 GiB free; "
            "`serve-app plan meta-llama/Llama-3.3-70B-Instruct` shows the GPUs that hold it",
        ),
        (
            [{"resources": CPU}, {"resources": CPU}],
            machine(gib=2),
            "all replicas together take about 5.6 GiB of memory on the CPU, and this machine has "
            "2.0 GiB; serve fewer models or replicas",
        ),
        (
            [{}],
            machine(),
            "it needs a GPU, and this machine has none; set resources.device: cpu to run it on "
            "the CPU",
        ),
        (
            [{"resources": {"accelerator_type": "L4"}}],
            machine(),
            "it needs a GPU, and this machine has none; set resources.device: cpu and remove "
            "accelerator_type to run it on the CPU",
        ),
        (
            [{"model": LLAMA_70B["model"]}],
            machine(),
            "it needs a GPU, and this machine has none; "
            "`serve-app plan meta-llama/Llama-3.3-70B-Instruct` shows the machines that hold it",
        ),
        (
            [{"engine": {"tensor_parallel_size": 3}}],
            machine("L4", "L4"),
            "TP 3 × PP 1 needs 3 GPUs, and this machine has 2; lower engine.tensor_parallel_size; "
            "`serve-app plan HuggingFaceTB/SmolLM2-135M-Instruct` shows the machines that hold it",
        ),
        (
            [{"resources": {"accelerator_type": "H100"}}],
            machine("L4"),
            "resources.accelerator_type is H100, and this machine has L4; change it, or remove it",
        ),
        (
            [{"replicas": 2}, {}],
            machine("L4", "L4"),
            "all replicas together need 3 GPUs (m0: 2, m1: 1), and this machine has 2; serve fewer "
            "models or replicas",
        ),
    ],
)
def test_what_the_machine_lacks_is_told_with_what_to_change(
    tmp_path: Path, models: list[dict[str, Any]], here: Limits, told: str
) -> None:
    fleet = fleet_of(tmp_path, *models)
    [found] = lacks(fleet, here)
    assert found.status == "fail"
    assert found.text == told
    with pytest.raises(ConfigError) as refused:
        refuse(fleet, here)
    assert str(refused.value).endswith(
        f"application '{found.about}': {told} (--no-check skips this)"
    )


def test_a_gateway_s_cores_count_too(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, {"resources": CPU}, gateway={"num_cpus": 1.5, "replicas": 2})
    assert not [*lacks(fleet, machine(cores=4))]
    [found] = lacks(fleet, machine(cores=3))
    assert found.about == "gateway"
    assert found.text == (
        "all replicas together reserve 4 CPU cores (gateway alone 2 × 1.5), and this machine has "
        "3 cores; lower num_cpus, or replicas"
    )


def test_gateways_that_come_and_go_count_as_the_one_that_stays(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, {"resources": CPU}, gateway={"num_cpus": 1.5, "replicas": "auto"})
    assert not [*lacks(fleet, machine(cores=3))]
    [found] = lacks(fleet, machine(cores=2))
    assert found.text.startswith("all replicas together reserve 2.5 CPU cores")


@pytest.mark.parametrize(
    ("model", "here"),
    [
        ({}, machine("L4", cores=1)),
        ({"resources": {"accelerator_type": "A100"}}, machine("A100-80G")),
        ({}, Limits(None, 8, 16 * GIB, None)),  # GPUs of another make, perhaps
        ({"autoscaling": {"min_replicas": 0, "max_replicas": 9}}, machine()),
        ({"resources": CPU, "replicas": 8}, machine(gib=16)),
        (
            {
                "resources": CPU | {"num_cpus": 9},
                "deployments": [{"name": "ModelServer", "ray_actor_options": {"num_cpus": 1}}],
            },
            machine(),
        ),
        ({"model": "nobody/nothing", "resources": CPU}, machine(gib=1)),
        (
            {"model": LLAMA_70B["model"], "resources": CPU, "engine": {"revision": "a"}},
            machine(gib=1),
        ),
    ],
)
def test_a_machine_that_might_do_is_not_refused(
    tmp_path: Path, model: dict[str, Any], here: Limits
) -> None:
    fleet = fleet_of(tmp_path, model)
    assert not [*lacks(fleet, here)]
    refuse(fleet, here)


def test_a_model_that_asks_for_no_type_is_measured_by_the_gpu_that_is_here(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, {"model": "Qwen/Qwen3-32B"})
    refuse(fleet, machine("H200"))
    with pytest.raises(ConfigError, match=r"take .* per GPU, but .* of L4's 22.0 are vLLM's"):
        refuse(fleet, machine("L4"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"model": "BAAI/bge-m3"}, "the model generates no text"),
        (
            {"model": "meta-llama/Llama-3.1-8B-Instruct",
             "engine": {"enable_prefix_caching": False, "max_model_len": 8192}},
            "enable_prefix_caching is false",
        ),
        ({"model": "meta-llama/Llama-3.1-8B-Instruct", "engine": {"max_model_len": 8192}}, None),
    ],
)  # fmt: skip
def test_a_policy_that_finds_nothing_cached_is_told(
    args: dict[str, Any], words: str | None
) -> None:
    asked = {
        **args,
        "routing": {"policy": "cache_aware"},
        "resources": {"accelerator_type": "L40S"},
    }
    config = ModelConfig.model_validate(asked)
    found = [it for it in checked("m", config, load_model(config)) if it.check == "routing"]
    assert [it.status for it in found] == (["warn"] if words else [])
    assert all(words in it.message for it in found if words)

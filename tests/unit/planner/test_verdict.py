"""`serve-app plan` and `serve-app check` say the same of a model, and say it first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from harness.configs import write
from harness.models import LLAMA, kept, plan

from serve_app.config.document import load
from serve_app.config.settings import ModelConfig, Resources
from serve_app.errors import UserError
from serve_app.planner import check_model, totals
from serve_app.planner.cli import plan as command
from serve_app.planner.hardware import gpus

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40960}
QWEN = "Qwen/Qwen3-32B"


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(command, arguments)
    if result.exception and not isinstance(result.exception, (SystemExit, UserError)):
        raise result.exception
    return result


@pytest.mark.parametrize(
    ("fits", "changes"),
    [
        (True, {}),
        (False, {"engine": {"tensor_parallel_size": 1}}),
        (False, {"engine": {"tensor_parallel_size": 16}}),  # no machine has 16
        (False, {"engine": {"max_model_len": 200_000}}),
        (True, {"engine": {"max_model_len": 200_000}, "env": {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": 1}}),
        (True, {"engine": {"max_model_len": 200_000, "tensor_parallel_size": 8, "hf_overrides": {
            "max_position_embeddings": 262_144}}}),
        (False, {"resources": {"accelerator_type": "V100"}}),
        (False, {"engine": {"tensor_parallel_size": 6}}),
        (False, {"resources": {"accelerator_type": "H100", "memory_gib": 8},
                 "engine": {"kv_offloading_size": 64}}),
        (True, {"resources": {"accelerator_type": "H100", "memory_gib": 80},
                "engine": {"kv_offloading_size": 64}}),
        (False, {"resources": {"accelerator_type": "H100", "num_cpus": 500}}),
        (True, {"model": QWEN, "engine": {
            "max_model_len": 131_072, "hf_overrides": {"rope_parameters": YARN}}}),
        (False, {"model": QWEN, "engine": {"max_model_len": 131_072}}),
    ],
)  # fmt: skip
def test_plan_and_check_agree(tmp_path: Path, fits: bool, changes: dict[str, Any]) -> None:
    path = write(tmp_path, **changes)
    found = run(str(path), "--json")
    assert json.loads(found.stdout)["fits"] is fits, found.stdout
    assert found.exit_code == (0 if fits else 1)
    [(name, config)] = load(path).models.items()
    failures = [one for one in check_model.model(name, config) if one.status == "fail"]
    assert bool(failures) is not fits, failures


def test_the_first_lines_are_the_verdict_the_machine_and_the_users(tmp_path: Path) -> None:
    first, second, *_ = run(str(write(tmp_path))).stdout.splitlines()
    assert first.endswith("on 4 × H100 (TP 4 × PP 1): fits")
    assert second.strip().startswith("1 × p5.48xlarge, 4 GPUs idle; ")
    assert second.strip().endswith("users at once with 2,048 tokens each")


def test_no_more_users_than_max_num_seqs() -> None:
    found = plan(kept("meta-llama/Llama-3.1-8B-Instruct"), "B300", max_num_seqs=64)
    assert found.room(2048) > 64 == found.concurrency(2048) == found.concurrency(1)
    said = run("meta-llama/Llama-3.1-8B-Instruct", "--gpu", "B300", "-e", "max_num_seqs=64").stdout
    told = "64 users at once with 2,048 tokens each (max_num_seqs; its KV cache holds "
    assert told in " ".join(said.split())


def test_every_table_names_machines_that_have_the_cores(tmp_path: Path) -> None:
    """g6e.2xlarge has 7.9 cores for one GPU, of which one is the node's and two are Ray's."""
    asked = {"accelerator_type": "L40S", "num_cpus": 6}
    path = write(tmp_path, model="meta-llama/Llama-3.1-8B-Instruct", resources=asked,
                 engine={"tensor_parallel_size": 1, "max_model_len": 8192})  # fmt: skip
    found = json.loads(run(str(path), "--json").stdout)
    named = [one["instance_type"] for one in found["gpu_types"] if one["gpu"] == "L40S"]
    assert named == [found["instances"][0]["instance_type"]] == ["g6e.4xlarge"]
    assert "g6e.2xlarge" in {one["instance_type"] for one in found["refused_instances"]}


def test_a_fleet_begins_and_ends_with_its_verdict_and_its_machines() -> None:
    configs = Path(__file__).parents[3] / "configs"
    found = run(str(configs / "fleet.yaml"))
    assert found.stdout.startswith("all 4 models fit; together: ")
    assert "all 4 models fit; together: " in "\n".join(found.stdout.splitlines()[-3:])
    total = json.loads(run(str(configs / "fleet.yaml"), "--json").stdout)["machines"]
    assert total["fewest"].keys() <= total["most"].keys()
    assert all(total["most"][name] >= count for name, count in total["fewest"].items())


def test_those_that_share_a_gpu_share_the_cores_of_its_machine(tmp_path: Path) -> None:
    """Each of the fleet's two small models fits a g6.2xlarge by itself; both have no 32 GiB."""
    config = Path(__file__).parents[3] / "configs/fleet.yaml"
    total = json.loads(run(str(config), "--json").stdout)["machines"]
    assert (total["fewest"]["g6.4xlarge"], total["most"]["g6.4xlarge"]) == (1, 2)
    more = tmp_path / "more.yaml"
    more.write_text(config.read_text().replace("0.5, num_cpus: 2", "0.5, num_cpus: 8"))
    assert json.loads(run(str(more), "--json").stdout)["machines"]["most"]["g6.8xlarge"] == 2


def test_replicas_share_machines_of_a_type() -> None:
    from types import SimpleNamespace as Of

    def report(
        gpus_: int, count: int, replicas: int, instance: str, each: int, share: float | None = None
    ) -> Any:
        roomy = {"allocatable_cpu_m": 1e6, "allocatable_memory_mib": 1e6}
        machine = Of(instance=Of(name=instance, gpus=each, **roomy), count=count)
        config = ModelConfig(model="m", replicas=replicas, resources=Resources(gpu_share=share))
        plan = Of(parallel=Of(gpus=gpus_), gpu=Of(name="L40S"))
        return Of(name=str(share), machines=[machine], plan=plan, config=config)

    fewest, most = totals.machines(
        [
            report(4, 1, 3, "p5.48xlarge", 8),  # one and a half
            report(2, 1, 1, "p5.48xlarge", 8),
            report(16, 2, 2, "p4d.24xlarge", 8),
            report(1, 1, 2, "g6.xlarge", 1),
            report(1, 1, 1, "g6e.xlarge", 1, share=0.6),
            report(1, 1, 2, "g6e.xlarge", 1, share=0.2),  # with it one GPU
        ]
    )
    assert fewest == most == {
        "g6.xlarge": 2, "g6e.xlarge": 1, "p4d.24xlarge": 4, "p5.48xlarge": 2,
    }  # fmt: skip


def test_a100_is_said_to_be_either(tmp_path: Path) -> None:
    assert "A100 may be either size" in run(QWEN, "--gpu", "A100").stdout
    assert "either size" not in run(QWEN, "--gpu", "A100-80G").stdout
    path = write(tmp_path, resources={"accelerator_type": "A100"})
    [(name, config)] = load(path).models.items()
    assert any("either size" in one.message for one in check_model.model(name, config))


def test_a_context_of_ten_million_suggests_a_shorter_one(tmp_path: Path) -> None:
    long = {**LLAMA, "max_position_embeddings": 10_485_760}
    (tmp_path / "config.json").write_text(json.dumps(long))
    found = run(str(tmp_path))
    said = " ".join(found.stdout.split())
    assert (
        "its own context is 10,485,760 tokens; with -e max_model_len=32768 it fits on 1 ×" in said
    )
    shorter = run(str(tmp_path), "-e", "max_model_len=32768")
    assert shorter.exit_code == 0
    assert "its own context" not in shorter.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "whisper", "is_encoder_decoder": True}, "an encoder-decoder (whisper)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes' is not one"),
    ],
)
def test_what_is_not_planned_is_said(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    said = str(run(str(tmp_path)).exception)
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["someone/model-GGUF"], "does not load GGUF"),
        ([QWEN, "--gpu", "RTX 4090"], "L4 (22.0 GiB) is nearly the same: --gpu L4"),
        ([QWEN, "--gpu", "MI300X"], "made by AMD"),
    ],
)
def test_what_is_elsewhere_is_said(arguments: list[str], words: str) -> None:
    said = str(run(*arguments).exception)
    assert words in said
    assert "\n" not in said


def test_an_encoder_shows_no_kv_cache() -> None:
    said = run("BAAI/bge-m3", "--gpu", "L4").stdout
    assert "KV cache 0" not in said.replace("  ", " ") and "none (an encoder)" in said
    assert gpus()["L4"].name in said.splitlines()[0]


def test_a_fleet_says_first_which_of_its_models_do_not_fit(tmp_path: Path) -> None:
    config = (Path(__file__).parents[3] / "configs/fleet.yaml").read_text()
    small = tmp_path / "small.yaml"
    small.write_text(config.replace("tensor_parallel_size: 4", "tensor_parallel_size: 1"))
    found = run(str(small))
    first = found.stdout.splitlines()[0]
    assert found.exit_code == 1
    assert first.startswith("1 of 4 models do not fit: llama-3.3-70b; together: "), first

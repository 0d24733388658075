"""Configs made for models that were only named: layouts, names, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.models import LLAMA

from serve_app.config import yaml_files
from serve_app.config.document import Fleet, parse_document
from serve_app.config.names import short_names
from serve_app.errors import ConfigError, UserError
from serve_app.planner import choose, hardware
from serve_app.planner.compose import compose, described
from serve_app.planner.hardware import GIB, Machine
from serve_app.planner.loading import cpu_plan, load_model
from serve_app.planner.vllm.memory import TIGHT_SHARE

LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"
LLAMA_70B = "meta-llama/Llama-3.3-70B-Instruct"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"


def machine(*gpus: str, cores: int = 16, free_gib: float = 64) -> Machine:
    return Machine(tuple(hardware.gpus()[name] for name in gpus), cores, int(free_gib * GIB))


def made(models: list[str], on: Machine, **given: Any) -> tuple[Fleet, str]:
    """The config as it is read back from its YAML, and the YAML."""
    text = yaml_files.dump(compose(models, given, on))
    return parse_document(yaml.safe_load(text), Path("fleet.yaml")), text


def comment_over(text: str, key: str) -> str:
    """The comment over the first such key, as one line."""
    lines = text.splitlines()
    at = next(n for n, line in enumerate(lines) if line.strip().startswith(f"{key}:"))
    start = at
    while lines[start - 1].strip().startswith("#"):
        start -= 1
    return " ".join(line.strip().removeprefix("# ") for line in lines[start:at])


# --- GPUs --------------------------------------------------------------------------------------


def test_a_hub_id_becomes_an_application_with_the_smallest_layout_that_fits() -> None:
    fleet, text = made([LLAMA_70B], machine(*["H100"] * 8))
    [(name, config)] = fleet.models.items()
    assert name == "llama-3.3-70b-instruct"
    assert (config.model, config.served_as) == (LLAMA_70B, [LLAMA_70B])
    # max_model_len is the model's own, so it is left out.
    assert config.engine == {"tensor_parallel_size": 4}
    assert fleet.gateway is not None
    assert (fleet.host, fleet.port) == ("127.0.0.1", 8000)
    why = comment_over(text, "tensor_parallel_size")
    assert "4 of this machine's 8 GPUs are the fewest" in why
    assert "requests of 131072 tokens" in why


@pytest.mark.parametrize(
    ("model", "gpus"), [(LLAMA_8B, ["L4"]), (LLAMA_70B, ["H100"] * 2), (LLAMA_8B, ["L4"] * 2)]
)
def test_a_context_that_does_not_fit_is_shortened_and_then_fits(
    model: str, gpus: list[str]
) -> None:
    on = machine(*gpus)
    fleet, text = made([model, *([MINILM] if gpus == ["L4"] * 2 else [])], on)
    config = next(iter(fleet.models.values()))
    of, gpu = load_model(config), on.gpus[0]
    length = config.engine["max_model_len"]
    own = of.shape.max_position_embeddings
    assert length < own
    assert length % 1024 == 0
    # It fits with the planner's own error to spare, and the next step does not.
    careful = config.engine | {"gpu_memory_utilization": 0.92 - TIGHT_SHARE}
    assert choose.plan_on(of, careful, gpu).fits
    assert not choose.plan_on(of, careful | {"max_model_len": length + 1024}, gpu).fits
    assert f"The model's own is {own}" in comment_over(text, "max_model_len")


def test_the_whole_context_comes_before_idle_gpus_and_other_models_before_the_whole_context() -> (
    None
):
    alone, _ = made([LLAMA_8B], machine(*["L4"] * 4))
    assert alone.models["llama-3.1-8b-instruct"].engine == {"tensor_parallel_size": 2}
    with_another, _ = made([LLAMA_8B, MINILM], machine(*["L4"] * 2))
    assert with_another.models["llama-3.1-8b-instruct"].tensor_parallel_size == 1
    assert with_another.models["all-minilm-l6-v2"].engine == {
        "runner": "pooling",
        "tensor_parallel_size": 1,
    }


def test_gpus_of_two_kinds_are_taken_for_the_smaller() -> None:
    on = machine("H100", "L4")
    fleet, _ = made([LLAMA_8B], on)
    same, _ = made([LLAMA_8B], machine("L4", "L4"))
    assert fleet.models == same.models
    assert described(on) == "1 × H100 (79.2 GiB), 1 × L4 (22.0 GiB)"


def test_the_command_line_has_the_last_word() -> None:
    given = {"tensor_parallel_size": 2, "max_model_len": 4096, "enable_prefix_caching": False}
    fleet, text = made([LLAMA_8B], machine("H100", "H100"), **given)
    assert fleet.models["llama-3.1-8b-instruct"].engine == given
    assert comment_over(text, "tensor_parallel_size") == "As the command line says."


def test_pipeline_stages_that_are_asked_for_are_the_layout() -> None:
    fleet, _ = made([LLAMA_8B], machine("L4", "L4"), pipeline_parallel_size=2)
    assert fleet.models["llama-3.1-8b-instruct"].engine == {"pipeline_parallel_size": 2}


@pytest.mark.parametrize(
    ("models", "gpus", "given", "told"),
    [
        ([LLAMA_70B], ["H100"], {}, "needs 4 × H100 (TP 4 × PP 1), and this machine has 1;"),
        (
            [LLAMA_8B, MINILM, "Qwen/Qwen3-32B"],
            ["H100"] * 2,
            {},
            "these 3 models need 3 × H100 (llama-3.1-8b-instruct: 1, all-minilm-l6-v2: 1, "
            "qwen3-32b: 1), and this machine has 2; name fewer models",
        ),
        ([LLAMA_8B], ["H100"], {"tensor_parallel_size": 2}, "needs 2 GPUs, and this machine has 1"),
        ([LLAMA_8B], ["H100"] * 3, {"tensor_parallel_size": 3}, "does not divide the 32 attention"),
        ([LLAMA_8B], ["V100"], {}, "too old for vLLM's wheels"),
        ([LLAMA_8B], ["L4"], {"max_model_len": 100_000}, "needs 2 × L4"),
        ([LLAMA_8B], ["L4"], {"max_model_len": 200_000}, "is above the model's 131072; lower it"),
        (
            ["Qwen/Qwen3-32B"],
            ["A100-40G"] * 1,
            {},
            "with an AWQ or GPTQ int4 checkpoint",
        ),
        ([LLAMA_8B, LLAMA_8B], ["H100"] * 2, {}, "is named twice; name it once"),
        ([LLAMA_8B], ["H100"], {"gpu_memory_utilization": 2.0}, "gpu_memory_utilization is 2.0,"),
    ],
)
def test_what_does_not_fit_is_said_with_numbers(
    models: list[str], gpus: list[str], given: dict[str, Any], told: str
) -> None:
    with pytest.raises((UserError, ConfigError)) as caught:
        compose(models, given, machine(*gpus))
    assert told in str(caught.value)


# --- the CPU -----------------------------------------------------------------------------------


def test_small_models_run_on_the_cpu() -> None:
    fleet, text = made([SMOLLM, MINILM], machine(cores=2, free_gib=8))
    chat, embeds = fleet.models.values()
    assert chat.resources.device == embeds.resources.device == "cpu"
    assert chat.engine == {"enforce_eager": True, "dtype": "float32"}
    assert embeds.engine == {"runner": "pooling"} | chat.engine
    assert fleet.gateway is not None
    cpus = chat.resources.num_cpus + embeds.resources.num_cpus + fleet.gateway.num_cpus
    assert cpus <= 2
    assert "The weights take 0.5 GiB" in comment_over(text, "device")


def test_models_share_few_cores() -> None:
    fleet, _ = made([SMOLLM, MINILM], machine(cores=1, free_gib=8))
    assert fleet.gateway is not None
    cpus = [model.resources.num_cpus for model in fleet.models.values()]
    assert sum(cpus) + fleet.gateway.num_cpus <= 1
    assert min(cpus) > 0


def test_a_long_context_gets_a_kv_cache_that_the_memory_allows() -> None:
    plenty, _ = made([LLAMA_8B], machine(free_gib=64))
    config = plenty.models["llama-3.1-8b-instruct"]
    assert config.engine["max_model_len"] >= 8192
    assert cpu_plan(load_model(config), config).fits
    scarce, text = made([LLAMA_8B], machine(free_gib=34))
    less = scarce.models["llama-3.1-8b-instruct"]
    assert "VLLM_CPU_KVCACHE_SPACE" not in less.env
    assert less.engine["max_model_len"] < 8192
    assert cpu_plan(load_model(less), less).fits
    assert "the KV cache of 1 GiB" in comment_over(text, "max_model_len")


def test_quantized_weights_keep_their_own_precision_on_the_cpu() -> None:
    fleet, _ = made(["Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"], machine())
    assert "dtype" not in next(iter(fleet.models.values())).engine


@pytest.mark.parametrize(
    ("models", "free_gib", "given", "told"),
    [
        (
            [LLAMA_8B],
            20,
            {},
            f"{LLAMA_8B} takes about 32.9 GiB of memory on the CPU, and this machine has no GPU "
            f"and 20.0 GiB free; `serve-app plan {LLAMA_8B}` shows the GPUs that hold it",
        ),
        ([SMOLLM, MINILM], 4, {}, "these 2 models take about"),
        ([SMOLLM], 20, {"tensor_parallel_size": 2}, "needs 2 GPUs, and this machine has none"),
        ([LLAMA_8B], 34, {"max_model_len": 32768}, "no memory for a larger KV cache"),
    ],
)
def test_what_the_memory_does_not_hold_is_refused(
    models: list[str], free_gib: float, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as caught:
        compose(models, given, machine(free_gib=free_gib))
    assert told in str(caught.value)


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["Qwen/Qwen3-8B", "models/mine/"], ["qwen3-8b", "mine"]),
        (["a/Same", "b/same", "b/SAME"], ["same", "b-same", "b-same-2"]),
        (["s3://bucket/path/Llama 3 (new)/"], ["llama-3-new"]),
        (["s3://bucket"], ["bucket"]),
        (["gpt2", "org/gateway"], ["gpt2", "org-gateway"]),
        (["~nobody-of-that-name/x", "~"], ["x", "model"]),
    ],
)
def test_names_are_short_and_different(models: list[str], names: list[str]) -> None:
    assert short_names(models, reserved=["gateway"]) == names


def test_the_folder_at_hand_has_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "Mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert short_names([".", str(folder)]) == ["mine", f"{tmp_path.name.lower()}-mine"]


def test_a_folder_needs_no_network_and_has_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr("serve_app.planner.model.metadata._from_hub", lambda *_: pytest.fail())
    fleet, _ = made([str(tmp_path)], machine("H100"))
    [config] = fleet.models.values()
    assert (config.model, config.served_as) == (str(tmp_path), [])

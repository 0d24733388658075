"""``serve-app convert``: what becomes of other programs' configs, and what is said of the rest.

The examples have the shapes of LiteLLM's and Ray's documentation. Every output is read by our own
loader here too.
"""

from __future__ import annotations

import ast
import functools
import operator
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.llm
import yaml
from click.testing import CliRunner, Result
from harness import command
from harness.processes import REPO
from ray.serve.schema import ServeDeploySchema

from serve_app.config import foreign
from serve_app.config.document import Fleet, load, parse_document
from serve_app.convert import ray_serve_llm
from serve_app.convert.cli import convert, draft_of
from serve_app.errors import ConfigError

LITELLM = """\
model_list:
- model_name: gpt-4o
  litellm_params:
    model: azure/gpt-4o-eu
    api_base: https://example.openai.azure.com/
    api_key: os.environ/AZURE_API_KEY
    rpm: 6
- model_name: vllm-models
  litellm_params:
    model: openai/facebook/opt-125m
    api_base: http://10.0.0.7:4000/v1
    api_key: none
    rpm: 1440
  model_info:
    version: 2
- model_name: zephyr-beta
  litellm_params:
    model: huggingface/HuggingFaceH4/zephyr-7b-beta
    api_base: http://gpu1:8001
- model_name: zephyr-beta
  litellm_params:
    model: huggingface/HuggingFaceH4/zephyr-7b-beta
    api_base: http://gpu2:8001
- model_name: bge
  litellm_params:
    model: hosted_vllm/BAAI/bge-m3
    api_base: os.environ/EMBEDDER
    api_key: sk-literal-secret-0123456789
  model_info:
    mode: embedding
litellm_settings:
  num_retries: 3
  request_timeout: 600
  callbacks: [prometheus]
  fallbacks: [{zephyr-beta: [gpt-4o]}]
router_settings:
  routing_strategy: least-busy
  model_group_alias: {gpt-4: zephyr-beta, gpt-5: gpt-4o}
  redis_password: literal-password
general_settings:
  master_key: sk-1234-master
  max_request_size_mb: 100
environment_variables:
  LANGFUSE_SECRET_KEY: literal-langfuse
"""

RAY = """\
applications:
- name: llm_app
  route_prefix: "/"
  import_path: ray.serve.llm:build_openai_app
  args:
    llm_configs:
    - model_loading_config:
        model_id: qwen-0.5b
        model_source: Qwen/Qwen2.5-0.5B-Instruct
      accelerator_type: A10G
      deployment_config:
        autoscaling_config:
          min_replicas: 1
          max_replicas: 2
          target_ongoing_requests: 32
        max_ongoing_requests: 64
        health_check_period_s: 20
      engine_kwargs:
        tensor_parallel_size: 2
        max_model_len: 8192
        max_num_seqs: 64
        gpu_memory_utilization: 0.85
        enable_prefix_caching: true
        speculative_config: {method: ngram, num_speculative_tokens: 4, prompt_lookup_max: 3}
        limit_mm_per_prompt: {image: 2}
    - model_loading_config:
        model_id: meta-llama/Llama-3.1-8B-Instruct
        model_source:
          bucket_uri: s3://weights/llama-8b
        tokenizer_source: meta-llama/Llama-3.1-8B-Instruct
      accelerator_type: A10
      lora_config:
        dynamic_lora_loading_path: s3://adapters/
        max_num_adapters_per_replica: 8
      runtime_env:
        env_vars: {HF_TOKEN: literal-token, VLLM_LOGGING_LEVEL: DEBUG}
      experimental_configs:
        stream_batching_interval_ms: 0
        num_ingress_replicas: 3
"""


def write(tmp_path: Path, text: str, name: str = "theirs.yaml") -> Path:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def converted(path: Path) -> tuple[Fleet, Result]:
    """What our loader makes of the output, which Serve takes too."""
    result = CliRunner().invoke(convert, [str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    document = yaml.safe_load(result.stdout)
    ServeDeploySchema.model_validate(document)
    return parse_document(document, path), result


def litellm(tmp_path: Path, models: list[dict[str, Any]], **sections: Any) -> tuple[Fleet, Result]:
    return converted(write(tmp_path, yaml.safe_dump({"model_list": models, **sections})))


def entry(name: str, model: str, **params: Any) -> dict[str, Any]:
    return {"model_name": name, "litellm_params": {"model": model, **params}}


def llm(**fields: Any) -> dict[str, Any]:
    """An LLMConfig."""
    return {"model_loading_config": {"model_id": "m", "model_source": "org/m"}, **fields}


def of_ray(tmp_path: Path, *configs: Any, **args: Any) -> tuple[Fleet, Result]:
    application = {
        "name": "llm",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": list(configs), **args},
    }
    return converted(write(tmp_path, yaml.safe_dump({"applications": [application]})))


def said(result: Result, about: str) -> str:
    """The one line on standard error about a key, without its file."""
    [line] = [line for line in result.stderr.splitlines() if f": {about}: " in line]
    return line.split("theirs.yaml:", 1)[1]


# --- LiteLLM -----------------------------------------------------------------------------------


def test_a_model_on_an_own_server_is_an_application(tmp_path: Path) -> None:
    fleet, _ = converted(write(tmp_path, LITELLM))
    assert list(fleet.models) == ["vllm-models", "zephyr-beta", "bge"]
    assert fleet.models["vllm-models"].model == "facebook/opt-125m"
    assert fleet.models["bge"].model == "BAAI/bge-m3"
    assert fleet.models["bge"].engine == {"runner": "pooling"}
    assert fleet.gateway is not None


def test_servers_of_one_model_are_replicas_and_aliases_are_ids(tmp_path: Path) -> None:
    fleet, result = converted(write(tmp_path, LITELLM))
    zephyr = fleet.models["zephyr-beta"]
    assert (zephyr.replicas, zephyr.served_as) == (2, ["gpt-4"])
    assert "# LiteLLM balanced over 2 servers: gpu1:8001, gpu2:8001." in result.stdout
    assert fleet.models["vllm-models"].replicas is None


def test_what_has_no_counterpart_is_said_with_its_line(tmp_path: Path) -> None:
    _, result = converted(write(tmp_path, LITELLM))
    assert said(result, "gpt-4o (azure/gpt-4o-eu)").startswith("2: ")
    assert said(result, "litellm_params.rpm").startswith("13: ")
    assert "no counterpart yet" in said(result, "litellm_params.rpm")
    assert said(result, "router_settings.model_group_alias.gpt-5").startswith("38: ")
    assert "serve-app keys new" in said(result, "general_settings.master_key")
    assert "another replica" in said(result, "litellm_settings.num_retries")
    assert "the model's fallback" in said(result, "litellm_settings.fallbacks")
    assert "no counterpart" in said(result, "environment_variables")
    comments = " ".join(line.lstrip("# ") for line in result.stdout.splitlines())
    for line in result.stderr.splitlines():
        about = line.split("theirs.yaml:", 1)[1].split(":", 1)[1].split(": ")[0].strip()
        assert about in comments


def test_what_has_a_counterpart_is_not_called_missing(tmp_path: Path) -> None:
    fleet, result = converted(write(tmp_path, LITELLM))
    assert fleet.gateway is not None
    assert fleet.gateway.request_timeout_s == 600
    assert fleet.gateway.max_body_mib == 100
    for taken in ("request_timeout", "max_request_size_mb", "routing_strategy", "callbacks"):
        assert taken not in result.stderr


def test_no_secret_comes_out(tmp_path: Path) -> None:
    for text in (LITELLM, RAY):
        _, result = converted(write(tmp_path, text))
        for secret in ("literal", "sk-", "1234"):
            assert secret not in result.output


def test_the_password_of_an_address_stays_in_the_source(tmp_path: Path) -> None:
    models = [entry("m", "vllm/org/m", api_base=f"http://me:hidden@gpu{n}/v1") for n in (1, 2)]
    fleet, result = litellm(tmp_path, models)
    assert fleet.models["m"].replicas == 2
    assert "gpu1" in result.output
    assert "hidden" not in result.output


@pytest.mark.parametrize(
    ("model", "params", "why"),
    [
        ("gpt-4o", {}, "at an outside provider"),
        ("openai/gpt-4o", {}, "at an outside provider"),
        ("openai/gpt-4o", {"api_base": "https://api.openai.com/v1"}, "at an outside provider"),
        ("openai/gpt-4o", {"api_base": "https://me.openai.azure.com/"}, "at an outside provider"),
        ("anthropic/claude-sonnet-4-5", {}, "at an outside provider"),
        ("bedrock/anthropic.claude-v2", {"aws_region_name": "eu-west-1"}, "at an outside"),
        ("ollama/llama2", {"api_base": "http://localhost:11434"}, "by its hub id"),
        ("*", {}, "a wildcard names no model"),
        ("hosted_vllm/*", {"api_base": "http://gpu1/v1"}, "a wildcard names no model"),
        ("os.environ/MODEL", {}, "write the model here"),
    ],
)
def test_what_cannot_run_here_is_left_out_with_a_line(
    tmp_path: Path, model: str, params: dict[str, Any], why: str
) -> None:
    own = entry("mine", "hosted_vllm/org/mine", api_base="http://gpu1/v1")
    fleet, result = litellm(tmp_path, [entry("theirs", model, **params), own])
    assert list(fleet.models) == ["mine"]
    assert why in said(result, f"theirs ({model})")


@pytest.mark.parametrize(
    ("model", "params", "weights"),
    [
        ("hosted_vllm/org/m", {}, "org/m"),
        ("vllm/org/m", {}, "org/m"),
        ("openai/org/m", {"api_base": "http://vllm.models.svc:8000/v1"}, "org/m"),
        ("openai/org/m", {"api_base": "os.environ/VLLM"}, "org/m"),
        ("openai/org/m", {"api_base": "http://llm-1.elb.amazonaws.com"}, "org/m"),
        ("org/m", {"custom_llm_provider": "hosted_vllm"}, "org/m"),
        ("huggingface/org/m", {}, "org/m"),
        ("huggingface/together/org/m", {}, "org/m"),
    ],
)
def test_whose_weights_a_model_has(
    tmp_path: Path, model: str, params: dict[str, Any], weights: str
) -> None:
    fleet, result = litellm(tmp_path, [entry("m", model, **params)])
    assert fleet.models["m"].model == weights
    assert result.stderr == ""


def test_a_server_s_own_name_for_a_model_must_be_replaced(tmp_path: Path) -> None:
    fleet, result = litellm(tmp_path, [entry("m", "openai/mine", api_base="http://gpu1/v1")])
    assert fleet.models["m"].model == "mine"
    assert "hub id or folder" in said(result, "litellm_params.model")


def test_two_names_of_one_server_are_one_model(tmp_path: Path) -> None:
    server = {"api_base": "http://gpu1/v1"}
    fleet, result = litellm(
        tmp_path,
        [
            entry("gpt-4", "hosted_vllm/org/m", **server),
            entry("gpt-3.5", "hosted_vllm/org/m", temperature=0.1, **server),
            entry("elsewhere", "hosted_vllm/org/m", api_base="http://gpu2/v1"),
        ],
    )
    assert list(fleet.models) == ["gpt-4", "elsewhere"]
    assert fleet.models["gpt-4"].served_as == ["gpt-3.5"]
    assert fleet.models["gpt-4"].engine == {}
    assert "other defaults" in said(result, "temperature")


def test_a_pattern_is_no_id(tmp_path: Path) -> None:
    fleet, result = litellm(
        tmp_path,
        [entry("claude-*", "hosted_vllm/org/m", api_base="http://gpu1/v1"),
         entry("claude-*", "hosted_vllm/org/m", api_base="http://gpu2/v1"),
         entry("org/m", "hosted_vllm/org/m", api_base="http://gpu1/v1")],
    )  # fmt: skip
    assert {name: model.served_as for name, model in fleet.models.items()} == {"m": ["org/m"]}
    assert fleet.models["m"].replicas == 2
    assert "'claude-*' is a pattern" in said(result, "model_list.model_name")


def test_one_id_for_two_models_is_the_first_one(tmp_path: Path) -> None:
    fleet, result = litellm(tmp_path, [entry("m", "vllm/org/a"), entry("m", "vllm/org/b")])
    assert [model.model for model in fleet.models.values()] == ["org/a"]
    assert "'m' is already org/a" in said(result, "m (vllm/org/b)")


def test_defaults_of_requests_go_to_the_engine(tmp_path: Path) -> None:
    params = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 20}
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "guided_json": "{}"}
    fleet, result = litellm(tmp_path, [entry("m", "vllm/org/m", extra_body=extra, **params)])
    assert fleet.models["m"].engine == {
        "override_generation_config": {"temperature": 0.2, "top_p": 0.9},
        "default_chat_template_kwargs": {"enable_thinking": False},
    }
    assert "upper limit" in said(result, "litellm_params.max_tokens")
    assert "clients send it" in said(result, "litellm_params.extra_body.guided_json")


def test_names_that_no_application_can_have_become_ids(tmp_path: Path) -> None:
    names = ["org/m", "other/m", "gateway", "two words"]
    models = [entry(name, f"vllm/org/x{n}") for n, name in enumerate(names)]
    aliases = {"router_settings": {"model_group_alias": {"short": "org/m"}}}
    fleet, result = litellm(tmp_path, models, **aliases)
    assert {name: model.served_as for name, model in fleet.models.items()} == {
        "m": ["org/m", "short"],
        "other-m": ["other/m"],
        "gateway": [],
        "two-words": [],
    }
    assert fleet.document["applications"][-1]["name"] == "gateway-2"
    assert "no blanks" in said(result, "model_list.model_name")


def test_what_entries_share_by_an_anchor(tmp_path: Path) -> None:
    text = """\
x-gpu1: &gpu1 {api_base: "http://gpu1/v1", rpm: 5}
model_list:
- model_name: a
  litellm_params: {<<: *gpu1, model: vllm/org/a}
- model_name: b
  litellm_params:
    <<: *gpu1
    model: vllm/org/a
"""
    fleet, result = converted(write(tmp_path, text))
    assert {name: model.served_as for name, model in fleet.models.items()} == {"a": ["b"]}
    assert said(result, "litellm_params.rpm").startswith("4: ")
    assert len(result.stderr.splitlines()) == 1


def test_the_routers_timeout_goes_first(tmp_path: Path) -> None:
    fleet, result = litellm(
        tmp_path,
        [entry("m", "vllm/org/m")],
        litellm_settings={"request_timeout": 10},
        router_settings={"timeout": 30},
    )
    assert fleet.gateway is not None
    assert fleet.gateway.request_timeout_s == 30
    assert "is taken" in said(result, "litellm_settings.request_timeout")


# --- Ray Serve LLM -----------------------------------------------------------------------------


def test_an_llm_config_is_an_application(tmp_path: Path) -> None:
    fleet, _ = converted(write(tmp_path, RAY))
    qwen = fleet.models["qwen-0.5b"]
    assert qwen.model == "Qwen/Qwen2.5-0.5B-Instruct"
    assert qwen.resources.accelerator_type == "A10G"
    assert qwen.autoscaling is not None
    assert (qwen.autoscaling.min_replicas, qwen.autoscaling.max_replicas) == (1, 2)
    assert qwen.autoscaling.target_load == 0.5
    llama = fleet.models["Llama-3.1-8B-Instruct"]
    assert llama.served_as == ["meta-llama/Llama-3.1-8B-Instruct"]
    assert llama.model == "s3://weights/llama-8b"
    assert llama.resources.accelerator_type == "A10G"
    assert llama.env == {"VLLM_LOGGING_LEVEL": "DEBUG"}
    assert llama.engine == {
        "tokenizer": "meta-llama/Llama-3.1-8B-Instruct",
        "load_format": "runai_streamer",
        "enable_lora": True,
        "max_loras": 8,
    }
    assert fleet.gateway is not None
    assert fleet.gateway.replicas == 3
    [first, *_] = fleet.document["applications"]
    assert first["deployments"] == [{"name": "ModelServer", "health_check_period_s": 20}]


def test_every_engine_argument_is_kept(tmp_path: Path) -> None:
    fleet, _ = converted(write(tmp_path, RAY))
    [application] = yaml.safe_load(RAY)["applications"]
    given = application["args"]["llm_configs"][0]["engine_kwargs"]
    assert fleet.models["qwen-0.5b"].engine == given


def test_what_ray_has_and_we_have_not_is_said_with_its_line(tmp_path: Path) -> None:
    _, result = converted(write(tmp_path, RAY))
    assert said(result, "deployment_config.max_ongoing_requests").startswith("16: ")
    assert "'s3://adapters/NAME'" in said(result, "lora_config.dynamic_lora_loading_path")
    assert "where Ray runs" in said(result, "runtime_env.env_vars.HF_TOKEN")
    assert len(result.stderr.splitlines()) == 4


@pytest.mark.parametrize(
    "document",
    [
        {"llm_configs": [llm()]},
        [llm()],
        llm(),
        {"applications": [{"import_path": "ray.serve.llm:build_openai_app",
                           "args": {"llm_configs": [llm()]}}]},
        {"applications": [{"import_path": "ray.llm._internal.serve.builders:build_openai_app",
                           "args": {"llm_configs": [llm()]}}]},
        {"applications": [{"import_path": "ray.serve.llm:build_dp_openai_app",
                           "args": {"llm_config": llm()}}]},
    ],
)  # fmt: skip
def test_every_form_of_the_file_is_known(tmp_path: Path, document: Any) -> None:
    assert foreign.recognize(document) == foreign.RAY_SERVE_LLM
    fleet, _ = converted(write(tmp_path, yaml.safe_dump(document)))
    assert fleet.models["m"].model == "org/m"


def test_a_rayservice_is_read_with_its_lines(tmp_path: Path) -> None:
    head = "kind: RayService\nspec:\n  serveConfigV2: |\n"
    body = "".join(f"    {line}\n" for line in RAY.splitlines())
    tail = "  rayClusterConfig: {}\n---\nkind: Secret\nstringData: {a: b}\n"
    fleet, result = converted(write(tmp_path, head + body + tail))
    assert list(fleet.models) == ["qwen-0.5b", "Llama-3.1-8B-Instruct"]
    assert said(result, "deployment_config.max_ongoing_requests").startswith("19: ")
    assert foreign.recognize(yaml.safe_load(head + body)) == foreign.RAY_SERVE_LLM
    [line] = command.refusal("convert", str(write(tmp_path, head + "    a: [\n")))
    assert "theirs.yaml:3: spec.serveConfigV2 is not YAML" in line


def test_llm_configs_may_be_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, yaml.safe_dump(llm(bad_key=1)), "models/qwen.yaml")
    text = yaml.safe_dump({"llm_configs": ["models/qwen.yaml"]})
    elsewhere = write(tmp_path, "", "elsewhere/empty").parent
    for here, name in (
        (tmp_path, "theirs.yaml"),  # as Ray looks for it
        (elsewhere, "theirs.yaml"),  # beside the file
        (elsewhere, "configs/theirs.yaml"),  # in a folder above it
    ):
        monkeypatch.chdir(here)
        fleet, result = converted(write(tmp_path, text, name))
        assert list(fleet.models) == ["m"]
        assert "models/qwen.yaml:1: bad_key: no counterpart" in result.stderr
        assert "# - qwen.yaml line 1: bad_key" in result.stdout


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ({"task": "embed"}, {"runner": "pooling", "convert": "embed"}),
        ({"task": "generate"}, {}),
        ({"disable_log_requests": True}, {"enable_log_requests": False}),
        ({"guided_decoding_backend": "xgrammar"},
         {"structured_outputs_config": {"backend": "xgrammar"}}),
        ({"max_seq_len_to_capture": 8192}, {"max_cudagraph_capture_size": 8192}),
        ({"swap_space": 4, "use_v2_block_manager": True, "seed": 1}, {"seed": 1}),
        ({"device": "auto"}, {}),
    ],
)  # fmt: skip
def test_arguments_of_an_older_vllm_get_their_names_of_today(
    tmp_path: Path, was: dict[str, Any], now: dict[str, Any]
) -> None:
    fleet, _ = of_ray(tmp_path, llm(engine_kwargs=was))
    assert fleet.models["m"].engine == now


@pytest.mark.parametrize(
    ("config", "args"),
    [
        ({"deployment_config": {"num_replicas": 3}}, {"replicas": 3}),
        ({"deployment_config": {"graceful_shutdown_timeout_s": 60}},
         {"graceful_shutdown_timeout_s": 60}),
        ({"deployment_config": {"num_replicas": "auto"}},
         {"autoscaling": {"min_replicas": 1, "max_replicas": 100}}),
        ({"deployment_config": {"num_replicas": "auto",
                                "autoscaling_config": {"max_replicas": 4, "initial_replicas": 2}}},
         {"autoscaling": {"min_replicas": 1, "max_replicas": 4, "initial_replicas": 2}}),
        ({"deployment_config": {"autoscaling_config": {"min_replicas": 0, "max_replicas": 4},
                                "num_replicas": "auto"}},
         {"autoscaling": {"min_replicas": 0, "max_replicas": 4}}),
        ({"deployment_config": {"ray_actor_options": {"num_cpus": 8, "memory": 2**34}}},
         {"resources": {"num_cpus": 8, "memory_gib": 16.0}}),
        ({"placement_group_config": {"bundle_per_worker": {"CPU": 4}}},
         {"resources": {"device": "cpu", "num_cpus": 4}}),
        ({"placement_group_config": {"bundle_per_worker": {"GPU": 0.5}}},
         {"resources": {"gpu_share": 0.5}}),
        ({"placement_group_config": {"bundles": [{"GPU": 1, "CPU": 2}] * 2}},
         {"resources": {"num_cpus": 4}}),
        ({"placement_group_config": {"bundles": [{"GPU": 1, "accelerator_type:L4": 0.001}]}},
         {"resources": {"accelerator_type": "L4"}}),
        ({"accelerator_config": {"kind": "cpu"}}, {"resources": {"device": "cpu"}}),
        ({"engine_kwargs": {"device": "cpu"}}, {"resources": {"device": "cpu"}}),
        ({"accelerator_config": {"kind": "gpu"}, "log_engine_metrics": True}, {}),
    ],
)  # fmt: skip
def test_what_each_field_becomes(
    tmp_path: Path, config: dict[str, Any], args: dict[str, Any]
) -> None:
    fleet, result = of_ray(tmp_path, llm(**config))
    [application, _] = fleet.document["applications"]
    assert application["args"] == {"model": "org/m", **args}
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("config", "about", "why"),
    [
        ({"accelerator_type": "TPU-V6E"}, "accelerator_type", "GPUs"),
        ({"log_engine_metrics": False}, "log_engine_metrics", "always there"),
        ({"placement_group_config": {"bundles": [{"GPU": 0.5}, {"GPU": 0.5}]}},
         "placement_group_config", "a part of one GPU, or whole GPUs"),
        ({"placement_group_config": {"bundle_per_worker": {"GPU": 1}, "strategy": "SPREAD"}},
         "placement_group_config.strategy", "share a node"),
        ({"deployment_config": {"request_router_config": {}}},
         "deployment_config.request_router_config", "fewest requests"),
        ({"deployment_config": {"autoscaling_config": {"target_ongoing_requests": 8}}},
         "deployment_config.autoscaling_config.target_ongoing_requests", "share of"),
        ({"runtime_env": {"pip": ["git+https://token@example.com/x"]}}, "runtime_env.pip",
         "not copied"),
        ({"runtime_env": {"env_vars": {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}}},
         "runtime_env.env_vars.RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", "not needed"),
        ({"callback_config": {"callback_class": "a.B"}}, "callback_config", "no counterpart"),
        ({"engine_kwargs": {"hf_token": "x"}}, "engine_kwargs.hf_token", "set HF_TOKEN where"),
        ({"engine_kwargs": {"ssl_keyfile": "x"}}, "engine_kwargs.ssl_keyfile", "own server"),
    ],
)  # fmt: skip
def test_what_each_field_cannot_become(
    tmp_path: Path, config: dict[str, Any], about: str, why: str
) -> None:
    _, result = of_ray(tmp_path, llm(**config))
    assert why in said(result, about)


@pytest.mark.parametrize(
    ("source", "weights", "why"),
    [
        (None, "m", None),
        ("/mnt/models/m", "/mnt/models/m", None),
        ({"bucket_uri": "s3://b/m"}, "s3://b/m", None),
        ("s3://anonymous@b/m", "s3://b/m", None),
        ("gs://b/m", "gs://b/m", "runai-model-streamer[gcs]"),
        ("abfss://c@a.dfs.example.com/m", "abfss://c@a.dfs.example.com/m", "not abfss://"),
    ],
)
def test_where_weights_come_from(
    tmp_path: Path, source: Any, weights: str, why: str | None
) -> None:
    loading = {"model_loading_config": {"model_id": "m", "model_source": source}}
    fleet, result = of_ray(tmp_path, loading)
    model = fleet.models["m"]
    assert model.model == weights
    unsigned = {"RUNAI_STREAMER_S3_UNSIGNED": "1"} if "anonymous" in str(source) else {}
    assert model.env == unsigned
    streamed = weights.startswith(("s3://", "gs://"))
    assert model.engine == ({"load_format": "runai_streamer"} if streamed else {})
    assert (why in result.stderr) if why else result.stderr == ""


def test_the_ingress_is_the_gateway(tmp_path: Path) -> None:
    options = {
        "autoscaling_config": {"min_replicas": 2, "max_replicas": 4},
        "ray_actor_options": {"num_cpus": 2},
        "max_ongoing_requests": 100,
    }
    fleet, result = of_ray(tmp_path, llm(), ingress_deployment_config=options)
    assert fleet.gateway is not None
    assert (fleet.gateway.replicas, fleet.gateway.num_cpus) == (2, 2)
    said(result, "ingress_deployment_config.autoscaling_config.max_replicas")
    said(result, "ingress_deployment_config.max_ongoing_requests")


def test_the_rest_of_a_serve_config_stays(tmp_path: Path) -> None:
    models = {
        "import_path": "ray.serve.llm:build_openai_app",
        "route_prefix": "/llm",
        "runtime_env": {
            "env_vars": {"A": "1", "B": "application"},
            "working_dir": "s3://code/x.zip",
        },
        "args": {"llm_configs": [llm(runtime_env={"env_vars": {"B": "model"}})]},
    }
    other = {"name": "other", "import_path": "mine:app", "route_prefix": "/"}
    document = {"http_options": {"port": 9000}, "applications": [models, other]}
    fleet, result = converted(write(tmp_path, yaml.safe_dump(document)))
    [model, taken, _] = fleet.document["applications"]
    assert fleet.port == 9000
    assert taken == other | {"route_prefix": "/other"}
    assert model["args"]["env"] == {"A": "1", "B": "model"}
    assert model["runtime_env"] == {"working_dir": "s3://code/x.zip"}
    assert "is '/other' now" in said(result, "other.route_prefix")
    assert "at /v1" in said(result, "route_prefix")


def test_prefill_and_decode_become_one_engine(tmp_path: Path) -> None:
    application = {
        "import_path": "ray.serve.llm:build_pd_openai_app",
        "args": {"prefill_config": llm(), "decode_config": llm()},
    }
    fleet, result = converted(write(tmp_path, yaml.safe_dump({"applications": [application]})))
    assert list(fleet.models) == ["m"]
    assert "both phases" in said(result, "prefill_config")


def _fields(file: str, name: str) -> set[str]:
    """The public fields of a class of the installed Ray, whose import needs more than is here."""
    [folder] = ray.llm.__path__
    tree = ast.parse((Path(folder) / "_internal/serve/core" / file).read_text())
    [found] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    names = {
        line.target.id
        for line in found.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    return {name for name in names if not name.startswith("_")}


def test_the_installed_ray_has_no_field_that_is_not_known() -> None:
    known = {*ray_serve_llm._FIELDS, "experimental_configs", "callback_config"}
    assert _fields("configs/llm_config.py", "LLMConfig") == known
    assert _fields("configs/llm_config.py", "ModelLoadingConfig") == {
        "model_id", "model_source", "tokenizer_source",
    }  # fmt: skip
    assert _fields("configs/llm_config.py", "LoraConfig") == {
        "dynamic_lora_loading_path", "max_num_adapters_per_replica", "download_timeout_s",
        "max_download_tries",
    }  # fmt: skip
    assert _fields("ingress/builder.py", "LLMServingArgs") == {
        "llm_configs", "ingress_cls_config", "ingress_deployment_config",
    }  # fmt: skip


# --- vllm serve --------------------------------------------------------------------------------

VLLM = """\
model: meta-llama/Llama-3.1-8B-Instruct
served-model-name: [llama, meta-llama/Llama-3.1-8B-Instruct]
host: 127.0.0.1
port: 6379
uvicorn-log-level: info
api-server-count: 4
api-key: literal-key
tensor-parallel-size: 2
max-model-len: 16k
enable-auto-tool-choice: true
tool-call-parser: llama3_json
allowed-origins: ["https://chat.example.com"]
lora-modules: [sql=s3://adapters/sql, '{"name": "tone", "path": "org/tone"}']
"""


def test_a_config_of_vllm_serve_is_one_model(tmp_path: Path) -> None:
    fleet, result = converted(write(tmp_path, VLLM))
    [(name, model)] = fleet.models.items()
    assert (name, model.model) == ("llama", "meta-llama/Llama-3.1-8B-Instruct")
    assert model.served_as == ["meta-llama/Llama-3.1-8B-Instruct"]
    assert model.engine == {
        "tensor_parallel_size": 2,
        "max_model_len": "16k",
        "enable_auto_tool_choice": True,
        "tool_call_parser": "llama3_json",
    }
    assert [(a.name, a.path) for a in model.adapters] == [
        ("sql", "s3://adapters/sql"),
        ("tone", "org/tone"),
    ]
    assert fleet.http_options == {"host": "127.0.0.1", "port": 6379}
    assert model.frontends == 4
    assert fleet.gateway is not None
    assert fleet.gateway.cors_allow_origins == ["https://chat.example.com"]
    assert "own server" in said(result, "uvicorn-log-level")
    assert "serve-app keys new" in said(result, "api-key")
    assert "literal" not in result.output


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a config that can be converted: "),
        ("just text", "not a config that can be converted: "),
        ("[]", "not a config that can be converted: "),
        ("modle_list: []", "not a config that can be converted: "),
        ("model_list: [", "line 1, column 14: "),
        ("model_list:", "1: model_list must be a list with at least one entry"),
        ("model_list: []", "1: model_list must be a list with at least one entry"),
        ("model_list: {a: 1}", "1: model_list must be a list with at least one entry"),
        ("model_list:\n- text", "2: model_list.model_name is missing"),
        ("model_list:\n- model_name: m", "2: litellm_params of 'm' must be a mapping with 'model'"),
        ("model_list:\n- model_name: m\n  litellm_params: {rpm: 1}",
         "3: litellm_params.model is missing"),
        ("model_list:\n- model_name: 5\n", "2: model_list.model_name is 5, but must be text"),
        ("model_list:\n- {model_name: m, litellm_params: {model: openai/gpt-4o}}",
         "serve_app could run none of its models (m): "),
        ("model_list:\n- {model_name: m, litellm_params: {model: vllm/a/b}}\nrouter_settings: 5",
         "3: router_settings must be a mapping"),
        ("llm_configs: []", "1: llm_configs must be a list with at least one entry"),
        ("applications:\n- {import_path: ray.serve.llm:build_openai_app}",
         "2: args has no llm_configs"),
        ("llm_configs:\n- 5", "2: an LLMConfig must be a mapping with 'model_loading_config'"),
        ("llm_configs: [nowhere.yaml]", "nowhere.yaml: no such file"),
        ("model_loading_config: {}", "1: model_loading_config.model_id is missing"),
        ("model_loading_config: {model_id: m}\nengine_kwargs: 5",
         "2: engine_kwargs must be a mapping"),
        ("model_loading_config: {model_id: m}\nengine_kwargs: {1: 2}",
         "2: engine_kwargs has the key 1, but keys must be text"),
        ("model_loading_config: {model_id: m}\nllm_engine: SGLang",
         "2: llm_engine is 'SGLang', but serve_app runs vLLM only"),
        ("model_loading_config: {model_id: m}\nengine_kwargs: {max_modle_len: 5}",
         "application 'm': engine.max_modle_len is not an argument of vLLM 0.29.0; "
         "did you mean 'max_model_len'?"),
        ("model_loading_config: {model_id: m}\nplacement_group_config: {bundles: [{GPU: x}]}",
         "2: placement_group_config.bundles has GPU: 'x', but it must be a number"),
        ("model_loading_config: {model_id: m}\ndeployment_config: {num_replicas: 0}",
         "application 'm': replicas is 0, but "),
        ("model: [a]\nport: 1", "1: model is ['a'], but must be text"),
        ("model: a/b\nport: zero", "http_options.port is 'zero', but must be 1 to 65535"),
        ("model: a/b\nlora-modules: ['{']", "2: lora-modules has '{', which is not JSON"),
        ("model: a/b\ngpu-memory-utilisation: 0.9\ndtype: auto",
         "engine.gpu_memory_utilisation is not an argument of vLLM 0.29.0; did you mean "
         "'gpu_memory_utilization'?"),
        ("tensor-parallel-size: 2\nport: 8000",
         "1: the file names no model, which `vllm serve` then takes from its command line; add "
         "model: ID"),
        ("applications: []", "a Serve config already; only one of Ray Serve LLM's can be"),
    ],
)  # fmt: skip
def test_a_source_with_a_mistake_is_refused_in_one_line(
    tmp_path: Path, text: str, why: str
) -> None:
    [line] = command.refusal("convert", str(write(tmp_path, text)))
    assert why in line


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value of a document is."""
    if path:
        yield path
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield from _paths(value[key], (*path, key))


@pytest.mark.parametrize("odd", [None, "text", [None], {1: 2}])
@pytest.mark.parametrize("text", [LITELLM, RAY, VLLM])
def test_any_value_may_be_anything(tmp_path: Path, text: str, odd: Any) -> None:
    """Each value of each example in turn: it is refused in a sentence, or our loader takes it."""
    ends = {"refused": 0, "taken": 0}
    for path in _paths(yaml.safe_load(text)):
        document = yaml.safe_load(text)
        functools.reduce(operator.getitem, path[:-1], document)[path[-1]] = odd
        source = write(tmp_path, yaml.safe_dump(document))
        try:
            made = draft_of(source).to_yaml(source)
        except ConfigError as error:
            assert "\n" not in str(error)
            ends["refused"] += 1
        else:
            parse_document(yaml.safe_load(made), source)
            ends["taken"] += 1
    assert all(ends.values())


def test_output_is_written_once(tmp_path: Path) -> None:
    source, output = write(tmp_path, RAY), tmp_path / "fleet.yaml"
    result = CliRunner().invoke(convert, [str(source), "-o", str(output)])
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == f"{output}: 2 models; next: serve-app plan {output}"
    assert list(load(output).models) == ["qwen-0.5b", "Llama-3.1-8B-Instruct"]
    before = output.read_text()
    [line] = command.refusal("convert", str(source), "-o", str(output))
    assert "is there already" in line
    assert output.read_text() == before
    [line] = command.refusal("convert", str(source), "-o", str(tmp_path / "no" / "fleet.yaml"))
    assert "cannot be written (No such file or directory)" in line


@pytest.mark.parametrize(
    ("text", "program"), [(LITELLM, "LiteLLM"), (RAY, "Ray Serve LLM"), (VLLM, "vllm serve")]
)
@pytest.mark.parametrize("name", ["run", "plan", "check", "render"])
def test_the_other_commands_say_how_to_convert(
    tmp_path: Path, text: str, program: str, name: str
) -> None:
    path = write(tmp_path, text)
    [line] = command.refusal(name, str(path))
    assert line == (
        f"serve-app: {path}: this is a config of {program}; "
        f"`serve-app convert {path} -o fleet.yaml` writes ours"
    )


def test_rays_models_beside_ours_are_an_ordinary_config() -> None:
    ours = {
        "name": "m",
        "route_prefix": None,
        "import_path": "serve_app.model:app",
        "args": {"model": "org/m"},
    }
    rays = {
        "name": "llm",
        "route_prefix": "/llm",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [llm()]},
    }
    assert list(parse_document({"applications": [ours, rays]}, Path("c.yaml")).models) == ["m"]
    with pytest.raises(ConfigError, match="serve-app convert"):
        parse_document({"applications": [rays]}, Path("c.yaml"))


def test_the_guide_s_commands_run_and_write_what_it_shows(tmp_path: Path) -> None:
    guide = (REPO / "docs" / "convert.md").read_text()
    blocks = re.findall(r"^```(sh|yaml)\n(.*?)^```$", guide, re.S | re.M)
    assert [kind for kind, _ in blocks] == ["sh", "yaml", "sh"]
    (_, first), (_, shown), (_, second) = blocks
    assert run(first, tmp_path) == shown
    assert run(second, tmp_path) == ""
    [qwen] = load(tmp_path / "fleet.yaml").models.values()
    assert qwen.autoscaling is not None
    assert qwen.autoscaling.target_load == 0.5


def run(script: str, folder: Path) -> str:
    """What a shell with this environment's commands says to a block of the guide."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPO)}
    return subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, check=True, text=True,
        stdout=subprocess.PIPE,
    ).stdout  # fmt: skip

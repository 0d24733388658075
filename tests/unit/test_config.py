"""Configs: what is refused and in which words, and that every shipped one can be deployed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import command
from harness.processes import REPO
from ray.serve.schema import ServeDeploySchema

from serve_app import gateway, model
from serve_app.config.document import (
    GATEWAY_IMPORT_PATH,
    MODEL_IMPORT_PATH,
    Fleet,
    load,
    parse_document,
)
from serve_app.config.environment import environment
from serve_app.config.settings import GatewayConfig, ModelConfig, parse
from serve_app.errors import ConfigError

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))
GATEWAY = {"name": "gateway", "route_prefix": "/", "import_path": GATEWAY_IMPORT_PATH}


def chat(name: str = "m", **args: Any) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": None,
        "import_path": MODEL_IMPORT_PATH,
        "args": {"model": "org/model", **args},
    }


def document(*applications: Any, **more: Any) -> dict[str, Any]:
    return {"applications": list(applications), **more}


def refusal(content: Any) -> str:
    """The one line that says why a config cannot work."""
    with pytest.raises(ConfigError) as raised:
        parse_document(content, Path("c.yaml"))
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("c.yaml: ")
    return message.removeprefix("c.yaml: ")


def live(user_config: dict[str, Any]) -> dict[str, Any]:
    return {"deployments": [{"name": "ModelServer", "user_config": user_config}]}


def refused_args(**args: Any) -> str:
    return refusal(document(chat(**args))).removeprefix("application 'm': ")


# --- the document ----------------------------------------------------------------------------


@pytest.mark.parametrize("content", [[], "text", 5, {}, {"https": 1}])
def test_what_is_no_serve_config_is_refused(content: Any) -> None:
    assert refusal(content) == "not a Serve config: it has no 'applications' list"


def test_an_empty_file_and_a_misspelled_list_are_told_as_such() -> None:
    assert refusal(None) == "the file is empty; `serve-app run MODEL --save` writes one"
    assert refusal({"aplications": []}) == (
        "not a Serve config: it has no 'applications' list (there is 'aplications'; did you mean "
        "'applications'?)"
    )


@pytest.mark.parametrize("applications", [None, [], {}, "m"])
def test_applications_must_be_a_list_with_something_in_it(applications: Any) -> None:
    content = {"applications": applications}
    assert refusal(content) == "'applications' must be a list with at least one model"


@pytest.mark.parametrize(
    ("application", "why"),
    [
        ("m", "application 1 must be a mapping"),
        ({}, "application 1 has no name; for a model it is its id"),
        ({"name": 5}, "the name of application 1 is 5, but must be text; put it in quotes"),
        (
            {"name": "m"},
            "application 'm': import_path is missing; a model has serve_app.model:app, "
            "the gateway serve_app.gateway:app",
        ),
        (
            {"name": "m", "import_path": "serve_app.modle:app"},
            "application 'm': import_path is 'serve_app.modle:app'; "
            "did you mean 'serve_app.model:app'?",
        ),
        (
            chat() | {"routeprefix": None},
            "application 'm': 'routeprefix' is not a key of a Serve application; "
            "did you mean 'route_prefix'?",
        ),
        (
            chat() | {"route_prefix": "/m"},
            "application 'm': a model needs 'route_prefix: null'; "
            "clients reach it through the gateway",
        ),
        (
            {k: v for k, v in chat().items() if k != "route_prefix"},
            "application 'm': a model needs 'route_prefix: null'; "
            "clients reach it through the gateway",
        ),
        (
            chat("org/m:1.0"),
            "application 'org/m:1.0': an application's name cannot hold '/' (Serve makes a file "
            "name of it); name it 'm:1.0' and list 'org/m:1.0' in args.served_as",
        ),
        (
            chat() | {"deployments": [{"name": "ModelServer", "num_replica": 2}]},
            "application 'm': 'num_replica' is not a key of a Serve deployment; "
            "did you mean 'num_replicas'?",
        ),
        (
            chat() | live({"adapter": []}),
            "application 'm': user_config: 'adapter' is not a setting; did you mean 'adapters'? "
            "(known: adapters, routing, fallback, fallback_after_s)",
        ),
        (
            chat() | live({"fallback": ["m"]}),
            "application 'm': fallback has 'm', the model itself; remove it",
        ),
        (
            chat(fallback=["other"]) | live({"fallback": ["x", "x"]}),
            "application 'm': user_config: fallback lists 'x' twice; remove one",
        ),
        (
            chat() | live({"routing": {"policy": "best"}}),
            "application 'm': user_config: routing.policy is 'best', but should be 'cache_aware', "
            "'least_loaded' or 'round_robin'",
        ),
        (
            chat() | live({"adapters": [{"name": "poet", "path": "/p"}]}),
            "application 'm': adapters in user_config need engine.enable_lora: true",
        ),
        (
            chat(engine={"enable_lora": True}) | live({"adapters": [{"name": "m", "path": "/p"}]}),
            "'m' lists the id 'm' twice; remove one",
        ),
        (chat(served_as=["m"]), "'m' lists the id 'm' twice; remove one"),
        (chat("a b"), "application 'a b': an application's name cannot hold spaces"),
        (chat() | {"args": 5}, "application 'm': args must be a mapping, not int"),
        (chat() | {"args": None}, "application 'm': 'model' is missing"),
    ],
)
def test_an_application_that_cannot_be_deployed_is_refused(application: Any, why: str) -> None:
    assert refusal(document(application)) == why


@pytest.mark.parametrize("name", ["m\n", "a\tb", " "])
def test_a_name_with_a_line_break_is_refused_in_one_line(name: str) -> None:
    assert "cannot hold spaces" in refusal(document(chat(name)))


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        ({"http_optons": {}}, "did you mean 'http_options'?"),
        ({"http_options": 5}, "http_options"),
        ({"http_options": {"port": "x"}}, "port"),
        ({"http_options": {"port": 70000}}, "port"),
    ],
)
def test_a_wrong_key_of_the_document_is_refused(more: dict[str, Any], hint: str) -> None:
    assert hint in refusal(document(chat(), **more))


def test_the_port_is_serves_default_where_none_is_set() -> None:
    def port(**more: Any) -> int:
        return parse_document(document(chat(), **more), Path("c.yaml")).port

    assert port() == port(http_options=None) == port(http_options={"host": "0.0.0.0"}) == 8000
    assert port(http_options={"port": 8123}) == 8123


# --- ids -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m:1.0", "a.b-c_d", "Ω", "m@sha256:0", "x" * 100])
def test_names_that_serve_can_deploy_are_taken(name: str) -> None:
    assert list(parse_document(document(chat(name)), Path("c.yaml")).models) == [name]


LORA = {"name": "z", "path": "p"}


@pytest.mark.parametrize(
    ("one", "other", "id"),
    [
        (chat("a"), chat("b", served_as=["a"]), "a"),
        (chat("a", served_as=["org/z"]), chat("b", served_as=["x", "org/z"]), "org/z"),
        (chat("a", adapters=[LORA]), chat("b", served_as=["z"]), "z"),
        (chat("a", adapters=[LORA]), chat("b", adapters=[LORA]), "z"),
        (chat("a", adapters=[{"name": "b", "path": "p"}]), chat("b"), "b"),
    ],
)
def test_two_models_with_one_id_are_refused_naming_both(one: Any, other: Any, id: str) -> None:
    expected = f"the model id '{id}' belongs to both 'a' and 'b'; change it in one of them"
    assert refusal(document(one, GATEWAY, other)) == expected


def test_two_applications_of_one_name_are_refused() -> None:
    why = "application 'm': two applications have this name; rename one"
    assert refusal(document(chat(), chat())) == why


@pytest.mark.parametrize(
    "args", [{"adapters": [LORA, LORA]}, {"adapters": [LORA], "served_as": ["z"]}]
)
def test_an_adapter_cannot_share_its_id_within_a_model(args: dict[str, Any]) -> None:
    assert "'z'" in refusal(document(chat(**args)))


# --- a model's args --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"modle": "x"}, "'modle' is not a setting; did you mean 'model'? (known: model, "),
        ({"model": None}, "model is empty; give it a value or remove it"),
        ({"model": ""}, "model is empty; give it a value or remove it"),
        ({"served_as": "z"}, "served_as is 'z', but must be a list, such as ['z']"),
        ({"served_as": ["a b"]}, "served_as.0 is 'a b'"),
        ({"served_as": [""]}, "served_as.0 is empty; give it a value or remove it"),
        ({"replicas": 0}, "replicas is 0, but should be greater than or equal to 1"),
        ({"replicas": "two"}, "replicas is 'two', but must be a whole number"),
        (
            {"replicas": 1, "autoscaling": {}},
            "replicas and autoscaling exclude each other; keep one",
        ),
        (
            {"autoscaling": {"min_replicas": 3, "max_replicas": 2}},
            "autoscaling: max_replicas is 2, below min_replicas (3)",
        ),
        (
            {"autoscaling": {"min_replica": 3}},
            "'autoscaling.min_replica' is not a setting; did you mean 'min_replicas'?",
        ),
        (
            {"autoscaling": {"initial_replicas": 3}},
            "autoscaling: initial_replicas must lie between min_replicas and max_replicas",
        ),
        (
            {"autoscaling": {"target_load": 70}},
            "autoscaling.target_load is 70, but should be less than or equal to 1",
        ),
        (
            {"resources": {"device": "tpu"}},
            "resources.device is 'tpu', but should be 'gpu' or 'cpu'",
        ),
        ({"resources": {"gpu": 2}}, "'resources.gpu' is not a setting (known: device, "),
        ({"resources": {"gpus": 2}}, "'resources.gpus' is not a setting; a replica has as many"),
        (
            {"resources": {"gpu_share": 1}},
            "resources.gpu_share is 1, but a part of one GPU is below 1; remove it for whole GPUs",
        ),
        ({"resources": {"gpu_share": 0}}, "resources.gpu_share is 0, but should be greater than 0"),
        (
            {"resources": {"gpu_share": 0.3, "gpu_memory_gib": 24}},
            "resources.gpu_share and resources.gpu_memory_gib say the same in two units; keep one",
        ),
        (
            {"resources": {"gpu_memory_gib": 24, "device": "cpu"}},
            "resources.gpu_memory_gib needs device: gpu",
        ),
        (
            {"resources": {"gpu_share": 0.3}, "engine": {"tensor_parallel_size": 2}},
            "resources.gpu_share is a part of one GPU, but engine.tensor_parallel_size is 2; "
            "remove one of the two",
        ),
        (
            {"resources": {"gpu_memory_gib": 9}, "engine": {"data_parallel_size": 2}},
            "resources.gpu_memory_gib is a part of one GPU, but engine.data_parallel_size is 2",
        ),
        (
            {
                "resources": {"gpu_share": 0.3},
                "engine": {"distributed_executor_backend": "ray"},
            },
            "resources.gpu_share needs vLLM's executor 'uni'",
        ),
        (
            {"num_gpus": 0.3},
            "'num_gpus' is not a setting; a part of a GPU is `resources: {gpu_share: 0.3}`",
        ),
        (
            {"resources": {"num_cpus": -1}},
            "resources.num_cpus is -1, but should be greater than or equal to 0",
        ),
        (
            {"resources": {"device": "cpu", "accelerator_type": "H100"}},
            "resources.accelerator_type needs device: gpu",
        ),
        ({"adapters": [{"name": "a"}]}, "'adapters.0.path' is missing"),
        (
            {"adapters": [LORA], "engine": {"enable_lora": False}},
            "adapters need engine.enable_lora; remove 'enable_lora: false'",
        ),
        ({"env": [1]}, "env is [1], but must be a mapping of names to values"),
        ({"hang_timeout_s": float("inf")}, "hang_timeout_s is inf, but should be a finite number"),
        ({"cache_dir": "~/models"}, "cache_dir: '~/models' must be a folder's whole path"),
        ({"resources": {"accelerator_type": ""}}, "resources.accelerator_type is empty"),
        (
            {"autoscaling": {"min_replicas": 2}},
            "autoscaling: max_replicas is 1 (the default), below min_replicas (2); set it",
        ),
        (
            {"adapters": [{"name": "poet", "pth": "/x"}]},
            "'adapters.0.path' is missing (there is 'pth'; did you mean 'path'?)",
        ),
        (
            {"start_timeout_s": "soon"},
            "start_timeout_s is 'soon', but must be a number, without a unit",
        ),
        ({"engine": 5}, "engine is 5, but must be a mapping of names to values"),
        (
            {"autoscaling": True},
            "autoscaling is true, but must be a mapping with some of: min_replicas, max_replicas, ",
        ),
        ({"adapters": ["z"]}, "adapters.0 is 'z', but must be a mapping with some of: name, path"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_allowed(args: dict[str, Any], why: str) -> None:
    assert refused_args(**args).startswith(why)


NO_TEXT = "fallback is for models that generate text: the vectors and scores of another model mean"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"fallback": "small"}, "fallback is 'small', but must be a list, such as ['small']"),
        ({"fallback": ["a b"]}, "fallback.0 is 'a b', but an id has no spaces"),
        ({"fallback": [1]}, "fallback.0 is 1, but must be text; put it in quotes, or remove it"),
        ({"fallback": [""]}, "fallback.0 is empty; give it a value or remove it"),
        ({"fallback": None}, "fallback is empty; give it a value or remove it"),
        ({"fallback": ["a", "b", "a"]}, "fallback lists 'a' twice; remove one"),
        ({"fallbacks": ["a"]}, "'fallbacks' is not a setting; did you mean 'fallback'? (known: "),
        (
            {"engine": {"fallback": ["a"]}},
            "engine.fallback is not an argument of vLLM; put it beside engine, under args: "
            "`fallback: [a]`",
        ),
        ({"fallback": ["a"], "fallback_after_s": -1}, "fallback_after_s is -1, but "),
        (
            {"fallback": ["a"], "fallback_after_s": "10s"},
            "fallback_after_s is '10s', but must be a number, without a unit",
        ),
        (
            {"fallback_after_s": 5},
            "fallback_after_s is 5, but the model has no fallback; set fallback, or remove it",
        ),
        ({"fallback": ["a"], "engine": {"runner": "pooling"}}, NO_TEXT),
        ({"fallback": ["a"], "engine": {"convert": "embed"}}, NO_TEXT),
    ],
)
def test_a_fallback_that_cannot_be_is_refused(args: dict[str, Any], why: str) -> None:
    assert refused_args(**args).startswith(why)


@pytest.mark.parametrize("own", ["m", "org/m", "sql", "law"])
def test_a_model_is_not_its_own_fallback(own: str) -> None:
    args = {"fallback": ["other", own], "served_as": ["org/m"],
            "adapters": [{"name": "sql", "path": "/a"}]}  # fmt: skip
    application = chat(**args)
    if own == "law":
        application |= live({"adapters": [{"name": "law", "path": "/b"}]})
    why = refusal(document(application))
    assert why.endswith(f"application 'm': fallback has '{own}', the model itself; remove it")


@pytest.mark.parametrize("value", [None, {"x": 1}, [1]])
def test_an_environment_variable_must_be_a_plain_value(value: Any) -> None:
    assert "env" in refused_args(env={"A": value})


def test_numbers_and_booleans_of_the_environment_are_text() -> None:
    args = {"model": "m", "env": {"A": 1, "B": True, "C": "x", "D": 0.5}}
    assert ModelConfig.model_validate(args).env == {"A": "1", "B": "true", "C": "x", "D": "0.5"}


def shown(value: Any) -> str:
    """As YAML has it."""
    return "empty" if value is None else "true" if value is True else repr(value)


@pytest.mark.parametrize("value", [0, -1, 17, 4.5, True, None, "Auto", "", [1]])
def test_a_wrong_number_of_front_ends_is_one_sentence(value: Any) -> None:
    why = f"frontends is {shown(value)}; give a number from 1 to 16, or auto"
    assert refused_args(frontends=value) == why


@pytest.mark.parametrize(
    ("args", "read"),
    [({}, "auto"), *(({"frontends": n}, n) for n in (1, 16, "auto")), ({"frontends": "4"}, 4)],
)
def test_front_ends_are_a_number_or_auto(args: dict[str, Any], read: Any) -> None:
    assert ModelConfig.model_validate({"model": "m", **args}).frontends == read


@pytest.mark.parametrize("value", [0, -1, 2.5, True, None, "Auto", "", [1]])
def test_a_wrong_number_of_gateways_is_one_sentence(value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(GatewayConfig, {"replicas": value}, "args")
    told = f"args: replicas is {shown(value)}; give a whole number from 1 to 1000, or auto"
    assert str(raised.value) == told


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (
            {"keys": None},
            "keys: empty would let everybody in; name the keys' file, such as {file: keys.yaml}, ",
        ),
        ({"access_log": "/var/log/x"}, "access_log: '/var/log/x' is a path, but it is true or f"),
        ({"access_log": "always"}, "access_log is 'always', but must be true or false"),
        ({"otlp_endpoint": 4318}, "otlp_endpoint: 4318 is no URL; write it whole: http://local"),
        ({"max_body_mib": True}, "max_body_mib is true, but must be a number, without a unit"),
        ({"queue": {"max_requests": True}}, "queue.max_requests is true, but must be a whole num"),
        ({"queue": None}, "queue is empty; give it a value or remove it"),
    ],
)
def test_a_wrong_setting_of_the_gateway_is_said_as_it_was_written(
    args: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(GatewayConfig, args, "args")
    assert str(raised.value).startswith(f"args: {why}")


def test_true_is_still_a_truth() -> None:
    assert parse(GatewayConfig, {"access_log": True}, "args").access_log is True
    assert ModelConfig.model_validate({"model": "m", "engine": {"enable_lora": True}})


def test_gateways_are_a_number_or_auto() -> None:
    read = [GatewayConfig(replicas=n).replicas for n in (1, 16, "auto")]
    assert (GatewayConfig().replicas, read) == (1, [1, 16, "auto"])


def test_a_key_of_vllms_own_in_the_environment_is_refused() -> None:
    with pytest.raises(ConfigError, match="VLLM_API_KEY is not yours to set: the model server is"):
        parse(ModelConfig, {"model": "m", "env": {"VLLM_API_KEY": "sk-x"}}, "args")


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        (
            {"max_modl_len": 1},
            "max_modl_len is not an argument of vLLM 0.29.0; did you mean 'max_model_len'?",
        ),
        ({"zzz": 1}, "zzz is not an argument of vLLM 0.29.0"),
        ({"max-model-len": 1}, "max-model-len: write it as 'max_model_len', without dashes"),
        ({"--max-model-len": 1}, "--max-model-len: write it as 'max_model_len', without dashes"),
        ({"model": "x"}, "model is not yours to set: set `model` beside `engine`, not in it"),
        ({"port": 1}, "port is not yours to set: the model server takes a free port"),
        (
            {"api_key": "k"},
            "api_key is not yours to set: the model server is closed to everything but the gateway",
        ),
        ({"tp": 2}, "tp is not in vLLM 0.29.0; use tensor_parallel_size"),
        (
            {"ssl_keyfile": "x"},
            "ssl_keyfile belongs to vLLM's own server, which does not run here; remove it",
        ),
        (
            {"tensor_parallel_size": "two"},
            "tensor_parallel_size is 'two', but must be a whole number",
        ),
        ({"tensor_parallel_size": 1.5}, "tensor_parallel_size is 1.5, but must be a whole number"),
        (
            {"tensor_parallel_size": True},
            "tensor_parallel_size is True, but must be a whole number",
        ),
        (
            {"max_model_len": "lots"},
            "max_model_len is 'lots', but must be a whole number (8192 or 8k)",
        ),
        ({"enforce_eager": "yes"}, "enforce_eager is 'yes', but must be true or false"),
        ({"enforce_eager": 1}, "enforce_eager is 1, but must be true or false"),
        (
            {"gpu_memory_utilization": "0.9"},
            "gpu_memory_utilization is '0.9', but must be a number",
        ),
        (
            {"dtype": "flaot16"},
            "dtype is 'flaot16', but must be one of auto, bfloat16, float, float16, float32, half; "
            "did you mean 'float16'?",
        ),
        ({"speculative_config": "x"}, "speculative_config is 'x', but must be a mapping"),
        ({"load_format": ["x"]}, "load_format is ['x'], but must be a string"),
        ({"gpu_memory_utilization": "x" * 100}, "gpu_memory_utilization is 'xxx"),
        (
            {"gpu_memory_utilization": 90},
            "gpu_memory_utilization is 90, but must be above 0 and at most 1",
        ),
        ({"max_num_seqs": -5}, "max_num_seqs is -5, but must be at least 1"),
        ({"max_model_len": 0}, "max_model_len is 0, but must be at least 1"),
        ({"max_num_batched_tokens": "0"}, "max_num_batched_tokens is '0', but must be at least 1"),
        (
            {"max_num_batched_tokens": "1k", "max_num_seqs": 2048},
            "max_num_batched_tokens is 1000, below max_num_seqs (2048)",
        ),
        (
            {"quantization": "fp88"},
            "quantization is 'fp88', but vLLM 0.29.0 has none of this name; did you mean 'fp8'? "
            "(a plugin's: name the plugin in env.VLLM_PLUGINS)",
        ),
        (
            {"tool_call_parser": "hermse"},
            "tool_call_parser is 'hermse', but vLLM 0.29.0 has none of this name; did you mean "
            "'hermes'? (a plugin's: name the plugin in engine.tool_parser_plugin)",
        ),
        (
            {"reasoning_parser": "deepseek_r11"},
            "reasoning_parser is 'deepseek_r11', but vLLM 0.29.0 has none of this name; did you "
            "mean 'deepseek_r1'?",
        ),
        (
            {"enable_auto_tool_choice": True},
            "enable_auto_tool_choice needs engine.tool_call_parser too",
        ),
        (
            {"speculative_config": {"method": "eagel3", "num_speculative_tokens": 3}},
            "speculative_config.method is 'eagel3', but vLLM 0.29.0 has none of this name; did "
            "you mean 'eagle3'?",
        ),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 0}},
            "speculative_config.num_speculative_tokens is 0, but must be above 0",
        ),
        (
            {"structured_outputs_config": {"reasoning_parser": "qwen33"}},
            "structured_outputs_config.reasoning_parser is 'qwen33', but vLLM 0.29.0 has none",
        ),
        (
            {"load_format": "safetensor"},
            "load_format is 'safetensor', but vLLM 0.29.0 has none of this name; did you mean "
            "'safetensors'?",
        ),
    ],
)
def test_a_wrong_engine_argument_is_refused_with_what_is_allowed(
    engine: dict[str, Any], why: str
) -> None:
    message = refused_args(engine=engine)
    assert message.startswith(f"engine.{why}")
    assert len(message) < 200


def test_a_plugin_may_add_to_vllms_registries() -> None:
    fleet = parse_document(
        document(
            chat("a", engine={"load_format": "mine"}, env={"VLLM_PLUGINS": "mine"}),
            chat("b", engine={"tool_call_parser": "mine", "tool_parser_plugin": "/x.py"}),
            chat("c", engine={"load_format": "DUMMY"}),  # vLLM lowers it
        ),
        Path("c.yaml"),
    )
    assert list(fleet.models) == ["a", "b", "c"]
    # Ours stays one of them: it ends an engine whose replica is gone.
    assert environment(fleet.models["a"])["VLLM_PLUGINS"] == "mine,serve_app"
    assert "VLLM_PLUGINS" not in environment(fleet.models["b"])


# --- a key in the wrong place ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (
            {"max_model_len": 8192},
            "'max_model_len' is not a setting; put it under engine: "
            "`engine: {max_model_len: 8192}`",
        ),
        (
            {"max_model_len": 8192, "gpu-memory-utilization": 0.9, "num_cpus": 2},
            "'max_model_len' is not a setting; put it under engine: "
            "`engine: {max_model_len: 8192, gpu_memory_utilization: 0.9}`",
        ),
        (
            {"--tensor-parallel-size": 2},
            "'--tensor-parallel-size' is not a setting; put it under engine: "
            "`engine: {tensor_parallel_size: 2}`",
        ),
        (
            {"accelerator_type": "H100"},
            "'accelerator_type' is not a setting; put it under resources: "
            "`resources: {accelerator_type: H100}`",
        ),
        ({"num_cpus": 4}, "'num_cpus' is not a setting; put it under resources: "),
        ({"max_replicas": 4}, "'max_replicas' is not a setting; put it under autoscaling: "),
        (
            {"num_gpus": 2},
            "'num_gpus' is not a setting; a replica has as many GPUs as its engine asks for: set "
            "engine.tensor_parallel_size, `engine: {tensor_parallel_size: 2}`",
        ),
        (
            {"resources": {"num_gpus": 2}},
            "'resources.num_gpus' is not a setting; a replica has as many GPUs as its engine asks "
            "for: set engine.tensor_parallel_size, `engine: {tensor_parallel_size: 2}`",
        ),
        (
            {"resources": {"tensor_parallel_size": 2}},
            "'resources.tensor_parallel_size' is not a setting; put it under engine: ",
        ),
        (
            {"resources": {"cache_dir": "/x"}},
            "'resources.cache_dir' is not a setting; put it beside resources, under args: "
            "`cache_dir: /x`",
        ),
        (
            {"engine": {"accelerator_type": "H100"}},
            "engine.accelerator_type is not an argument of vLLM; put it under resources: "
            "`resources: {accelerator_type: H100}`",
        ),
        (
            {"engine": {"replicas": 2}},
            "engine.replicas is not an argument of vLLM; put it beside engine, under args: "
            "`replicas: 2`",
        ),
        (
            {"engine": {"num_gpus": 2}},
            "engine.num_gpus is not an argument of vLLM; a replica has as many GPUs",
        ),
        (
            {"speculative_config": {"method": "m" * 100}},
            "'speculative_config' is not a setting; put it under engine: `engine: …`",
        ),
    ],
)
def test_a_key_in_the_wrong_place_is_told_its_own(args: dict[str, Any], why: str) -> None:
    assert refused_args(**args).startswith(why)


@pytest.mark.parametrize("key", ["engine", "resources", "autoscaling"])
def test_a_setting_beside_args_is_told_its_place(key: str) -> None:
    said = refusal(document(chat() | {key: {}}))
    assert (
        said == f"application 'm': '{key}' is not a key of a Serve application; put it under args"
    )


# --- what was never filled in ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (
            {"model": "${MODEL}"},
            "model is '${MODEL}', but variables are not replaced in a config; write the value",
        ),
        ({"model": "s3://${BUCKET:-models}/x"}, "model is 's3://${BUCKET:-models}/x', but var"),
        ({"engine": {"tensor_parallel_size": "${TP}"}}, "engine.tensor_parallel_size is '${TP}'"),
        ({"resources": {"accelerator_type": "${GPU}"}}, "resources.accelerator_type is '${GPU}'"),
        ({"served_as": ["a", "${ID}"]}, "served_as[1] is '${ID}'"),
        (
            {"env": {"HF_TOKEN": "${HF_TOKEN}"}},
            "env.HF_TOKEN is '${HF_TOKEN}', but variables are not replaced in a config; write the "
            "value, or remove it: a replica has the variables that its Ray started with",
        ),
        (
            {"model": "s3://REPLACE_ME/llama"},
            "model is 's3://REPLACE_ME/llama', a placeholder; put your own value there",
        ),
    ],
)
def test_a_value_that_was_never_filled_in_is_refused(args: dict[str, Any], why: str) -> None:
    assert refused_args(**args).startswith(why)
    with pytest.raises(ConfigError):  # also by plain `serve run`
        model.app({"model": "org/model"} | args)


def test_a_variable_in_a_name_or_an_address_is_refused() -> None:
    assert "name is '${NAME}'" in refusal(document(chat("${NAME}")))
    said = refusal(document(chat(), http_options={"host": "${HOST}"}))
    assert said.startswith("http_options.host is '${HOST}'")
    args = {"cors_allow_origins": ["${ORIGIN}"]}
    assert "cors_allow_origins[0] is" in refusal(document(chat(), GATEWAY | {"args": args}))


def test_a_chat_template_may_hold_what_looks_like_a_variable() -> None:
    template = "{% for m in messages %}${x}{{ m.content }}{% endfor %}"
    content = document(chat(engine={"chat_template": template}))
    assert parse_document(content, Path("c.yaml")).models["m"].engine["chat_template"] == template


# --- YAML --------------------------------------------------------------------------------------


def test_a_tab_is_said_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("applications:\n- name: m\n\troute_prefix: null\n")
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert str(raised.value) == (
        f"{path}: line 3, column 1: there is a tab, which YAML refuses; use spaces"
    )


def test_pieces_to_refer_to_are_allowed_and_do_not_reach_serve(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "x-engine: &engine {max_model_len: 8192, seed: 1}\n"
        "applications:\n"
        "- name: m\n"
        "  route_prefix: null\n"
        "  import_path: serve_app.model:app\n"
        "  args: {model: org/model, engine: {<<: *engine, seed: 2}}\n"
    )
    fleet = load(path)
    assert fleet.models["m"].engine == {"max_model_len": 8192, "seed": 2}
    assert list(fleet.document) == ["applications"]
    # Plain `serve run` and `serve deploy` take the file too: Serve drops what it does not know.
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert list(schema.model_dump(exclude_unset=True)) == ["applications"]


# --- the gateway -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("application", "why"),
    [
        (
            GATEWAY | {"args": {"replica": 2}},
            "'replica' is not a setting; did you mean 'replicas'?",
        ),
        (GATEWAY | {"args": {"replicas": 0}}, "replicas is 0"),
        (
            GATEWAY | {"args": {"max_body_mib": 0}},
            "max_body_mib is 0, but should be greater than 0",
        ),
        (GATEWAY | {"args": {"max_body_mib": 1e9}}, "max_body_mib is 1000000000.0"),
        (GATEWAY | {"args": {"max_bodies_mib": 8}}, "max_bodies_mib is 8, below max_body_mib (64)"),
        (GATEWAY | {"args": {"request_timeout_s": 0}}, "request_timeout_s is 0"),
        (
            GATEWAY | {"args": {"cors_allow_origins": "*"}},
            "cors_allow_origins is '*', but must be a list, such as ['*']",
        ),
        (GATEWAY | {"route_prefix": None}, "the gateway needs 'route_prefix: /'"),
    ],
)
def test_a_wrong_gateway_is_refused(application: dict[str, Any], why: str) -> None:
    assert refusal(document(chat(), application)).startswith(f"application 'gateway': {why}")


@pytest.mark.parametrize(
    "origin", ["*", "null", "https://a.example", "http://localhost:3000", "app+x://obsidian.md"]
)
def test_an_origin_as_browsers_send_it_is_taken(origin: str) -> None:
    assert GatewayConfig(cors_allow_origins=[origin]).cors_allow_origins == [origin]


@pytest.mark.parametrize(
    "origin", ["", "a.example", "https://a.example/", "https://A.example", "https://", "https://*/"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    why = refusal(document(chat(), GATEWAY | {"args": {"cors_allow_origins": ["*", origin]}}))
    assert why.startswith(
        f"application 'gateway': cors_allow_origins: '{origin}' is not an origin; write it as "
    )


def test_a_second_gateway_is_refused() -> None:
    second = GATEWAY | {"name": "other"}
    why = "application 'other': a second gateway; one serves all models"
    assert refusal(document(GATEWAY, chat(), second)) == why


# --- files -----------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ConfigError, match=r"^.*missing\.yaml: no such file$"):
        load(missing)
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load(binary)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: [1", "line 1, column "),
        ("a:\n\t- b", "line 2, column 1"),
        ("a: b: c", "line 1"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2, column 11: 'c' is there twice"),
        ("a: 1\n---\nb: 2", "has 2 YAML documents"),
    ],
)
def test_a_file_that_is_not_yaml_is_refused_with_the_place(
    tmp_path: Path, text: str, where: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path}: {where}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (None, "no such file"),
        ("applications: []", "at least one model"),
        ("applications: [", "line 1"),
        (yaml.safe_dump(document(chat(replicas=0), GATEWAY)), "replicas is 0"),
        (yaml.safe_dump(document(chat())), "there is no gateway"),
    ],
)
def test_the_command_says_it_on_one_line_and_exits_with_2(
    tmp_path: Path, content: str | None, hint: str
) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    [line] = command.refusal("run", str(path))
    assert line.startswith("serve-app: ") and hint in line


# --- the shipped configs ---------------------------------------------------------------------


def test_the_configs_that_the_readme_promises_are_there() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "demo", "llama70b", "llama70b-2node", "qwen3-32b-fp8", "moe-expert-parallel",
        "speculative", "quantized", "fleet",
    }  # fmt: skip


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def shipped(request: pytest.FixtureRequest) -> Fleet:
    return load(request.param)


def test_a_shipped_config_is_a_serve_config_with_a_gateway_and_an_introduction(
    shipped: Fleet,
) -> None:
    assert ServeDeploySchema.model_validate(shipped.document).applications
    assert shipped.models and shipped.gateway
    introduction = shipped.path.read_text().partition("\nhttp_options")[0].splitlines()
    assert len(introduction) >= 3
    assert all(line.startswith("#") for line in introduction)


def test_a_shipped_config_builds_without_a_gpu(shipped: Fleet) -> None:
    for application in shipped.document["applications"]:
        build = {MODEL_IMPORT_PATH: model.app, GATEWAY_IMPORT_PATH: gateway.app}
        built = build[application["import_path"]](application.get("args") or {})
        options = built._bound_deployment
        expected = "Gateway" if application["name"] == "gateway" else "ModelServer"
        assert options.name == expected


def test_the_70b_config_is_as_promised() -> None:
    """Llama-3.3-70B-Instruct, tensor parallel 4, 8192 tokens of context."""
    [config] = load(REPO / "configs/llama70b.yaml").models.values()
    assert config.model == "meta-llama/Llama-3.3-70B-Instruct"
    assert config.engine["tensor_parallel_size"] == 4
    assert config.engine["max_model_len"] == 8192
    [two] = load(REPO / "configs/llama70b-2node.yaml").models.values()
    assert (two.tensor_parallel_size, two.pipeline_parallel_size) == (4, 2)


# --- built in process ------------------------------------------------------------------------


@pytest.mark.parametrize("build", [model.app, gateway.app])
def test_a_builder_refuses_wrong_args_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, build: Any
) -> None:
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    with pytest.raises(ConfigError) as raised:
        build(
            {"model": "m", "no_such_setting": 1} if build is model.app else {"no_such_setting": 1}
        )
    assert str(raised.value).startswith("args: 'no_such_setting' is not a setting")


@pytest.mark.parametrize("where", ["a folder", "the Hugging Face cache", "package data"])
def test_a_builder_refuses_sizes_that_the_model_cannot_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nothing"))
    args: dict[str, Any] = {"model": "org/model", "engine": {"tensor_parallel_size": 6}}
    if where == "package data":
        args["model"] = "meta-llama/Llama-3.3-70B-Instruct"
    else:
        model.app(args)  # nothing is known: left to vLLM
        cache = tmp_path / "hub" / "models--org--model"
        folder = cache / "snapshots" / "abc"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(
            '{"num_attention_heads": 64, "num_hidden_layers": 2, "hidden_size": 64,'
            '"intermediate_size": 64, "vocab_size": 64}'
        )
        if where == "a folder":
            args["model"] = str(folder)
        else:
            (cache / "refs").mkdir()
            (cache / "refs" / "main").write_text("abc")
            args["env"] = {"HF_HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match="can be 1, 2, 4, 8, 16, 32, 64") as raised:
        model.app(args)
    assert "tensor_parallel_size 6 does not divide the 64 attention heads" in str(raised.value)
    # The config that vLLM will read is another one.
    model.app({**args, "engine": {**args["engine"], "hf_overrides": {"num_attention_heads": 6}}})


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The ``args`` of each model that Serve reports, by its application's name."""
    args: dict[str, Any] = {}

    def report() -> dict[str, Any]:
        return {
            "applications": {
                name: {
                    "status": "RUNNING",
                    "deployed_app_config": {"import_path": MODEL_IMPORT_PATH, "args": given},
                }
                for name, given in args.items()
            }
        }

    monkeypatch.setattr(model.serve, "report", report)
    monkeypatch.setattr(model.capacity, "refuse_impossible", lambda needed: None)
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    return args


def test_a_builder_refuses_an_id_of_another_application(deployed: dict[str, Any]) -> None:
    args = {"model": "org/model", "served_as": ["org/x"]}
    deployed |= {"m": args, "other": {"model": "m", "adapters": [{"name": "org/x", "path": "p"}]}}
    with pytest.raises(ConfigError, match="'org/x' belongs to both 'm' and 'other'"):
        model.app(args)
    del deployed["other"]
    model.app(args)


@pytest.mark.parametrize(
    "nonsense",
    [{"served_as": 5}, {"adapters": 5}, {"adapters": [{"name": {}}]}, {"served_as": [{}]}],
    ids=str,
)
def test_nonsense_in_another_application_is_not_the_fault_of_this_one(
    deployed: dict[str, Any], nonsense: dict[str, Any]
) -> None:
    deployed["bad"] = {"model": "org/model"} | nonsense
    model.app({"model": "org/model", "served_as": ["org/x"]})
    with pytest.raises(ConfigError, match="'bad' belongs to both"):
        model.app({"model": "org/model", "served_as": ["bad"]})


def test_the_same_settings_written_differently_build_the_same_deployment() -> None:
    """So that `serve deploy` of an unchanged model restarts nothing."""
    first, second = (
        model.app(args)._bound_deployment
        for args in (
            {"model": "m", "engine": {"max_model_len": 8192, "seed": 1}, "env": {"A": 1}},
            {"env": {"A": "1"}, "engine": {"seed": 1, "max_model_len": 8192}, "model": "m"},
        )
    )
    assert first.init_args == second.init_args
    assert first.ray_actor_options == second.ray_actor_options


@pytest.mark.parametrize(
    ("settings", "args", "told"),
    [
        (ModelConfig, {"model": "m", "swap_groups": {}}, "it belongs to the args of the gateway"),
        (GatewayConfig, {"fallback": ["m"]}, "it belongs to the args of a model"),
    ],
)
def test_a_setting_of_the_other_application_is_told_where_it_belongs(
    settings: type[GatewayConfig | ModelConfig], args: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(settings, args, "args")


def test_a_resource_beside_args_is_told_where_it_belongs() -> None:
    model = {"name": "m", "route_prefix": None, "import_path": "serve_app.model:app"}
    wrong = {**model, "gpu_share": 0.3, "args": {"model": "m"}}
    with pytest.raises(ConfigError, match=r"; put it under args[.]resources"):
        parse_document({"applications": [wrong]}, Path("f.yaml"))

"""The table of vLLM's engine arguments, against the installed vLLM and its own parser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import vllm
from harness.processes import REPO

from serve_app.config import engine_args
from serve_app.config.document import load
from serve_app.config.engine_args import EngineArg, to_argv
from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError, UserError
from serve_app.replica.engine import parse_args
from tools.engine_args_table import chat_templates, read_off_vllm

TABLE = engine_args.table()


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    made: argparse.ArgumentParser = make_arg_parser(FlexibleArgumentParser())
    return made


def test_the_table_is_that_of_the_installed_vllm() -> None:
    """`make engine-args` refreshes it."""
    assert vllm.__version__.partition("+")[0] == engine_args.VLLM_VERSION
    assert read_off_vllm() == TABLE
    assert chat_templates() == {
        "chat_templates": engine_args.chat_templates(),
        "chat_template_model_types": engine_args.models_with_a_template(),
    }


def test_the_table_has_vllms_own_bounds_and_registries() -> None:
    """Those that a config most often misses, so that an empty table would not pass."""
    utilization = TABLE["gpu_memory_utilization"]
    assert (utilization.above, utilization.at_most) == (0, 1)
    assert TABLE["max_num_seqs"].at_least == TABLE["tensor_parallel_size"].at_least == 1
    assert TABLE["cpu_offload_gb"].at_least == 0  # in a config inside a config
    assert TABLE["spec_tokens"].above == 0  # under another name
    for name, one in (("tool_call_parser", "hermes"), ("reasoning_parser", "qwen3"),
                      ("load_format", "runai_streamer"), ("quantization", "fp8")):  # fmt: skip
        assert one in TABLE[name].choices and TABLE[name].registered


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_memory_utilization", 90),
        ("gpu_memory_utilization", float("nan")),
        ("max_num_seqs", -5),
        ("tensor_parallel_size", 0),
        ("max_model_len", 0),
        ("max_model_len", -2),
        ("quantization", "fp88"),
        ("load_format", "safetensor"),
    ],
)
def test_a_value_that_vllms_configs_refuse_is_refused_without_vllm(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^engine\.{name} is "):
        engine_args.check({name: value})
    given = {"model": str(REPO / "models/smollm2-135m-instruct"), name: value}
    said = {"max_model_len": "model_len", "load_format": "Load format"}.get(name, name)
    with pytest.raises(ValueError, match=said):
        config_of(**given)


def config_of(**given: Any) -> Any:
    """vLLM's config, and what it makes of the load format when a model is loaded."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    made = EngineArgs(**given).create_engine_config()
    return get_model_loader(made.load_config)


@pytest.mark.parametrize("name", ["quantization", "load_format"])
def test_vllm_takes_these_in_any_case(name: str) -> None:
    from vllm.config import LoadConfig, ModelConfig

    engine_args.check({name: TABLE[name].choices[0].upper()})
    read = LoadConfig(load_format="DUMMY").load_format  # type: ignore[arg-type]
    assert read == "dummy"
    assert ModelConfig.validate_quantization_before("FP8") == "fp8"


def test_every_argument_of_vllm_serve_is_either_a_users_or_spoken_for(
    parser: argparse.ArgumentParser,
) -> None:
    known = TABLE.keys() | engine_args.OWNED.keys() | engine_args.SERVER_ONLY
    assert {a.dest for a in parser._actions} == known - {"model"} | {"model"} & known


def test_no_renamed_argument_is_back_in_vllm() -> None:
    assert not engine_args.RENAMED.keys() & TABLE.keys()


@pytest.mark.parametrize(
    ("engine", "hint"),
    [
        ({"task": "embed"}, "use runner: pooling"),
        ({"enable_reasoning": True}, "use reasoning_parser alone"),
    ],
)
def test_an_argument_of_an_older_vllm_is_said_in_todays_words(
    engine: dict[str, Any], hint: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        engine_args.check(engine)
    assert hint in str(raised.value)
    assert "did you mean" not in str(raised.value)


# --- what is written arrives -------------------------------------------------------------------

SAMPLES: dict[str, list[tuple[Any, Any]]] = {
    "boolean": [(True, True), (False, False)],
    "flag": [(True, True), (False, False)],
    "integer": [(3, 3), (0, 0)],
    "count": [(8192, 8192), ("8k", 8000), ("8K", 8192)],
    "number": [(0.5, 0.5), (2, 2.0)],
    "string": [("some-text", "some-text"), ("-x --y", "-x --y")],
    "array": [(["a", "--b"], ["a", "--b"])],
}


def within(value: Any, arg: EngineArg) -> bool:
    """Whether a value is within the bounds of an argument, if it has any."""
    return all(
        (arg.above is None or read > arg.above)
        and (arg.at_least is None or read >= arg.at_least)
        and (arg.below is None or read < arg.below)
        and (arg.at_most is None or read <= arg.at_most)
        for read in [value]
        if isinstance(read, (int, float))
    )


def samples(arg: EngineArg) -> list[tuple[Any, Any]]:
    """Values that an argument accepts, each with what vLLM's parser must make of it."""
    if arg.choices:
        return [(choice, choice) for choice in arg.choices]
    if "array" in arg.accepts:
        inner = [1, 2] if "integer" in arg.accepts else ["a", "b"]
        return [(inner, inner)]
    if arg.accepts == ("string", "integer"):
        return [(2, "2"), ("2", "2")]
    found = [s for kind in arg.accepts if kind != "object" for s in SAMPLES[kind]]
    return [(written, read) for written, read in found if within(read, arg)]


# Open sets to the table, whose text vLLM reads further.
CLOSED = {"collect_detailed_traces": [(["model"], ["model"]), (["model,worker"], ["model,worker"])]}


@pytest.mark.parametrize("name", TABLE)
def test_vllms_parser_reads_back_what_was_written(
    parser: argparse.ArgumentParser, name: str
) -> None:
    for value, expected in CLOSED.get(name) or samples(TABLE[name]):
        engine_args.check({"tool_call_parser": "hermes", name: value})
        read = getattr(parser.parse_args(to_argv({name: value})), name)
        assert read == expected, value
        assert type(read) is type(expected) or isinstance(read, str)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hf_overrides", {"rope_parameters": {"factor": 2.0, "type": "yarn"}, "a-b": [1, None]}),
        ("limit_mm_per_prompt", {"image": 2}),
        ("override_generation_config", {"temperature": 0.0, "text": 'it\'s "quoted" 世界'}),
        ("speculative_config", {"method": "ngram", "num_speculative_tokens": 3}),
        ("default_chat_template_kwargs", {"enable_thinking": False}),
        ("model_loader_extra_config", {"concurrency": 8}),
    ],
)
def test_a_mapping_arrives_as_it_was_written(
    parser: argparse.ArgumentParser, name: str, value: dict[str, Any]
) -> None:
    engine_args.check({name: value})
    assert getattr(parser.parse_args(to_argv({name: value})), name) == value


@pytest.mark.parametrize("name", [n for n, a in TABLE.items() if "object" in a.accepts])
def test_an_empty_mapping_is_read(parser: argparse.ArgumentParser, name: str) -> None:
    assert getattr(parser.parse_args(to_argv({name: {}})), name) is not None


def test_all_arguments_at_once_do_not_get_into_each_others_way(
    parser: argparse.ArgumentParser,
) -> None:
    engine, expected = {}, {}
    for name, arg in TABLE.items():
        if "object" not in arg.accepts:
            engine[name], expected[name] = (CLOSED.get(name) or samples(arg))[0]
    read = vars(parser.parse_args(["--model", "m", *to_argv(engine)]))
    assert {name: read[name] for name in engine} == expected
    assert read["model"] == "m"


def test_nothing_written_is_nothing_said() -> None:
    assert to_argv({}) == to_argv({"seed": None, "enforce_eager": None}) == []


# --- what is refused would be refused by vLLM --------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cudagraph_capture_sizes", ["a", "b"]),
        ("cudagraph_capture_sizes", []),
        ("max_num_batched_tokens", "auto"),
        ("kv_cache_memory_bytes", "auto"),
        ("max_num_seqs", "auto"),
        ("max_model_len", "8kk"),
        ("max_model_len", ""),
        ("max_model_len", "."),
        ("max_model_len", "1.2.3k"),
        ("max_model_len", "1.5"),
        ("max_model_len", "1.5K"),
        ("collect_detailed_traces", ["everything"]),
    ],
)
def test_what_vllms_parser_refuses_is_refused_without_vllm(
    parser: argparse.ArgumentParser, name: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{name}"):
        engine_args.check({name: value})
    with pytest.raises((SystemExit, ValueError)):
        parser.parse_args(to_argv({name: value}))


@pytest.mark.parametrize(
    "text", ["1", "8192", "8k", "8K", "1.5k", "25.6k", "2m", "2M", "1G", "1T", " 8k", "auto", "-1"]
)
def test_a_context_length_is_read_in_every_spelling_of_vllm(
    parser: argparse.ArgumentParser, text: str
) -> None:
    engine_args.check({"max_model_len": text})
    read = parser.parse_args(to_argv({"max_model_len": text})).max_model_len
    assert engine_args.count(text, "max_model_len", least=-1) == read


# --- vLLM's further refusals -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "hint"),
    [
        ({"chat_template": "/no/such/file.jinja"}, "no/such/file"),
        ({"compilation_config": {"no_such_key": 1}}, "no_such_key"),
    ],
)
def test_what_vllm_refuses_later_is_one_sentence_of_vllms_own(
    engine: dict[str, Any], hint: str
) -> None:
    config = ModelConfig.model_validate({"model": "m", "engine": engine})
    with pytest.raises(UserError) as raised:
        parse_args(config, ["m"], {})
    assert str(raised.value).startswith("vLLM refuses the engine arguments: ")
    assert hint in str(raised.value)


def test_what_vllm_refuses_is_said_without_quotes_around_it() -> None:
    engine = {"enable_auto_tool_choice": True, "tool_call_parser": "tea-leaves"}
    unchecked = {"VLLM_PLUGINS": "serve_app"}
    with pytest.raises(UserError) as raised:
        parse_args(ModelConfig(model="m", engine=engine, env=unchecked), ["m"], {})
    assert str(raised.value).startswith(
        "vLLM refuses the engine arguments: invalid tool call parser: tea-leaves (chose from { "
    )
    assert str(raised.value).endswith("})")


def test_a_tool_parser_of_ones_own_is_found(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from vllm.tool_parsers import ToolParser, ToolParserManager\n"
        "@ToolParserManager.register_module('tea-leaves')\n"
        "class TeaLeaves(ToolParser): pass\n"
    )
    engine = {"enable_auto_tool_choice": True, "tool_call_parser": "tea-leaves"}
    config = ModelConfig(model="m", engine=engine | {"tool_parser_plugin": str(plugin)})
    assert parse_args(config, ["m"], {}).tool_call_parser == "tea-leaves"


# --- the shipped configs -----------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_vllms_own_parser_reads_the_engine_arguments_of_a_shipped_config(path: Path) -> None:
    for name, config in load(path).models.items():
        args = parse_args(config, [name, *config.served_as], {})
        assert args.model == config.model
        assert args.served_model_name == [name, *config.served_as]
        for key, value in config.engine.items():
            if not isinstance(value, dict):
                assert getattr(args, key) == value, key

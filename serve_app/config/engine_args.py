"""vLLM's engine arguments: which exist, what each accepts, and how they reach vLLM.

The table comes from vLLM's own argument parser and is kept as package data. So a config is checked
in milliseconds, also on a machine without vLLM (a laptop, a head node); importing vLLM takes
seconds. ``make engine-args`` refreshes the table, and a test fails when it differs from the
installed vLLM.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from serve_app.errors import ConfigError, did_you_mean

VLLM_VERSION = "0.29.0"
_TABLE = f"engine_args-{VLLM_VERSION}.json"

# Arguments of `vllm serve` that the deployment sets, with what to use instead.
OWNED = {
    "model": "set `model` beside `engine`, not in it",
    "model_tag": "set `model` beside `engine`",
    "served_model_name": "the application's name is the model id; list further ids in `served_as`",
    "lora_modules": "list adapters in `adapters`",
    "api_server_count": "set `frontends` beside `engine`",
    "api_key": "the model server is closed to everything but the gateway",
    "hf_token": "set HF_TOKEN where the server is started, so that the token is in no config",
    "host": "the model server binds to the node's address",
    "port": "the model server takes a free port",
    "data_parallel_address": "Ray places the ranks",
    "data_parallel_rank": "Ray places the ranks",
    "data_parallel_rpc_port": "Ray places the ranks",
    "data_parallel_start_rank": "Ray places the ranks",
    "device_ids": "Ray assigns the GPUs",
    "master_addr": "Ray places the ranks",
    "master_port": "Ray places the ranks",
    "nnodes": "Ray places the ranks; set pipeline_parallel_size to span nodes",
    "node_rank": "Ray places the ranks",
}
# Arguments of vLLM's own HTTP server and process set-up, which does not run here.
SERVER_ONLY = {
    "help", "headless", "config", "grpc", "uds", "uvicorn_log_level",
    "disable_uvicorn_access_log", "disable_access_log_for_endpoints", "root_path", "middleware",
    "allow_credentials", "allowed_origins", "allowed_methods", "allowed_headers",
    "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "enable_ssl_refresh", "ssl_cert_reqs",
    "ssl_ciphers", "h11_max_incomplete_event_size", "h11_max_header_count", "log_config_file",
    "data_parallel_supervisor_port", "dp_supervisor_probe_interval_s",
    "dp_supervisor_probe_timeout_s", "dp_supervisor_probe_failure_threshold",
    "data_parallel_multi_port_external_lb", "enable_offline_docs", "disable_fastapi_docs",
}  # fmt: skip

# Outdated names, with the names in vLLM 0.29.
RENAMED = {
    "speculative_model": "speculative_config: {model: …, num_speculative_tokens: …, method: …}",
    "num_speculative_tokens": "speculative_config: {num_speculative_tokens: …}",
    "num_scheduler_steps": "nothing; vLLM's scheduler no longer has it",
    "swap_space": "nothing; vLLM no longer swaps, it recomputes",
    "max_context_len_to_capture": "max_cudagraph_capture_size",
    "max_seq_len_to_capture": "max_cudagraph_capture_size",
    "guided_decoding_backend": "structured_outputs_config: {backend: …}",
    "disable_log_requests": "enable_log_requests: false",
    "task": "runner: pooling to embed, classify or rerank (with convert: embed or classify where "
    "the model was made to write text); nothing to generate",
    "enable_reasoning": "reasoning_parser alone",
    "worker_use_ray": "distributed_executor_backend: ray",
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
}


@dataclass(frozen=True)
class EngineArg:
    """One argument: the JSON types it accepts and, where it is a choice, the choices.

    ``accepts`` holds ``boolean``, ``flag`` (a boolean that has no ``--no-`` form), ``integer``,
    ``number``, ``string``, ``object``, ``array`` and ``count`` (an integer that may be
    written ``8k``). The bounds are those of the field in vLLM's own config.
    """

    accepts: tuple[str, ...]
    choices: tuple[Any, ...] = ()
    registered: bool = False
    """Whether the choices are a registry of vLLM's, to which a plugin can add."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None


@cache
def _read() -> dict[str, Any]:
    raw = resources.files("serve_app").joinpath("data", _TABLE).read_text()
    found: dict[str, Any] = json.loads(raw)
    return found


@cache
def table() -> dict[str, EngineArg]:
    """Every engine argument by vLLM's own name."""
    found = {}
    for name, arg in _read()["arguments"].items():
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in arg.items()}
        found[name] = EngineArg(**fields)
    return found


def chat_templates() -> list[str]:
    """The file names that ``chat_template`` finds inside vLLM."""
    found: list[str] = _read()["chat_templates"]
    return found


def models_with_a_template() -> list[str]:
    """The types of models for which vLLM has a chat template of its own."""
    found: list[str] = _read()["chat_template_model_types"]
    return found


def undashed(name: str) -> str:
    """vLLM's own name of an argument that is written as on a command line."""
    return name.lstrip("-").replace("-", "_")


def check(engine: dict[str, Any], *, plugins: bool = False) -> None:
    """Refuse what vLLM would refuse.

    ``plugins`` allows names that are in none of vLLM's own registries.

    Raises:
        ConfigError: the first of :func:`problems`.
    """
    for problem in problems(engine, plugins=plugins):
        raise ConfigError(problem)


def problems(engine: dict[str, Any], *, plugins: bool = False) -> Iterator[str]:
    """Each reason why vLLM would refuse these arguments, in one sentence.

    An unknown name (with a did-you-mean); a value of the wrong type, out of bounds or not among the
    choices; an argument that the deployment sets by itself; arguments that exclude each other.
    """
    wrong = False
    for name, value in engine.items():
        try:
            _check_one(str(name), value, plugins or _PLUGIN_OF.get(str(name)) in engine)
        except ConfigError as error:
            wrong = True
            yield str(error)
    if not wrong:
        yield from _together(engine)


_PLUGIN_OF = {
    "tool_call_parser": "tool_parser_plugin",
    "reasoning_parser": "reasoning_parser_plugin",
    "structured_outputs_config": "reasoning_parser_plugin",
}
"""Arguments with a parser's name, and those that name a file with further parsers."""


def _together(engine: dict[str, Any]) -> Iterator[str]:
    if engine.get("enable_auto_tool_choice") and not engine.get("tool_call_parser"):
        yield (
            "engine.enable_auto_tool_choice needs engine.tool_call_parser too, the name of how the "
            "model writes a call (hermes, llama3_json, mistral …)"
        )
    tokens, seqs = (
        count(engine.get(name), name) for name in ("max_num_batched_tokens", "max_num_seqs")
    )
    if tokens and seqs and seqs > tokens:
        yield too_few_tokens(tokens, seqs)


def too_few_tokens(tokens: int, seqs: int) -> str:
    """What is said of a ``max_num_batched_tokens`` that is below ``max_num_seqs``."""
    return (
        f"engine.max_num_batched_tokens is {tokens}, below max_num_seqs ({seqs}); "
        "every running sequence needs one token per step"
    )


def _check_one(name: str, value: Any, plugins: bool) -> None:
    plain = undashed(name)
    if plain in RENAMED:
        raise ConfigError(f"engine.{name} is not in vLLM {VLLM_VERSION}; use {RENAMED[plain]}")
    if plain != name:
        raise ConfigError(f"engine.{name}: write it as '{plain}', without dashes")
    if name in OWNED:
        raise ConfigError(f"engine.{name} is not yours to set: {OWNED[name]}")
    if name in SERVER_ONLY:
        raise ConfigError(
            f"engine.{name} belongs to vLLM's own server, which does not run here; remove it"
        )
    arg = table().get(name)
    if arg is None:
        raise ConfigError(
            f"engine.{name} is not an argument of vLLM {VLLM_VERSION}{did_you_mean(name, table())}"
        )
    if value is None:
        return  # unset: vLLM's default
    if isinstance(value, list) and "array" in arg.accepts:
        if not value:
            raise ConfigError(f"engine.{name} is an empty list; remove it or list something")
        for item in value:
            _check_value(name, item, arg)
    elif not (arg.registered and plugins and isinstance(value, str)):
        _check_value(name, value, arg)
    if name == "max_model_len":
        count(value, name, least=-1)
    for key, argument in _PARTS.get(name, {}).items():
        part = table()[argument]
        if value.get(key) is not None and not (part.registered and plugins):
            _check_value(f"{name}.{key}", value[key], part)


_MOST = 1 << 60
"""Above every number of bytes, tokens or seconds."""

SIZES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
)
"""The sizes of a replica on more than one GPU."""

MOST_GPUS = 4096

_PARTS = {
    "speculative_config": {"method": "spec_method", "num_speculative_tokens": "spec_tokens"},
    "structured_outputs_config": {"reasoning_parser": "reasoning_parser"},
}
"""Keys of mappings that are also arguments of their own."""


_ANY_CASE = ("load_format", "quantization")
"""Arguments that vLLM turns into lower case."""


def _check_value(name: str, value: Any, arg: EngineArg) -> None:
    if arg.choices and not isinstance(value, (list, dict)):
        if (str(value).lower() if name in _ANY_CASE else value) not in arg.choices:
            raise ConfigError(f"engine.{name} is {_shown(value)}, but {_known(value, name, arg)}")
        return
    if value == "auto" and name == "max_model_len":
        return  # the one count that vLLM can choose by itself
    if not any(_is(value, kind) for kind in arg.accepts):
        raise ConfigError(
            f"engine.{name} is {_shown(value)}, but must be "
            f"{' or '.join(_KINDS[kind] for kind in arg.accepts)}"
        )
    number = _whole(value) if "count" in arg.accepts else value
    if not isinstance(number, (int, float)):
        return
    if abs(number) > _MOST and name != "seed":
        raise ConfigError(f"engine.{name} is {_shown(value)}, beyond any machine")
    if bounds := _missed(number, arg):
        raise ConfigError(f"engine.{name} is {_shown(value)}, but must be {bounds}")
    if name in SIZES and number > MOST_GPUS:
        raise ConfigError(f"engine.{name} is {_shown(value)}; no cluster has that many GPUs")


def _known(value: Any, name: str, arg: EngineArg) -> str:
    known = [str(c) for c in arg.choices]
    hint = did_you_mean(str(value), known)
    many = hint and len(known) > 12
    said = (
        f"vLLM {VLLM_VERSION} has none of this name"
        if many
        else f"must be one of {', '.join(known)}"
    )
    own = _PLUGIN_OF.get(name.partition(".")[0])
    plugin = f"engine.{own}" if own else "env.VLLM_PLUGINS"
    return f"{said}{hint}" + (
        f" (a plugin's: name the plugin in {plugin})" if arg.registered else ""
    )


def _missed(number: float, arg: EngineArg) -> str | None:
    """The bounds of an argument, if ``number`` is not within them (NaN never is)."""
    bounds = [
        (f"{words} {bound:g}", holds(number, bound))
        for words, bound, holds in (
            ("above", arg.above, operator.gt),
            ("at least", arg.at_least, operator.ge),
            ("below", arg.below, operator.lt),
            ("at most", arg.at_most, operator.le),
        )
        if bound is not None
    ]
    if all(held for _, held in bounds):
        return None
    return " and ".join(words for words, _ in bounds)


_KINDS = {
    "boolean": "true or false",
    "flag": "true or false",
    "integer": "a whole number",
    "count": "a whole number (8192 or 8k)",
    "number": "a number",
    "string": "a string",
    "object": "a mapping",
    "array": "a list",
}


def _is(value: Any, kind: str) -> bool:
    if kind in ("boolean", "flag"):
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind == "integer":
        return isinstance(value, int)
    if kind == "number":
        return isinstance(value, (int, float))
    if kind == "count":
        return isinstance(value, (int, str)) and _whole(value) is not None
    return isinstance(value, {"string": str, "object": dict, "array": list}[kind])


_COUNT = re.compile(r"(\d{1,20}(?:\.\d+)?)([kmgt])|(-?\d{1,20})([KMGT])?")
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def count(value: Any, name: str, *, least: int = 1) -> int | None:
    """A whole number as vLLM reads it: ``8192``, ``8k`` (×1000) or ``8K`` (×1024); None unset.

    ``auto`` is -1.

    Raises:
        ConfigError: anything else, or below ``least``.
    """
    if value is None:
        return None
    found = -1 if value == "auto" else _whole(value)
    if found is None:
        raise ConfigError(f"engine.{name} must be a whole number (8192, 8k or 8K)")
    if found < least or found == 0:
        raise ConfigError(f"engine.{name} is {found}, but must be at least {max(1, least)}")
    if found > _MOST:
        raise ConfigError(f"engine.{name} is {_shown(found)}, beyond any machine")
    return found


def _whole(value: Any) -> int | None:
    """As vLLM's ``human_readable_int``; None for anything but a whole number."""
    if isinstance(value, str):
        match = _COUNT.fullmatch(value.strip())
        if match is None:
            return None
        decimal, small, integer, large = match.groups()
        if decimal:
            return int(float(decimal) * _DECIMAL[small])
        return int(integer) * (_BINARY[large] if large else 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if value == value // 1 and abs(value) != float("inf") else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def to_argv(engine: dict[str, Any]) -> list[str]:
    """The arguments as words on the command line of `vllm serve`, for vLLM's own parser."""
    argv: list[str] = []
    for name, value in engine.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            if value:
                argv.append(flag)
            elif "flag" not in table()[name].accepts:
                argv.append("--no-" + flag[2:])
        elif isinstance(value, dict):
            argv += [flag, json.dumps(value)]
        elif isinstance(value, list):
            argv += [flag, *(v if isinstance(v, str) else json.dumps(v) for v in value)]
        else:
            # One word, so that a value that starts with a dash (-1) is not read as a flag.
            argv.append(f"{flag}={value}")
    return argv

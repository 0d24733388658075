"""Writes serve_app/data/engine_args-*.json from the installed vLLM (``make engine-args``)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from serve_app.config.engine_args import OWNED, SERVER_ONLY, EngineArg


def read_off_vllm() -> dict[str, EngineArg]:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    found = {
        action.dest: _describe(action)
        for action in parser._actions
        if action.dest not in OWNED and action.dest not in SERVER_ONLY
    }
    for name, bounds in _bounds(parser):
        if name in found:
            found[name] = replace(found[name], **bounds)
    for name, names in _registries().items():
        found[name] = replace(found[name], choices=tuple(sorted(names)), registered=True)
    return dict(sorted(found.items()))


def chat_templates() -> dict[str, list[str]]:
    """The files that ``chat_template`` finds inside vLLM, and the models that need none."""
    from vllm.transformers_utils.chat_templates import registry

    return {
        "chat_templates": sorted(p.name for p in registry.CHAT_TEMPLATES_DIR.glob("*.jinja")),
        "chat_template_model_types": sorted(registry._MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK),
    }


_BOUNDS = {"gt": "above", "ge": "at_least", "lt": "below", "le": "at_most"}
_SPECULATION = {"spec_tokens": "num_speculative_tokens"}
"""Arguments that bear another name than their field in ``SpeculativeConfig``."""


def _bounds(parser: argparse.ArgumentParser) -> Iterator[tuple[str, dict[str, float]]]:
    """The bounds of the fields in vLLM's configs; a group of arguments is titled as its config."""
    import vllm.config

    for group in parser._action_groups:
        fields = _fields(getattr(vllm.config, group.title or "", None))
        if group.title == "VllmConfig":
            speculative = _fields(vllm.config.SpeculativeConfig)
            fields |= {name: speculative[field] for name, field in _SPECULATION.items()}
        for action in group._group_actions:
            found = {
                ours: getattr(constraint, theirs)
                for constraint in getattr(fields.get(action.dest), "metadata", ())
                for theirs, ours in _BOUNDS.items()
                if hasattr(constraint, theirs)
            }
            if found:
                yield action.dest, found


def _fields(config: Any) -> dict[str, Any]:
    """The pydantic fields of a config of vLLM, and those of the configs in it."""
    own = dict(getattr(config, "__pydantic_fields__", {}))
    inner = [f.annotation for f in own.values() if hasattr(f.annotation, "__pydantic_fields__")]
    return {k: v for other in inner for k, v in other.__pydantic_fields__.items()} | own


def _registries() -> dict[str, list[str]]:
    """Names of what vLLM keeps in registries, to which its plugins can add."""
    from vllm.model_executor.layers.quantization import QuantizationMethods
    from vllm.model_executor.model_loader import LoadFormats
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    return {
        "load_format": list(get_args(LoadFormats)),
        "quantization": list(get_args(QuantizationMethods)),
        "reasoning_parser": ReasoningParserManager.list_registered(),
        "tool_call_parser": ToolParserManager.list_registered(),
    }


def _describe(action: argparse.Action) -> EngineArg:
    if isinstance(action, argparse.BooleanOptionalAction):
        return EngineArg(("boolean",))
    if action.nargs == 0:
        return EngineArg(("flag",))
    accepts = _accepted_by(action)
    choices = tuple(c for c in action.choices or () if c != "None")
    if action.nargs in ("+", "*"):
        accepts = ("array", *accepts)
    return EngineArg(accepts, choices)


def _accepted_by(action: argparse.Action) -> tuple[str, ...]:
    """What the action's type function takes, found by giving it one of each."""
    convert: Any = action.type or str
    if action.choices and all(isinstance(c, str) for c in action.choices):
        return ("string",)
    accepts = []
    for kind, probe, result in (
        ("count", "8k", int),
        ("integer", "1", int),
        ("number", "0.5", float),
        ("object", "{}", object),
        ("string", "x~y", str),
    ):
        try:
            value = convert(probe)
        except Exception:
            continue
        if isinstance(value, result) and not (kind == "object" and isinstance(value, str)):
            accepts.append(kind)
    if "count" in accepts:
        return ("count",)
    if "object" in accepts and "integer" in accepts:  # json.loads takes any JSON
        return ("object",)
    if action.dest == "optimization_level":  # -O2: declared a string, written as a number
        accepts.append("integer")
    return tuple(accepts) or ("string",)


def main() -> None:
    """Write the table of the installed vLLM (``make engine-args``)."""
    import vllm

    path = Path(__file__).parents[1] / "serve_app/data" / f"engine_args-{vllm.__version__}.json"
    body = {
        "vllm": vllm.__version__,
        "arguments": {
            name: {
                key: value
                for key, value in asdict(arg).items()
                if value is not None and value is not False and value != ()
            }
            for name, arg in read_off_vllm().items()
        },
        **chat_templates(),
    }
    path.write_text(json.dumps(body, indent=1) + "\n")
    print(f"{len(body['arguments'])} arguments written to {path}")


if __name__ == "__main__":
    main()

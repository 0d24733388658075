"""Writes serve_app/data/engine_args-*.json from the installed vLLM (``make engine-args``)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
    return dict(sorted(found.items()))


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
            name: {key: value for key, value in asdict(arg).items() if value}
            for name, arg in read_off_vllm().items()
        },
    }
    path.write_text(json.dumps(body, indent=1) + "\n")
    print(f"{len(body['arguments'])} arguments written to {path}")


if __name__ == "__main__":
    main()

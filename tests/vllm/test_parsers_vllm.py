"""Parsers of tool calls against a real tokenizer, before an engine starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.tiny_model import tiny_model
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.replica.engine import configure, parse_args
from serve_app.replica.start.parsers import refuse_unfit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with SmolLM2's tokenizer, which has no ``<|python_tag|>``."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model", Console(quiet=True))


def check(model: Path, parser: str | None) -> None:
    engine = {"enable_auto_tool_choice": True, "tool_call_parser": parser} if parser else {}
    cpu = {"device": "cpu", "num_cpus": 0}
    config = ModelConfig.model_validate({"model": str(model), "engine": engine, "resources": cpu})
    args = parse_args(config, ["m"], {})
    refuse_unfit(args, configure(args, 1))


def test_one_that_needs_a_token_of_another_model_is_refused_before_the_start(model: Path) -> None:
    with pytest.raises(UserError) as raised:
        check(model, "llama3_json")
    said = str(raised.value)
    assert said.startswith("engine.tool_call_parser 'llama3_json' does not fit this model's")
    assert "<|python_tag|>" in said
    assert "\n" not in said


@pytest.mark.parametrize("parser", [None, "hermes", "pythonic"])
def test_one_that_fits_is_let_through(model: Path, parser: str | None) -> None:
    check(model, parser)

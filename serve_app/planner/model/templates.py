"""Chat templates: whether the one that a config names is there, and whether a model has its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from serve_app.config import engine_args
from serve_app.planner.model import metadata

_OWN_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_MISTRALS = ("tekken.json", "tokenizer.model.v3")
"""Tokenizers that write a chat without a template."""


def missing(value: object) -> str | None:
    """Why ``engine.chat_template`` cannot be read; None where it can, or is the template itself.

    As in vLLM, Jinja's characters mark it as no file.
    """
    if not isinstance(value, str) or set(value) & set("{}\n"):
        return None
    path = metadata.as_folder(value)
    if path.is_file() or value in engine_args.chat_templates():
        return None
    return f"there is no file {path.absolute()}"


def lacks_one(model: str, engine: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """Whether a model that generates certainly has no chat template, so that chat is refused.

    Only files on this machine are read; without any the answer is False.
    """
    if engine.get("chat_template") or engine.get("tokenizer_mode") not in (None, "auto", "hf"):
        return False
    folder = metadata.at_hand(str(engine.get("tokenizer") or model), environment)
    try:
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        config = json.loads((metadata.at_hand(model, environment) / "config.json").read_text())
        model_type = config.get("model_type")
    except (OSError, ValueError, AttributeError):
        return False
    if any((folder / name).exists() for name in (*_OWN_FILES, *_MISTRALS)):
        return False
    if model_type in engine_args.models_with_a_template():
        return False
    return isinstance(tokenizer, dict) and not tokenizer.get("chat_template")

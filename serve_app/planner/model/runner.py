"""Whether vLLM has a model generate, or pool: embed, score, classify."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.planner.model import metadata

_POOLING_MODULE = "sentence_transformers.models.Pooling"


def pools(model: str, engine: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """As vLLM decides (``ModelConfig._get_runner_type``), by what is on this machine.

    ``environment`` says where the Hugging Face cache is. False also where nothing at hand tells:
    most models generate.
    """
    runner = engine.get("runner") or "auto"
    if runner != "auto":
        return bool(runner == "pooling")
    if (engine.get("convert") or "auto") not in ("auto", "none"):
        return True
    if _is_sentence_transformer(metadata.at_hand(model, environment)):
        return True  # some have the architecture of a model that generates
    shape = metadata.shape_at_hand(model, environment)
    return shape is not None and shape.pooling


def _is_sentence_transformer(folder: Path) -> bool:
    """By its ``modules.json``, as vLLM's ``get_pooling_config``."""
    try:
        modules = json.loads((folder / "modules.json").read_text())
        return any(module["type"] == _POOLING_MODULE for module in modules)
    except (OSError, ValueError, LookupError, TypeError):
        return False  # there is none, or not one that vLLM could read

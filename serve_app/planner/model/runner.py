"""Whether vLLM takes a model for one that generates, or for one that pools (embeds, scores …)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.planner.model import metadata

_POOLING_MODULE = "sentence_transformers.models.Pooling"


def pools(model: str, engine: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """Whether the model pools, decided as by vLLM (``ModelConfig._get_runner_type``).

    Only files on this machine are read; ``environment`` says where the Hugging Face cache is.
    Without any the answer is False, because most models generate.
    """
    runner = engine.get("runner") or "auto"
    if runner != "auto":
        return bool(runner == "pooling")
    if (engine.get("convert") or "auto") not in ("auto", "none"):
        return True
    if _is_sentence_transformer(metadata.at_hand(model, environment)):
        return True  # some of them have a generating architecture
    shape = metadata.shape_at_hand(model, environment)
    return shape is not None and shape.pooling


def _is_sentence_transformer(folder: Path) -> bool:
    """Whether its ``modules.json`` says so, as in vLLM's ``get_pooling_config``."""
    try:
        modules = json.loads((folder / "modules.json").read_text())
        return any(module["type"] == _POOLING_MODULE for module in modules)
    except (OSError, ValueError, LookupError, TypeError):
        return False  # none, or one that vLLM could not read either

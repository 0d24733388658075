"""Whether vLLM takes a model for one that generates, or for one that pools (embeds, scores …)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.planner.model import metadata


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
    if metadata.pools_by_modules(metadata.at_hand(model, environment) / "modules.json"):
        return True  # some of them have a generating architecture
    shape = metadata.shape_at_hand(model, environment)
    return shape is not None and shape.pooling

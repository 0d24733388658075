"""What a replica tells of its model once, when it has started."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection
from typing import Any

_ROUTES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "rerank",
    "/v1/score": "score",
    "/classify": "classify",
    "/v1/audio/transcriptions": "transcriptions",
}
"""vLLM adds only the routes of the model's own tasks."""

_MEDIA = {"image": "images", "audio": "audio", "video": "videos"}


def takes(args: Namespace, renderer: Any, routes: Collection[str]) -> list[str]:
    """What clients can send to the model, in words.

    Args:
        args: the engine's arguments.
        renderer: vLLM's, which makes prompts of messages.
        routes: the paths of the model's server.
    """
    found = [word for route, word in _ROUTES.items() if route in routes]
    if processor := renderer.mm_processor:
        allowed = processor.info.allowed_mm_limits
        found += [word for medium, word in _MEDIA.items() if allowed.get(medium, 0)]
    if "chat" in found and args.enable_auto_tool_choice:
        found.append("tools")
    if "chat" in found and args.reasoning_parser:
        found.append("reasoning")
    return found

"""What a replica tells of its model: what clients can send to it."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.replica.about import takes

CHAT = {"/health", "/v1/chat/completions", "/v1/completions", "/tokenize"}
POOLING = {"/health", "/v1/embeddings", "/v1/rerank", "/v1/score"}
NO_MEDIA = SimpleNamespace(mm_processor=None)


def args(tools: bool = False, reasoning: str = "") -> Namespace:
    return Namespace(enable_auto_tool_choice=tools, reasoning_parser=reasoning)


def media(**limits: int) -> Any:
    info = SimpleNamespace(allowed_mm_limits=limits)
    return SimpleNamespace(mm_processor=SimpleNamespace(info=info))


@pytest.mark.parametrize(
    ("given", "renderer", "routes", "told"),
    [
        (args(), NO_MEDIA, CHAT, ["chat", "completions"]),
        (args(), NO_MEDIA, POOLING, ["embeddings", "rerank", "score"]),
        (args(), media(image=4, video=0), CHAT, ["chat", "completions", "images"]),
        (args(), media(audio=1, other=1), CHAT, ["chat", "completions", "audio"]),
        (args(True, "qwen3"), NO_MEDIA, CHAT, ["chat", "completions", "tools", "reasoning"]),
        (args(True, "qwen3"), NO_MEDIA, POOLING, ["embeddings", "rerank", "score"]),
    ],
)
def test_it_is_told_in_words(
    given: Namespace, renderer: Any, routes: set[str], told: list[str]
) -> None:
    assert takes(given, renderer, routes) == told

"""The recipes that need the SDKs only, run as their pages have them; tests/recipes has the rest.

A model this small cannot be relied on for what it says, so the form is what counts.
"""

from __future__ import annotations

import ast

import pytest
from harness import recipes
from harness.recipes import said
from harness.servers import CHAT, Cluster


@pytest.fixture
def here(cluster: Cluster) -> dict[str, str]:
    """The demo's words, and what they are on this cluster."""
    return {"smollm2-135m": CHAT, "127.0.0.1:8000": f"127.0.0.1:{cluster.port}"}


@pytest.mark.parametrize("index", [0, 1], ids=["whole", "streamed"])
def test_tools(here: dict[str, str], index: int) -> None:
    program = recipes.blocks("tools.md", "python")[index]
    printed = recipes.output(recipes.replaced(program, here))
    for call in said(printed, "call"):
        name, _, arguments = call.partition(" ")
        assert name == "get_weather"
        assert ast.literal_eval(arguments)["city"] in ("Paris", "Rome", "Oslo")
    assert said(printed, "call")
    assert index == 1 or said(printed, "answer")


def test_structured_output(here: dict[str, str]) -> None:
    [program] = recipes.blocks("structured-output.md", "python")
    printed = recipes.output(recipes.replaced(program, here))
    [city] = said(printed, "city")
    assert city.startswith("name=") and city.endswith(("is_capital=True", "is_capital=False"))
    assert said(printed, "choice")[0] in ("positive", "negative")
    assert 1000 <= int(said(printed, "regex")[0]) < 2000


def test_the_anthropic_sdk(here: dict[str, str]) -> None:
    [program] = recipes.blocks("anthropic.md", "python")
    printed = recipes.output(recipes.replaced(program, here))
    assert said(printed, "answer")[0]
    pieces, used = int(said(printed, "pieces")[0]), int(said(printed, "used")[0])
    assert 1 < pieces <= used <= 50
    [call] = said(printed, "call")
    assert call.startswith("get_weather {'city': '")

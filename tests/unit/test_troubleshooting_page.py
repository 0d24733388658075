"""docs/troubleshooting.md quotes messages as they are said."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()

OF_OTHERS = {
    "ImagePullBackOff", "CreateContainerConfigError", "DEPLOY_FAILED: …", "Retry-After", "[DONE]",
    "HTTP_PROXY", "vllm", "kill -9", "would violate the pod's disruption budget",
}  # fmt: skip
"""Said by Kubernetes, Ray, the SDK or the shell."""


def said() -> Iterator[str]:
    """Every string of our code; what an f-string fills in is an ellipsis."""
    yield (ROOT / "Makefile").read_text()
    for path in [*(ROOT / "serve_app").rglob("*.py"), ROOT / "requirements/install.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )


SAID = list(said())


def quoted() -> list[str]:
    """What stands in the first column as code, and is neither a command nor a setting."""
    rows = re.findall(r"^\| ([^|]+) \|", PAGE, re.MULTILINE)
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    ours = re.compile(r"(serve-app|serve|ray) |args\.|http_options\.|GET |\d")
    return sorted({span for span in spans if not ours.match(span)} - OF_OTHERS)


def test_there_is_something_to_check() -> None:
    assert len(quoted()) > 30


@pytest.mark.parametrize("quote", quoted())
def test_a_quoted_message_is_one_of_ours(quote: str) -> None:
    parts = [part.strip() for part in quote.split("…") if part.strip()]
    assert any(all(part in text for part in parts) for text in SAID), (
        "no message of serve_app says so any more; quote what it says now"
    )

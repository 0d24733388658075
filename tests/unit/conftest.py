"""``tests/unit`` is for what takes a moment: to import vLLM alone takes ten seconds and more."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def without_vllm() -> Iterator[None]:
    """A test that imports vLLM belongs in ``tests/vllm``."""
    before = {"torch", "vllm"} & sys.modules.keys()
    yield
    assert {"torch", "vllm"} & sys.modules.keys() == before

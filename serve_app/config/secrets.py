"""Values that must not stand in a file: which they are, by their name or their form."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)(_|$)", re.I)
_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|AKIA[0-9A-Z]{16}|ghp_[A-Za-z0-9]{20,})"
)


def in_plain_text(env: Mapping[Any, Any]) -> Iterator[str]:
    """The variables that, by name or value, hold a secret."""
    for name, value in env.items():
        if value and (_NAME.search(str(name)) or looks_like_one(str(value))):
            yield str(name)


def looks_like_one(text: str) -> bool:
    """Whether the text contains a token of a known form."""
    return bool(_VALUE.search(text))


def instead(name: str) -> str:
    """Where a secret belongs that stands in a config's ``env``, which can hold plain text only."""
    pods = "add it to the pods with valueFrom.secretKeyRef (a patch in an overlay)"
    if name == "HF_TOKEN":
        pods = "name a Secret in the profile's hf_token"
    return (
        f"remove it, and set {name} in the environment of `serve-app run` or `ray start`, which "
        f"replicas inherit; on Kubernetes, {pods}"
    )

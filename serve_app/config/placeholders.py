"""Values that somebody meant to replace, and did not: ``${MODEL}`` and ``REPLACE_ME``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from serve_app.errors import ConfigError

PLACEHOLDER = "REPLACE_ME"
"""The placeholder in secrets.template.yaml and in the profiles of kuberay/."""

_VARIABLE = re.compile(r"\$\{\w+(:?[-+?=][^}]*)?\}")
_JINJA = ("{{", "{%")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value in mappings and lists, with its path, such as ``served_as[0]``."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def refuse(value: Any) -> None:
    """Refuse settings in which something is still to be replaced.

    Raises:
        ConfigError: the path, the value, and what to write.
    """
    for path, text in leaves(value):
        if not isinstance(text, str) or any(mark in text for mark in _JINJA):
            continue  # a chat template may hold anything
        if PLACEHOLDER in text:
            raise ConfigError(f"{path} is '{text}', a placeholder; put your own value there")
        if _VARIABLE.search(text):
            instead = "write the value"
            if path.startswith("env."):
                instead += ", or remove it: a replica has the variables that its Ray started with"
            raise ConfigError(
                f"{path} is '{text}', but variables are not replaced in a config; {instead}"
            )

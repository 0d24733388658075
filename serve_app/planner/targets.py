"""What a command line names: a config file or models, and engine arguments beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from serve_app.config import engine_args
from serve_app.errors import ConfigError


def is_config(target: str) -> bool:
    """Whether ``target`` is a config file; anything else is a model."""
    path = Path(target)
    return path.suffix in (".yaml", ".yml", ".json") or path.is_file()


def engine_arguments(options: Sequence[str]) -> dict[str, Any]:
    """``--engine key=value`` options, checked as a config's ``engine`` is.

    Raises:
        ConfigError: not ``key=value``, or what vLLM would refuse.
    """
    arguments: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"--engine {option}: write it as key=value")
        try:
            arguments[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--engine {option}: the value is not YAML") from None
    engine_args.check(arguments)
    return arguments

"""YAML files as people write them: what is wrong is one sentence with a line and a column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from serve_app.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML's own loader lets a key that is written twice win quietly."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' is there twice; keep one", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read(path: Path) -> Any:
    """The one document of a file.

    Raises:
        ConfigError: no such file, unreadable, or not YAML, with line and column.
    """
    documents = read_all(path)
    if len(documents) > 1:
        raise ConfigError(f"{path}: has {len(documents)} YAML documents (---), but must be one")
    return documents[0] if documents else None


def read_all(path: Path) -> list[Any]:
    """The documents of a file; raises as :func:`read` does."""
    try:
        return list(yaml.load_all(path.read_text(), _Loader))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: cannot be read (not UTF-8 text)") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{path}:{at} {problem}") from None

"""YAML: read as people write it, written with comments for people to read.

What is wrong with a file is one sentence with a line and a column. PyYAML cannot write comments:
manifests are built as plain mappings and lists, and ``note(value, why)`` marks the values whose
reason a reader would ask for. :func:`dump` writes block style only, in the order given, so the
same input always gives the same bytes. Scalars are left to PyYAML, which knows what to quote.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
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


def _timestamp(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """With the place of a day that there is not."""
    try:
        return loader.construct_yaml_timestamp(node)
    except (ValueError, OverflowError) as error:
        raise yaml.constructor.ConstructorError(
            problem=f"'{node.value}' is no date ({error})", problem_mark=node.start_mark
        ) from None


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _timestamp)


def read(path: Path) -> Any:
    """The one document of a file.

    Raises:
        ConfigError: no such file, unreadable, or not YAML, with line and column.
    """
    return _one(_read(path), path)[1]


def parse(text: str, where: str) -> Any:
    """The one document of a text; raises as :func:`read` does, with ``where`` for the path."""
    return composed(text, where)[1]


def composed(text: str, where: str) -> tuple[yaml.Node | None, Any]:
    """The one document of a text, also as nodes, which know their lines. Raises as above."""
    return _one(_load(text, where), where)


def read_all(path: Path) -> list[Any]:
    """The documents of a file; raises as :func:`read` does."""
    return [document for _, document in _read(path)]


def text_of(path: Path) -> str:
    """A file's text, with its line ends as they are.

    Raises:
        ConfigError: no such file, or unreadable.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: cannot be read (not UTF-8 text)") from None


_Document = tuple[yaml.Node | None, Any]


def _read(path: Path) -> list[_Document]:
    return _load(text_of(path), path)


def _one(documents: list[_Document], where: Path | str) -> _Document:
    if len(documents) > 1:
        raise ConfigError(f"{where}: has {len(documents)} YAML documents (---), but must be one")
    return documents[0] if documents else (None, None)


def _load(text: str, where: Path | str) -> list[_Document]:
    found = []
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            found.append((node, loader.construct_document(node)))
        return found
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        if "found character '\\t'" in problem:
            problem = "there is a tab, which YAML refuses; use spaces"
        raise ConfigError(f"{where}:{at} {problem}") from None
    except ValueError as error:  # such as a number that Python does not take
        raise ConfigError(f"{where}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deeply to be read") from None


WIDTH = 96
"""Columns that a comment may fill."""


@dataclass(frozen=True)
class Note:
    """A value and the comment that belongs over its key."""

    value: Any
    why: str


def note(value: Any, why: str) -> Note:
    return Note(value, why)


def plain(value: Any) -> Any:
    """The same document without its comments."""
    if isinstance(value, Note):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def dump(*documents: Any, header: str = "") -> str:
    """The documents as one YAML file; ``header`` becomes a comment at its top."""
    parts = []
    for document in documents:
        lines: list[str] = []
        _write(document, 0, lines)
        parts.append("\n".join(lines) + "\n")
    head = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    return head + "---\n".join(parts)


def _write(value: Any, indent: int, lines: list[str]) -> None:
    pad = " " * indent
    if isinstance(value, Note):
        _comment(value.why, indent, lines)
        value = value.value
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if isinstance(item, Note):
                _comment(item.why, indent, lines)
                item = item.value
            _entry(f"{pad}{_scalar(str(key))}:", item, indent, lines)
    elif isinstance(value, list) and value:
        for item in value:
            if isinstance(item, Note):
                _comment(item.why, indent, lines)
                item = item.value
            if isinstance(item, (dict, list)) and item:
                # The item's own first line takes the place of the two blanks after the dash;
                # a comment over that line goes over the dash.
                block: list[str] = []
                _write(item, indent + 2, block)
                first = next(n for n, line in enumerate(block) if not line.lstrip().startswith("#"))
                lines += [line[2:] for line in block[:first]]
                lines.append(f"{pad}- {block[first][indent + 2 :]}")
                lines += block[first + 1 :]
            else:
                _entry(f"{pad}-", item, indent, lines)
    else:
        lines.append(f"{pad}{_scalar(value)}")


def _entry(start: str, item: Any, indent: int, lines: list[str]) -> None:
    """One ``key:`` or ``-`` with what follows it."""
    if isinstance(item, (dict, list)) and item:
        lines.append(start)
        # A list under a key is not indented further: kubectl's own style.
        _write(item, indent + (0 if isinstance(item, list) else 2), lines)
    elif isinstance(item, str) and "\n" in item and _fits_literal(item):
        lines.append(f"{start} |" + ("" if item.endswith("\n") else "-"))
        lines += [f"{' ' * (indent + 2)}{line}".rstrip() for line in item.rstrip("\n").split("\n")]
    else:
        lines.append(f"{start} {_scalar(item)}")


def _fits_literal(text: str) -> bool:
    """Whether a ``|`` block gives back exactly this text (YAML strips or refuses the others)."""
    return all(c.isprintable() or c == "\n" for c in text) and not (
        text.startswith((" ", "\n"))
        or text.endswith("\n\n")
        or any(line != line.rstrip() for line in text.split("\n"))
    )


def _scalar(value: Any) -> str:
    text: str = yaml.safe_dump(value, width=10**9, allow_unicode=True)
    text = text.removesuffix("...\n").removesuffix("\n")
    if len(text.splitlines()) > 1:  # PyYAML folds a line break; in quotes it stays on one line
        text = yaml.safe_dump(value, width=10**9, default_style='"').removesuffix("\n")
    return text


def _comment(why: str, indent: int, lines: list[str]) -> None:
    for paragraph in why.splitlines():
        for line in textwrap.wrap(paragraph, max(40, WIDTH - indent - 2)):
            lines.append(f"{' ' * indent}# {line}")

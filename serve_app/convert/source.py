"""The config to convert, each value with its name and its line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from serve_app.config import foreign, yaml_files
from serve_app.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """One value of a YAML file.

    ``name`` is its dotted key, such as ``router_settings.timeout``, and empty for the whole file.
    What comes from elsewhere by a merge (``<<``) has the line of the mapping that it comes into.
    """

    file: Path
    name: str
    value: Any
    line: int
    node: yaml.Node | None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def key(self) -> str:
        """The last part of the name."""
        return self.name.rsplit(".", 1)[-1]

    def named(self, name: str) -> Part:
        return replace(self, name=name)

    def wrong(self, what: str) -> ConfigError:
        """The error that says why this value cannot be; ``what`` goes on after its name."""
        return ConfigError(f"{self.where}: {self.name or 'the file'} {what}")

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, dict) and key in self.value

    def __getitem__(self, key: str) -> Part:
        """The value at ``key``; None where there is none."""
        value = self.value.get(key) if isinstance(self.value, dict) else None
        name = f"{self.name}.{key}" if self.name else key
        for at, node in self.node.value if isinstance(self.node, yaml.MappingNode) else ():
            if at.value == key:
                return Part(self.file, name, value, _line(at), node)
        return Part(self.file, name, value, self.line, None)

    def items(self) -> Iterator[tuple[str, Part]]:
        """The entries of a mapping; none where it is not set.

        Raises:
            ConfigError: it is something else.
        """
        if self.value is None:
            return
        if not isinstance(self.value, dict):
            raise self.wrong("must be a mapping")
        for key in self.value:
            if not isinstance(key, str):
                raise self.wrong(f"has the key {key!r}, but keys must be text")
            yield key, self[key]

    def entries(self) -> list[Part]:
        """The entries of a list, under the list's name.

        Raises:
            ConfigError: it is not a list, or empty.
        """
        if not isinstance(self.value, list) or not self.value:
            raise self.wrong("must be a list with at least one entry")
        nodes = self.node.value if isinstance(self.node, yaml.SequenceNode) else []
        if len(nodes) != len(self.value):
            return [replace(self, value=value, node=None) for value in self.value]
        return [
            Part(self.file, self.name, value, _line(node), node)
            for value, node in zip(self.value, nodes, strict=True)
        ]

    def text(self) -> str:
        """The value, which must be text.

        Raises:
            ConfigError: it is missing or something else.
        """
        if self.value is None:
            raise self.wrong("is missing")
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.wrong(f"is {self.value!r}, but must be text")
        return self.value.strip()


def read(path: Path) -> Part:
    """A file as a whole; of a manifest with a RayService, the ``serveConfigV2`` in it.

    Raises:
        ConfigError: as :func:`serve_app.config.yaml_files.read`.
    """
    documents = yaml_files.read_all(path)
    nodes = yaml.compose_all(path.read_text(), yaml.SafeLoader)
    for value, node in zip(documents, nodes, strict=False):
        if foreign.is_rayservice(value):
            return _inside(Part(path, "", value, 1, node)["spec"]["serveConfigV2"])
    value = yaml_files.read(path)
    return Part(path, "", value, 1, yaml.compose(path.read_text(), yaml.SafeLoader))


def _inside(text: Part) -> Part:
    """The YAML in a value: a block (``|``), which begins on the line after its key."""
    padded = "\n" * text.line + text.text()
    try:
        return Part(text.file, "", yaml.safe_load(padded), text.line, yaml.compose(padded))
    except yaml.YAMLError:
        raise text.wrong("is not YAML") from None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1

"""``serve-app keys``: the file of API keys, edited so that comments and order stay."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from serve_app.config import keys, yaml_files
from serve_app.config.keys import Key
from serve_app.errors import UserError, did_you_mean


def entry(
    name: str,
    hash: str,
    models: tuple[str, ...],
    expires: datetime | None,
    admin: bool,
    limits: Mapping[str, int | None],
) -> str:
    """A key's entry, as the file has it. ``limits`` are by the names of their settings.

    Raises:
        ConfigError: a value that the file may not have.
    """
    fields: dict[str, Any] = {"name": name, "hash": hash}
    if models:
        fields["models"] = list(models)
    if expires:
        fields["expires"] = expires.date() if not expires.timetz().replace(tzinfo=None) else expires
    if admin:
        fields["admin"] = True
    fields |= {setting: limit for setting, limit in limits.items() if limit is not None}
    keys.parse_all([fields], "keys new")
    return str(yaml.safe_dump([fields], sort_keys=False))


def add(file: Path, text: str) -> None:
    """Put an entry at the end of the file, which is made if there is none, readable by its owner.

    Raises:
        ConfigError: the file is broken, or has this name already.
    """
    before = file.read_text() if file.exists() else ""
    after = before + ("\n" if before and not before.endswith("\n") else "") + text
    keys.parse_all(yaml_files.parse(after, str(file)), str(file))
    _replace(file, after)


def listed(file: Path) -> list[Key]:
    """The keys of a file; raises ConfigError as reading it does."""
    return keys.parse_all(yaml_files.read(file), str(file))


def revoke(file: Path, name: str) -> None:
    """Take a key out of the file.

    Raises:
        ConfigError: the file is broken.
        UserError: no key has this name, or the entry shares its lines with others.
    """
    known = listed(file)
    names = [key.name for key in known]
    if name not in names:
        hint = did_you_mean(name, names) or f" (there are: {', '.join(names) or 'none'})"
        raise UserError(f"{file} has no key '{name}'{hint}")
    text = file.read_text()
    document = yaml.compose(text)
    assert document is not None  # it has a key
    node = document.value[names.index(name)]
    lines = text.splitlines(keepends=True)
    del lines[node.start_mark.line : _last_line(node) + 1]
    after = "".join(lines)
    try:
        left = keys.parse_all(yaml_files.parse(after, str(file)), str(file))
    except UserError:
        left = None
    if left != [key for key in known if key.name != name]:
        raise UserError(f"{file}: the entry of '{name}' shares its lines with others; delete it")
    _replace(file, after)


def expired(key: Key) -> bool:
    return key.expires is not None and key.expires <= datetime.now(UTC)


def _last_line(node: yaml.Node) -> int:
    """The last line with something of this node. A block's own end is where the next one begins."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style:
        return max(_last_line(child) for pair in node.value for child in pair)
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        return max(_last_line(child) for child in node.value)
    return int(node.end_mark.line)


def _replace(file: Path, text: str) -> None:
    """At once, so that no gateway reads half of it.

    Raises:
        UserError: it cannot be written.
    """
    file = file.resolve()  # not a link in the place of the file
    beside = file.with_name(f".{file.name}.new")
    try:
        had = file.stat() if file.exists() else None
        mode = had.st_mode & 0o777 if had else 0o600
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as out:
            out.write(text)
        if had:
            with suppress(PermissionError):  # a gateway may be another user
                os.chown(beside, had.st_uid, had.st_gid)
        beside.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror})") from None

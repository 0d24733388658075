"""``serve-app keys``: the file of API keys, edited so that comments and order stay."""

from __future__ import annotations

import fcntl
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, time
from pathlib import Path
from typing import Any, TextIO

import yaml

from serve_app.config import keys, yaml_files
from serve_app.config.keys import Key, KeyLimits
from serve_app.config.settings import parse
from serve_app.errors import ConfigError, UserError, did_you_mean


def entry(
    name: str,
    hash: str,
    models: tuple[str, ...],
    expires: str | None,
    admin: bool,
    limits: Mapping[str, int | None],
) -> str:
    """A key's entry, as the file has it. ``limits`` are by the names of their settings.

    Raises:
        ConfigError: a value that the file may not have, or an end that is past.
    """
    fields: dict[str, Any] = {"name": name, "hash": hash}
    if models:
        fields["models"] = list(models)
    if expires is not None:
        fields["expires"] = expires
    if admin:
        fields["admin"] = True
    fields |= {setting: limit for setting, limit in limits.items() if limit is not None}
    key = parse(Key, fields, "keys new")
    if expired(key):
        raise ConfigError(
            f"keys new: expires: '{expires}' is past (it is {datetime.now(UTC):%Y-%m-%dT%H:%M} in "
            "UTC); give a later day or time"
        )
    if key.expires:
        fields["expires"] = key.expires.date() if _is_midnight(key.expires) else key.expires
    return str(yaml.safe_dump([fields], sort_keys=False))


def add(file: Path, name: str, text: str) -> None:
    """Put the entry of ``name`` at the end of the file, which is made, readable by its owner, if
    there is none.

    Raises:
        ConfigError: the file is broken.
        UserError: it has this name already, has no place for it, or cannot be written.
    """

    def added(before: str) -> str:
        end = "\r\n" if "\r\n" in before else "\n"
        dash = _DASH.search(before)
        lines = textwrap.indent(text, dash[1] if dash else "").replace("\n", end)
        after = before + (end if before and not before.endswith("\n") else "") + lines
        entries = _entries(after, file)
        if entries and entries[-1].name == name:
            return after
        if any(key.name == name for key in _parsed(before, file)[1]):
            raise UserError(
                f"{file} has a key '{name}' already; choose another name, or first revoke that one "
                f"(serve-app keys revoke {file} {name})"
            )
        raise UserError(
            f"{file}: nothing can be put at its end, since its list is in brackets or '...' comes "
            "after it; write its entries as lines (- name: …), and nothing after them"
        )

    _change(file, added)


def listed(file: Path) -> list[Key]:
    """The keys of a file; raises ConfigError as reading it does."""
    return keys.parse_all(yaml_files.read(file), str(file))


def revoke(file: Path, name: str) -> str:
    """Take a key out of the file; return the comments about it that went with it.

    Those are about it that stand right above it, or further to the right than its dash below it.

    Raises:
        ConfigError: there is no such file, or it is broken.
        UserError: no key has this name, the entry shares its lines with others or they refer to
            it, or the file cannot be written.
    """
    comments = ""

    def without(before: str) -> str:
        nonlocal comments
        document, known = _parsed(before, file)
        names = [key.name for key in known]
        if name not in names:
            hint = did_you_mean(name, names) or f" (there are: {_some(names)})"
            raise UserError(f"{file} has no key '{name}'{hint}")
        assert document is not None  # it has a key
        lines = before.splitlines(keepends=True)
        node, dash = document.value[names.index(name)], document.start_mark.column
        first, end = _lines_of(lines, node, dash)
        gone = lines[first:end]
        comments = "".join(line.lstrip() for line in gone if _comment(line) is not None)
        if not "".join(lines[:first][-1:]).strip():  # else two blank lines would follow each other
            while end < len(lines) and not lines[end].strip():
                end += 1
        after = "".join(lines[:first] + lines[end:])
        if _entries(after, file) != [key for key in known if key.name != name]:
            raise UserError(
                f"{file}: the entry of '{name}' shares its lines with others, or they refer to it "
                "(&, *); delete it in an editor"
            )
        return after

    if not file.exists():
        raise ConfigError(f"{file}: no such file")
    _change(file, without)
    return comments


def expired(key: Key) -> bool:
    return key.expires is not None and key.expires <= datetime.now(UTC)


def moment(when: datetime) -> str:
    """A time in UTC, without the hour where it is a day's first."""
    return f"{when:%Y-%m-%d}" if _is_midnight(when) else f"{when:%Y-%m-%d %H:%M}"


def _is_midnight(when: datetime) -> bool:
    return when.time() == time.min


def limits(of: KeyLimits) -> str:
    """In a few words; empty without any."""
    words = [of.words()] if of.limited else []
    if of.cached_token_weight != 1:
        words.append(f"cached tokens count {of.cached_token_weight:g}")
    return ", ".join(words)


def _parsed(text: str, file: Path) -> tuple[yaml.Node | None, list[Key]]:
    document, entries = yaml_files.composed(text, str(file))
    return document, keys.parse_all(entries, str(file))


def _entries(text: str, file: Path) -> list[Key] | None:
    """The keys of a text that was put together; None where it is no keys file any more."""
    try:
        return _parsed(text, file)[1]
    except ConfigError:
        return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "none") + more


def _lines_of(lines: list[str], entry: yaml.Node, dash: int) -> tuple[int, int]:
    """The first line of an entry and the line after its last, with the comments about it.

    ``dash`` is the column of its dash.
    """
    first, end = entry.start_mark.line, _last_line(entry) + 1
    while not lines[end - 1].strip():  # of a text in a block
        end -= 1
    while first and _LONE_DASH.fullmatch(lines[first - 1]):
        first -= 1
    while first and (column := _comment(lines[first - 1])) is not None and column <= dash:
        first -= 1
    while end < len(lines) and (column := _comment(lines[end])) is not None and column > dash:
        end += 1
    return first, end


_DASH = re.compile(r"^\ufeff?( *)-(?=\s)", re.MULTILINE)
_LONE_DASH = re.compile(r"\ufeff? *-\s*(#.*\s*)?")


def _comment(line: str) -> int | None:
    """The column where a line that is only a comment begins; None for any other line."""
    text = line.lstrip(" \t\ufeff")
    return len(line.lstrip("\ufeff")) - len(text) if text.startswith("#") else None


def _last_line(node: yaml.Node) -> int:
    """The last line with something of this node. A block's own end is where the next one begins."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style:
        return max(_last_line(child) for pair in node.value for child in pair)
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        return max(_last_line(child) for child in node.value)
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">") and not node.end_mark.column:
        return int(node.end_mark.line) - 1
    return int(node.end_mark.line)


def _change(file: Path, edit: Callable[[str], str]) -> None:
    """Put what ``edit`` makes of the file's text in its place; without a file, of an empty text.

    At once, so that no gateway reads half of it; and one process after the other, so that none
    takes back what another has written.

    Raises:
        UserError: it cannot be written.
    """
    file = Path(os.path.realpath(file))  # not a link in the place of the file
    beside = file.with_name(f".{file.name}.new")
    try:
        with _locked(beside) as out:
            try:
                had = file.stat() if file.exists() else None
                out.write(edit(yaml_files.text_of(file) if had else ""))
                out.flush()
                os.fsync(out.fileno())
                if had:
                    with suppress(PermissionError):  # a gateway may be another user
                        os.fchown(out.fileno(), had.st_uid, had.st_gid)
                    os.fchmod(out.fileno(), had.st_mode & 0o777)
                beside.replace(file)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: a new file in {file.parent} takes its place "
            f"({error.strerror})"
        ) from None


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """A new and empty file, which no other process has at the same time."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path, flags, 0o600), "w", encoding="utf-8", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(path, file):  # else whoever had it has put it into its place, or away
                file.truncate()  # a killed process may have left something in it
                yield file
                return


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False

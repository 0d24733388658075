"""API keys as a file lists them: names and digests, never the keys themselves."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, field_validator

from serve_app.config import yaml_files
from serve_app.config.settings import KeySource, Settings, parse
from serve_app.errors import ConfigError, did_you_mean

PREFIX = "sk-"
"""What every key begins with, so that scanners for secrets know it."""

_BYTES = 32
"""Of randomness in a key. From 16 on a plain SHA-256 suffices: nobody can try them all."""

_EXAMPLE = "2030-01-31"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NO_ID = re.compile(r"[\s\[\]?]")
"""Blanks no id has; brackets and ? would be more than an id's to :mod:`fnmatch`."""


class KeyLimits(Settings):
    """How much a key may ask for; None is without a limit."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests for a model in the last 60 s."""

    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens of prompts and completions together in the last 60 s."""

    concurrent_requests: int | None = Field(default=None, ge=1)
    """Requests at the same time, those included that wait for a replica."""

    tokens_per_day: int | None = Field(default=None, ge=1)
    """The same tokens in one day, which begins at 00:00 UTC."""

    cached_token_weight: float = Field(default=1.0, ge=0, le=1)
    """What a prompt's token counts that was found in the KV cache; 0 makes it free."""

    @cached_property
    def given(self) -> dict[str, int]:
        """The limits that there are, by their names. Requests ask for them: made once."""
        return {name: most for name in _WORDS if (most := getattr(self, name)) is not None}

    @property
    def limited(self) -> bool:
        """Whether anything is limited."""
        return bool(self.given)

    @property
    def of_tokens(self) -> bool:
        """Whether tokens are."""
        return self.tokens_per_minute is not None or self.tokens_per_day is not None

    def words(self) -> str:
        """The limits in a few words; empty without any."""
        return ", ".join(f"{most:,} {_WORDS[name]}" for name, most in self.given.items())


_WORDS = {
    "requests_per_minute": "requests/min",
    "tokens_per_minute": "tokens/min",
    "concurrent_requests": "at once",
    "tokens_per_day": "tokens/day",
}

UNLIMITED = KeyLimits()

_Ids = TypeVar("_Ids", list[str], dict[str, KeyLimits])


class Key(KeyLimits):
    """One entry of a keys file."""

    name: str
    """Whose key it is; it stands in logs and metrics."""

    hash: str
    """What ``serve-app keys new`` printed for the key."""

    models: list[str] = Field(default=["*"], min_length=1)
    """The ids that it may name, adapters included; ``*`` stands for any characters."""

    expires: datetime | None = None
    """From then on it is refused; a date alone means its first moment in UTC."""

    admin: bool = False
    """Whether it also sees what concerns all keys."""

    priority: int = 0
    """Whose requests wait for a replica are served in this order, the highest first."""

    weight: float = Field(default=1.0, gt=0)
    """Its share among the keys of its priority whose requests wait."""

    model_limits: dict[str, KeyLimits] = Field(default={})
    """Limits for each single model, by id or pattern; the first that matches a model counts. What
    is asked of the model counts towards the key's own limits too."""

    @field_validator("name", mode="before")
    @classmethod
    def _given(cls, name: Any) -> Any:
        if name in (None, ""):
            raise ValueError("is empty; write whose key it is, such as team-a")
        if isinstance(name, list | dict):  # not repeated either: the key may be in it
            raise ValueError("must be text: whose key it is, such as team-a")
        return name

    @field_validator("name")
    @classmethod
    def _short(cls, name: str) -> str:
        if name.startswith(PREFIX):  # and is not repeated: names stand in logs
            raise ValueError("is a key; write whose it is, and the key's hash under 'hash'")
        if not _NAME.fullmatch(name):
            said = f"{name[:64]!r} " if PREFIX not in name else ""
            raise ValueError(
                f"{said}must be up to 64 letters (a to z), digits and . _ @ -, and begin with a "
                "letter or digit"
            )
        return name

    @field_validator("hash", mode="before")
    @classmethod
    def _digest(cls, hash: Any) -> Any:
        # It is not repeated here, whatever it is: it may be the key itself.
        if not isinstance(hash, str) or not _HASH.fullmatch(hash):
            raise ValueError("is not 'sha256:' and 64 digits, as `serve-app keys new` prints it")
        return hash

    @field_validator("models", mode="before")
    @classmethod
    def _some(cls, models: Any) -> Any:
        if models is None or models == []:
            raise ValueError(
                "is empty, so the key may use none; list ids or patterns, such as ['smollm2*'], or "
                "remove 'models' for all of them"
            )
        return models

    @field_validator("models", "model_limits")
    @classmethod
    def _patterns(cls, ids: _Ids) -> _Ids:
        for id in ids:
            if not id or _NO_ID.search(id):
                raise ValueError(
                    f"{id!r} is neither a model's id nor a pattern, in which * stands for any "
                    "characters; for all models write '*'"
                )
        return ids

    @field_validator("expires", mode="before")
    @classmethod
    def _in_utc(cls, expires: Any) -> datetime | None:
        return None if expires is None else moment(expires)


def moment(when: Any) -> datetime:
    """A day's first moment, or a time, in UTC; it may name another zone.

    Raises:
        ValueError: it is neither, in one sentence.
    """
    read: datetime
    try:
        if isinstance(when, str):
            read = datetime.fromisoformat(when)
        elif isinstance(when, datetime):
            read = when
        else:
            read = datetime(when.year, when.month, when.day)
        return read.astimezone(UTC) if read.tzinfo else read.replace(tzinfo=UTC)
    except (ValueError, AttributeError, OverflowError):
        raise ValueError(
            f"{when!r} is no day or time; write a day, from whose first moment in UTC the key is "
            f"refused, such as {_EXAMPLE}, or a time, such as {_EXAMPLE}T18:00"
        ) from None


def parse_all(entries: Any, where: str) -> list[Key]:
    """The keys of a file's document.

    Raises:
        ConfigError: what is wrong with which entry, prefixed with ``where``.
    """
    if entries is None:
        return []
    if not isinstance(entries, list):
        kind = "mapping" if isinstance(entries, dict) else "text"
        raise ConfigError(
            f"{where}: must be a list of keys, each as `serve-app keys new` prints it, not a {kind}"
        )
    keys: list[Key] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: key {number} must be a mapping with a name and a hash")
        name = entry.get("name")
        usable = isinstance(name, str) and _NAME.fullmatch(name) and not name.startswith(PREFIX)
        named = name if usable else number
        keys.append(parse(Key, entry, f"{where}: key {named}"))
    names: dict[str, int] = {}
    hashes: dict[str, str] = {}
    for number, key in enumerate(keys, 1):
        if (first := names.setdefault(key.name, number)) != number:
            raise ConfigError(
                f"{where}: two keys are named {key.name}, the {_nth(first)} and the {_nth(number)} "
                "of the list; give one of them another name, or remove it"
            )
        if (other := hashes.setdefault(key.hash, key.name)) != key.name:
            raise ConfigError(
                f"{where}: {other} and {key.name} have the same hash, so they are one key; remove "
                "one of the two, or make a key of its own for it (serve-app keys new)"
            )
    return keys


def _nth(number: int) -> str:
    words = {1: "st", 2: "nd", 3: "rd"} if number % 100 not in (11, 12, 13) else {}
    return f"{number}{words.get(number % 10, 'th')}"


def out_of_reach(key: Key, models: Iterable[Collection[str]]) -> Iterator[str]:
    """What of a key's ``models`` and ``model_limits`` is about none of these models.

    Of each model (and each adapter) ``models`` has all ids: a key that may use one of them may use
    the others.
    """
    models = list(models)
    usable = [ids for ids in models if any(matches(pattern, ids) for pattern in key.models)]
    for setting, patterns in (("models", key.models), ("model_limits", key.model_limits)):
        for pattern in patterns:
            if not any(matches(pattern, ids) for ids in models):
                near = did_you_mean(pattern, [id for ids in models for id in ids])
                yield f"{setting} has '{pattern}', but there is no such model here{near}"
            elif not any(matches(pattern, ids) for ids in usable):
                yield f"{setting} has '{pattern}', which the key may not use; add it to its models"


def matches(pattern: str, ids: Collection[str]) -> bool:
    """Whether a pattern of a key is about the model with these ids."""
    return any(fnmatchcase(id, pattern) for id in ids)


def read(source: KeySource, environment: Mapping[str, str] = os.environ) -> list[Key]:
    """The keys of a source, as they are now. ``environment`` is that of the gateways.

    Raises:
        ConfigError: they cannot be read, in one sentence.
    """
    if source.file:
        return parse_all(yaml_files.read(Path(source.file)), source.file)
    name = source.secret_env or ""
    text = environment.get(name)
    if text is None:
        raise ConfigError(f"the environment variable {name} is not set")
    return parse_all(yaml_files.parse(text, name), name)


def new() -> tuple[str, str]:
    """A key, and the ``hash`` to keep of it."""
    key = PREFIX + secrets.token_urlsafe(_BYTES)
    return key, digest(key.encode())


def digest(key: bytes) -> str:
    """The ``hash`` of a key."""
    return "sha256:" + hashlib.sha256(key).hexdigest()

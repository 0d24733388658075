"""API keys as a file lists them: names and digests, never the keys themselves."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from serve_app.config import yaml_files
from serve_app.config.settings import KeySource, Settings, parse
from serve_app.errors import ConfigError

PREFIX = "sk-"
"""What every key begins with, so that scanners for secrets know it."""

_BYTES = 32
"""Of randomness in a key. From 16 on a plain SHA-256 suffices: nobody can try them all."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")


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

    @field_validator("name")
    @classmethod
    def _short(cls, name: str) -> str:
        if name.startswith(PREFIX):  # and is not repeated: names stand in logs
            raise ValueError("is a key; write whose it is, and the key's hash under 'hash'")
        if not _NAME.fullmatch(name):
            raise ValueError("has up to 64 letters, digits and . _ @ -")
        return name

    @field_validator("hash", mode="before")
    @classmethod
    def _digest(cls, hash: Any) -> Any:
        # It is not repeated here, whatever it is: it may be the key itself.
        if not isinstance(hash, str) or not _HASH.fullmatch(hash):
            raise ValueError("is not 'sha256:' and 64 digits, as `serve-app keys new` prints it")
        return hash

    @field_validator("expires")
    @classmethod
    def _in_utc(cls, expires: datetime | None) -> datetime | None:
        return expires.replace(tzinfo=UTC) if expires and not expires.tzinfo else expires


def parse_all(entries: Any, where: str) -> list[Key]:
    """The keys of a file's document.

    Raises:
        ConfigError: what is wrong with which entry, prefixed with ``where``.
    """
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise ConfigError(f"{where}: must be a list of keys, not a {type(entries).__name__}")
    keys: list[Key] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: key {number} must be a mapping with a name and a hash")
        name = entry.get("name", number)
        named = number if str(name).startswith(PREFIX) else name
        keys.append(parse(Key, entry, f"{where}: key {named}"))
    names: set[str] = set()
    hashes: dict[str, str] = {}
    for key in keys:
        if key.name in names:
            raise ConfigError(f"{where}: key {key.name} is there twice; keep one")
        if other := hashes.get(key.hash):
            raise ConfigError(f"{where}: key {key.name} has the same hash as {other}; keep one")
        names.add(key.name)
        hashes[key.hash] = key.name
    return keys


def read(source: KeySource) -> list[Key]:
    """The keys of a source, as they are now.

    Raises:
        ConfigError: they cannot be read, in one sentence.
    """
    if source.file:
        return parse_all(yaml_files.read(Path(source.file)), source.file)
    name = source.secret_env or ""
    text = os.environ.get(name)
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

"""The API keys that let callers in, read again when their file changes."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime

from serve_app.config import keys
from serve_app.config.document import OPERATOR_HASH
from serve_app.config.keys import Key
from serve_app.config.settings import KeySource
from serve_app.errors import ConfigError
from serve_app.gateway.callers import Caller
from serve_app.gateway.errors import GatewayError

logger = logging.getLogger("ray.serve")

REFRESH_S = 2.0
"""Seconds between two looks at the file."""


class Keyring:
    """The keys in force. :attr:`problem` says why they are not those of the file."""

    def __init__(self, source: KeySource) -> None:
        self._source = source
        self._stamp: object = None
        self.problem = ""
        operator = os.environ.get(OPERATOR_HASH)
        self._operator = [Key(name="operator", hash=operator, admin=True)] if operator else []
        self._keys = {key.hash: (key, _caller(key)) for key in self._operator}
        """By hash. Another dictionary takes its place, in a thread, when the file has changed."""

        self._was_read = False
        self.refresh()

    def refresh(self) -> None:
        """Read the file if it has changed. A broken one leaves the keys as they were."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            found = keys.read(self._source)
        except Exception as error:  # whatever is in the file, the next one is to be read
            said = error if isinstance(error, ConfigError) else f"the API keys: {error!r}"
            kept = "the keys read last stay in force" if self._was_read else "nobody is let in"
            self.problem = f"{said}; {kept}"
            logger.error(self.problem)
            return
        where = self._source.file or self._source.secret_env
        self.problem = "" if found else f"{where} lists no API key, so nobody is let in"
        self._was_read = True
        self._keys = {key.hash: (key, _caller(key)) for key in [*found, *self._operator]}
        logger.info(self.problem or f"{len(found)} API keys are in force")

    @property
    def limited(self) -> bool:
        """Whether any key has a limit."""
        return any(key.limited or key.model_limits for key, _ in self._keys.values())

    async def run(self) -> None:
        """Refresh for ever."""
        while True:
            await asyncio.sleep(REFRESH_S)
            await asyncio.to_thread(self.refresh)

    def caller(self, headers: Mapping[bytes, bytes]) -> Caller:
        """Whose key a request carries, in ``Authorization: Bearer`` or ``x-api-key``.

        Raises:
            GatewayError: 401 without a key, and for one that is unknown or has expired.
        """
        given = _given(headers)
        if not given:
            raise _refused(
                "You must provide an API key, as 'Authorization: Bearer <key>' or 'x-api-key: "
                "<key>'.",
                "missing_api_key",
            )
        hash = keys.digest(given)
        key, caller = self._keys.get(hash, (None, None))
        # The lookup is by digest, so its time tells nothing of a key; the comparison's neither.
        if key is None or caller is None or not hmac.compare_digest(key.hash, hash):
            raise _refused("The API key is not known here; check it.", "invalid_api_key")
        if key.expires and datetime.now(UTC) >= key.expires:
            raise _refused(
                f"The API key '{key.name}' expired at {key.expires:%Y-%m-%d %H:%M} UTC; ask for a "
                "new one.",
                "expired_api_key",
            )
        return caller

    def _stamp_now(self) -> object:
        if not self._source.file:
            return "the environment does not change"
        try:
            found = os.stat(self._source.file)
        except OSError as error:
            return error.errno
        # A mounted Secret is replaced by another file. The time is that of rights, too.
        return found.st_ctime_ns, found.st_ino, found.st_size


def _caller(key: Key) -> Caller:
    return Caller(
        key.name,
        tuple(key.models),
        key.admin,
        key.priority,
        key.weight,
        limits=key,
        model_limits=tuple(key.model_limits.items()),
    )


def _given(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and token.strip():
        return token.strip()
    return headers.get(b"x-api-key", b"").strip()


def _refused(message: str, code: str) -> GatewayError:
    return GatewayError(
        401, message, "authentication_error", code=code, headers={"www-authenticate": "Bearer"}
    )

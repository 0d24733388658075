"""The access log: a line of JSON for each request, also for those refused before a model was known.

It lies beside Serve's own logs, where what ships logs finds it, and is rotated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from logging.handlers import RotatingFileHandler
from pathlib import Path

from serve_app.cluster.serve import logs_folder
from serve_app.config.settings import GatewayConfig
from serve_app.gateway import routes
from serve_app.gateway.ledger import Entry
from serve_app.gateway.usage.line import encode

ACCESS_LOG = "SERVE_APP_ACCESS_LOG"
"""Environment variable that the images set: 1 is what ``access_log`` is where no args say it."""

_WRITE_S = 0.1
"""Seconds for which lines are gathered: one write is as dear as ten lines. A killed process loses
these; ``usage_dir`` loses none."""

_FILE_BYTES = 64 * 2**20
_OLD_FILES = 2
_MAX_PATH = 200
"""Characters of a path that may be none of ours: a stranger shall not fill the log."""


class AccessLog:
    """The listener that writes the lines; see :mod:`serve_app.gateway.usage.line`."""

    @staticmethod
    def of(config: GatewayConfig) -> AccessLog | None:
        """What the settings ask for; None where they ask for none."""
        wanted = config.access_log
        if wanted is None:
            wanted = os.environ.get(ACCESS_LOG) == "1"
        return AccessLog(logs_folder()) if wanted else None

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _File(
            folder / f"access_gateway_{os.getpid()}.log",
            maxBytes=_FILE_BYTES,
            backupCount=_OLD_FILES,
            delay=True,
        )
        self._lines: list[bytes] = []

    def entered(self, entry: Entry) -> None:
        if not self._lines:
            asyncio.get_running_loop().call_later(_WRITE_S, self._write)
        self._lines.append(encode(entry))

    def _write(self) -> None:
        text = b"".join(self._lines).decode().removesuffix("\n")
        self._lines.clear()
        if text:
            self._file.emit(logging.makeLogRecord({"msg": text}))

    def refused(self, path: str, status: int, key: str) -> None:
        """Write a request that named no model that there is, or had no right to be answered."""
        self.entered(
            Entry(
                id=uuid.uuid4().hex,
                request_id="",
                key=key,
                model="",
                model_id="",
                path=routes.told(path)[:_MAX_PATH],
                replica="",
                end="refused",
                status=status,
                arrived=time.time(),
                queued_s=0.0,
                first_byte_s=None,
                duration_s=0.0,
                retries=0,
                usage=None,
            )
        )

    def close(self) -> None:
        """Write what was gathered, and end. In the event loop's thread."""
        self._write()
        with contextlib.suppress(OSError):  # it writes once more what a full disk did not take
            self._file.close()


class _File(RotatingFileHandler):
    """Where a disk is full, requests go on without a line; logging would print a traceback each."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

"""The listener that writes each request down, in ``usage_dir`` and for ``usage_db``."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy.exc

from serve_app.config.document import USAGE_DB
from serve_app.config.settings import GatewayConfig, UsageDb
from serve_app.errors import ConfigError
from serve_app.gateway.errors import GatewayError, unavailable
from serve_app.gateway.ledger import Entry
from serve_app.gateway.usage.database import Database, Newer
from serve_app.gateway.usage.journal import Journal
from serve_app.gateway.usage.line import encode
from serve_app.gateway.usage.ship import REMIND_S, Shipper

logger = logging.getLogger("ray.serve")

_LINES_BYTES, _LINES_AGE_S = 64 * 2**20, 86_400.0
_SPOOL_BYTES, _SPOOL_AGE_S = 8 * 2**20, float("inf")  # the shipper closes it every second
_CLOSE_S = 5.0
_QUESTIONS = 2
"""Asked of the database at a time."""

_WAITING = 16
"""Questions that wait for their turn, at most."""


class Record:
    """The listener. :attr:`problem` says why the database lacks requests; empty if it does not."""

    @staticmethod
    def of(config: GatewayConfig) -> Record | None:
        """What the settings ask for; None where they ask for no record.

        Raises:
            ConfigError: it cannot be kept as they say.
        """
        url = _url(config)
        if url is None and config.usage_dir is None:
            return None
        lines = spool = database = None
        if config.usage_dir:
            lines = _journal("usage_dir", Path(config.usage_dir), _LINES_BYTES, _LINES_AGE_S)
        if url:
            database = Database(url)
            folder = Path(config.usage_spool) if config.usage_spool else _spool(database, url)
            spool = _journal("usage_spool", folder, _SPOOL_BYTES, _SPOOL_AGE_S)
        return Record(lines, spool, database)

    def __init__(
        self, lines: Journal | None, spool: Journal | None, database: Database | None
    ) -> None:
        self._lines, self._spool, self._database = lines, spool, database
        self.lost: Callable[[], None] = lambda: None
        """Told of each request that is not recorded."""

        self._shipper = Shipper(spool, database) if spool and database else None
        self._threads = ThreadPoolExecutor(_QUESTIONS, thread_name_prefix="usage")
        self._asked = 0
        self._lost = 0
        self._said_at = float("-inf")
        if self._shipper:
            self._shipper.start()

    @property
    def has_database(self) -> bool:
        return self._database is not None

    @property
    def problem(self) -> str:
        return self._shipper.problem if self._shipper else ""

    def entered(self, entry: Entry) -> None:
        line = encode(entry)
        if self._spool and self._shipper:
            if self._shipper.is_full:
                self._unrecorded(f"{self._spool.folder} has as much as it may")
            else:
                self._append(self._spool, line)
        if self._lines:
            self._append(self._lines, line)

    async def totals(
        self, since: datetime, until: datetime, group_by: Sequence[str], key: str | None
    ) -> list[dict[str, Any]]:
        """See :meth:`Database.totals`; the event loop does not wait for it.

        Raises:
            GatewayError: 503 while the database does not answer, or too many ask.
        """
        assert self._database
        if self._asked >= _QUESTIONS + _WAITING:
            raise unavailable("Too many ask for the usage at this moment; ask again later.")
        self._asked += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._database.totals, since, until, group_by, key
            )
        except (sqlalchemy.exc.SQLAlchemyError, Newer, OSError) as error:
            logger.warning(f"usage_db: {error}")
            raise GatewayError(
                503,
                "The usage database does not answer; what happens meanwhile is recorded later.",
                "server_error",
                code="usage_unavailable",
                headers={"retry-after": "5"},
            ) from None
        finally:
            self._asked -= 1

    def close(self) -> None:
        """Bring what was written last to the database, if that answers within seconds."""
        if self._shipper:
            self._shipper.close(_CLOSE_S)
        for journal in filter(None, (self._spool, self._lines)):
            journal.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._database:
            self._database.close()

    def _append(self, journal: Journal, line: bytes) -> None:
        try:
            journal.append(line)
        except OSError as error:
            self._unrecorded(str(error))

    def _unrecorded(self, why: str) -> None:
        self.lost()
        self._lost += 1
        if time.monotonic() - self._said_at >= REMIND_S:
            self._said_at = time.monotonic()
            logger.error(f"{self._lost} requests were not recorded so far: {why}")


def _url(config: GatewayConfig) -> str | None:
    source = config.usage_db
    if source is None and os.environ.get(USAGE_DB, "").strip():
        source = UsageDb(secret_env=USAGE_DB)
    return source.address(os.environ) if source else None


def _journal(setting: str, folder: Path, max_bytes: int, max_age_s: float) -> Journal:
    try:
        return Journal(folder, max_file_bytes=max_bytes, max_file_age_s=max_age_s)
    except OSError as error:
        raise ConfigError(
            f"{setting}: {folder} cannot be written ({error.strerror}); name another folder"
        ) from None


def _spool(database: Database, url: str) -> Path:
    """One for each database: processes that share a folder also ship each other's lines."""
    if database.file:
        return database.file.with_name(f"{database.file.name}.spool")
    base = Path(tempfile.gettempdir()) / f"serve_app-usage-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    if base.lstat().st_uid != os.getuid():  # else its maker could add requests
        raise ConfigError(f"{base} is another user's; name a folder in usage_spool")
    return base / hashlib.sha256(url.encode()).hexdigest()[:12]

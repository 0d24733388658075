"""Brings the lines of a journal into the database, in a thread, whenever that answers."""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime

from sqlalchemy.exc import DBAPIError

from serve_app.gateway.usage import journal
from serve_app.gateway.usage.database import Database
from serve_app.gateway.usage.journal import Journal
from serve_app.gateway.usage.line import is_one

logger = logging.getLogger("ray.serve")

INTERVAL_S = 1.0
"""Seconds between two looks at the journal."""

RETRY_S = 3.0
"""Seconds from a failure to the next try."""

REMIND_S = 60.0
"""Seconds between two lines in the log on one failure."""

MOST_BYTES = 4 * 2**30
"""Of all journals in the folder while their database is away: about ten million requests."""


class Shipper:
    """:attr:`problem` says why the database lacks requests; empty while it lacks none."""

    def __init__(self, spool: Journal, database: Database) -> None:
        self._spool = spool
        self._database = database
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage_db", daemon=True)
        self._failing_since = ""
        self._said_at = float("-inf")
        self.problem = ""
        self.is_full = False
        """Whether the folder has as much as it may."""

    def start(self) -> None:
        self._thread.start()

    def close(self, within_s: float) -> None:
        """Ship the rest and end. What then is left, the next process with this folder ships."""
        self._stop.set()
        self._thread.join(within_s)

    def ship(self) -> None:
        """Insert all that has been written, by dead processes too, and remove it."""
        self._database.prepare()
        self._ship_closed()  # fails, while the database is away, before there is one file more
        self._spool.close()
        self._ship_closed()

    def _ship_closed(self) -> None:
        for file in journal.closed(self._spool.folder):
            lines = file.lines()
            read = [line for line in lines if is_one(line)]
            self._database.insert(read)
            if len(read) == len(lines):
                file.remove()
            else:
                aside = file.set_aside()
                logger.error(
                    f"{len(lines) - len(read)} lines of {aside} cannot be read; usage_db lacks them"
                )

    def _run(self) -> None:
        while True:
            is_last = self._stop.wait(RETRY_S if self.problem else INTERVAL_S)
            try:
                self.ship()
            except Exception as error:  # whatever it is, no line is lost by trying again
                self._failed(error)
            else:
                self._worked()
            if is_last:
                return

    def _failed(self, error: Exception) -> None:
        folder = self._spool.folder
        waiting = journal.size(folder)
        self.is_full = waiting >= MOST_BYTES
        self._failing_since = self._failing_since or f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
        self.problem = (
            f"usage_db has not been written since {self._failing_since} UTC: {_reason(error)}; "
            f"{waiting / 2**20:.1f} MiB of requests wait in {folder}"
        )
        if time.monotonic() - self._said_at >= REMIND_S:
            self._said_at = time.monotonic()
            logger.error(self.problem)
        try:
            self._spool.sync()
        except OSError as unsynced:
            logger.error(f"{folder}: {unsynced}")

    def _worked(self) -> None:
        if self.problem:
            logger.info(f"usage_db is written again, and has all since {self._failing_since} UTC")
        self.problem, self._failing_since, self.is_full = "", "", False


def _reason(error: Exception) -> str:
    """The database's own words, without the statement and its values."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return " ".join(str(cause).split()) or repr(cause)

"""The phases of a replica's start: for its log, ``GET /ready`` and whoever waits for it.

The engine's processes write their phase into a file (:mod:`serve_app.replica.start.plugin`). In
the replica, :class:`Progress` follows that file and publishes each phase in the GCS, where gateways
read it. Serve itself passes on nothing from a replica that is still starting.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from serve_app.cluster import progress
from serve_app.replica.start.background import BackgroundThread

logger = logging.getLogger("ray.serve")

FIRST = "starting the engine"
"""The phase before vLLM's first log line: mostly imports."""

PERIOD_S = 0.5
"""Seconds between two looks at the file."""


class Progress(BackgroundThread):
    """Publishes the phases of a replica's start until its ``with`` block ends."""

    def __init__(self, replica: str, file: Path) -> None:
        super().__init__("progress")
        self.phase = ""
        """The phase that was published last."""

        self._replica = replica
        self._file = file

    def _run(self) -> None:
        try:
            self._follow()
            progress.forget([self._replica])
        except Exception:  # a start needs no progress report to go on
            logger.exception("how this start goes on is not shown in GET /ready")

    def _follow(self) -> None:
        began = time.monotonic()
        while True:
            # Empty while it is being written.
            phase = (self._file.exists() and self._file.read_text()) or self.phase or FIRST
            if phase != self.phase:
                self.phase = phase
                logger.info(f"start: {phase} (after {time.monotonic() - began:.0f} s)")
                progress.publish(self._replica, phase)
            if self._over.wait(PERIOD_S):
                return

"""Ends a start that takes too long, and the start of a replica that Serve is stopping.

vLLM's constructor blocks the replica's event loop until its engine is up. It waits without end for
workers that hang (two GPUs that cannot reach each other). Serve's order to stop needs that loop
too: a model that is deleted while it loads would keep its GPUs for as long as a running one may
drain. So a thread ends both.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time

from serve_app.cluster import serve
from serve_app.replica.start.background import BackgroundThread

logger = logging.getLogger("ray.serve")

PERIOD_S = 5.0
"""Seconds between two looks at Serve's report."""

GRACE_S = 30.0
"""Seconds after the end of the engine's processes in which the constructor must have failed."""


class StartWatch(BackgroundThread):
    """Watches the start of a replica until its ``with`` block ends."""

    def __init__(self, application: str, replica: str, limit_s: float) -> None:
        super().__init__("start-watch")
        self.overdue = False
        """Whether the start was broken off because it took longer than ``limit_s`` seconds."""

        self._application = application
        self._replica = replica
        self._deadline = time.monotonic() + limit_s

    def _run(self) -> None:
        while True:
            left = self._deadline - time.monotonic()
            if self._over.wait(max(0.0, min(PERIOD_S, left))):
                return
            if left <= PERIOD_S:
                self._break_off()
                return
            if self._is_stopping():
                logger.info("this replica is not wanted any more; its start ends here")
                os._exit(0)

    def _break_off(self) -> None:
        """End the engine's processes: vLLM's constructor then fails, and the replica says why."""
        self.overdue = True
        for child in multiprocessing.active_children():
            child.kill()
        if not self._over.wait(GRACE_S):
            logger.error("the start took too long and cannot be broken off; this replica exits")
            os._exit(1)

    def _is_stopping(self) -> bool:
        try:
            report = serve.report(timeout_s=PERIOD_S)
        except Exception:  # the controller is busy, or restarts
            return False
        application = serve.applications(report or {}).get(self._application)
        return application is not None and any(
            replica.id == self._replica and replica.state == "STOPPING"
            for replica in application.replicas
        )

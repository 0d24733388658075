"""How far the start of a replica has come: for its log, ``GET /ready`` and whoever waits for it.

The engine's processes note what they do in a file (:mod:`serve_app.engine_process`). In the
replica :class:`Progress` follows that file and publishes each phase in the GCS, because Serve
passes on nothing from a replica that does not run yet. Gateways read it there.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ray.experimental import internal_kv

from serve_app.beside import Beside

logger = logging.getLogger("ray.serve")

FIRST = "starting the engine"
"""The phase before vLLM's first line: imports, mostly."""

PERIOD_S = 0.5
"""Seconds between two looks at the file."""


@dataclass(frozen=True)
class Phase:
    """What a starting replica is doing."""

    name: str
    since: float
    """By ``time.time`` where the replica runs."""


class Progress(Beside):
    """Publishes the phases of a replica's start until its ``with`` block ends."""

    def __init__(self, replica: str, file: Path) -> None:
        super().__init__("progress")
        self.phase = ""
        """The phase that was published last."""

        self._key = _key(replica)
        self._file = file

    def _run(self) -> None:
        try:
            self._follow()
            internal_kv._internal_kv_del(self._key)
        except Exception:  # the start itself goes on
            logger.exception("how this start goes on is not shown in GET /ready")

    def _follow(self) -> None:
        began = time.monotonic()
        while True:
            # Empty while it is being written.
            phase = (self._file.exists() and self._file.read_text()) or self.phase or FIRST
            if phase != self.phase:
                self.phase = phase
                logger.info(f"start: {phase} (after {time.monotonic() - began:.0f} s)")
                value = json.dumps([phase, time.time()]).encode()
                internal_kv._internal_kv_put(self._key, value, overwrite=True)
            if self._over.wait(PERIOD_S):
                return


def read(replicas: Iterable[str]) -> dict[str, Phase]:
    """The phases of starting replicas by id; without those whose process is not up yet."""
    found = {replica: internal_kv._internal_kv_get(_key(replica)) for replica in replicas}
    return {replica: Phase(*json.loads(value)) for replica, value in found.items() if value}


def forget(replicas: Iterable[str]) -> None:
    """Delete what is left of replicas that were killed while they started."""
    for replica in replicas:
        internal_kv._internal_kv_del(_key(replica))


def _key(replica: str) -> bytes:
    return f"serve_app/progress/{replica}".encode()

"""What is done inside the processes that vLLM starts (EngineCore and its workers).

vLLM calls :func:`prepare` there as a plugin (``vllm.general_plugins`` in pyproject.toml).
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from pathlib import Path

START_ERRORS = "SERVE_APP_START_ERRORS"
"""Environment variable: the file into which a process writes why it could not start."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# vLLM logs the reason there, and raises only "initialization failed" in the parent.
_LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")


def prepare() -> None:
    """Tie this process to its parent, and have the reason of a failed start written down.

    Called by vLLM in every process; acts only in those that ``multiprocessing`` started,
    never in the replica itself.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform.startswith("linux"):
        _die_with(parent.pid)
    path = os.environ.get(START_ERRORS)
    if path:
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(_FirstError(Path(path)))


def _die_with(parent: int | None) -> None:
    """Have the kernel end this process as soon as the one that started it is gone.

    vLLM's EngineCore has no such tie: after a SIGKILL of its replica it keeps the GPU
    (vllm#55510).
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


class _FirstError(logging.Handler):
    """Writes the first logged exception to a file; later ones are its consequences."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            try:
                with self._path.open("x") as file:
                    file.write(f"{type(error).__name__}: {error}")
            except FileExistsError:
                pass

"""What is done inside the processes that vLLM starts (EngineCore and its workers)."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have the kernel end this process as soon as the one that started it is gone.

    vLLM's EngineCore has no such tie: after a SIGKILL of its replica it keeps the GPU
    (vllm#55510). vLLM calls this as a plugin in every process; it acts only in those that
    ``multiprocessing`` started, never in the replica itself.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent.pid:  # it died before the call
        os._exit(1)

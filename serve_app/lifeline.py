"""Processes that end with their parent, even if the parent is killed (``kill -9``).

There are three ways. A command that we start gets a Ctrl-C from the kernel, and ends by itself what
it has started (:func:`interrupt_with_parent`). Processes that we spawn (vLLM's engine and its
workers) are killed by the kernel (:func:`tie_children`): at once, even while a library holds the
interpreter's lock. Processes that Ray starts (replicas, and vLLM's workers on Ray) watch their
parent (:func:`exit_with_parent`): the kernel ties a process to the thread that started it, and that
thread is inside Ray.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from functools import cache
from multiprocessing import spawn
from typing import Any


@cache  # once in a process
def exit_with_parent() -> None:
    """End this process within a second of its parent's end, whatever it is doing.

    For processes that Ray started, which outlive a killed raylet.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def interrupt_with_parent() -> None:
    """As a ``preexec_fn``: the kernel sends the command a Ctrl-C as soon as this process is gone.

    It also ends an inherited deafness: what runs in the background ignores Ctrl-C.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def tie_children() -> None:
    """Have the kernel end the processes that this one spawns as soon as this one is gone.

    Without this, vLLM's EngineCore keeps the GPU after a SIGKILL of its replica (vllm#55510). The
    tie is the child's first statement. A child's own children are tied if the child calls this too.
    """
    plain = spawn.get_command_line
    if plain.__module__ == __name__ or not sys.platform.startswith("linux"):
        return

    def tied(**kwargs: Any) -> list[str]:
        command: list[str] = plain(**kwargs)
        program = command.index("-c") + 1
        # If the parent died before the tie, the kernel sends no signal.
        command[program] = (
            "import ctypes, os; "
            f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {signal.SIGKILL:d}, 0, 0, 0); "
            f"os.getppid() == {os.getpid()} or os._exit(1); {command[program]}"
        )
        return command

    spawn.get_command_line = tied

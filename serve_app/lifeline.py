"""Processes that end with the one that started them.

Three ways, because who starts a process differs. Ray's workers are children of the raylet and
look at it (:func:`exit_with_parent`). What vLLM spawns is tied by the kernel, in its first
statement (:func:`tie_children`) and again from inside (:func:`die_with`).
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
    """End this process within a second of its parent, whatever it is doing.

    For what Ray started, whose parent is the raylet: it outlives a raylet that was killed.
    Not the kernel's way (PR_SET_PDEATHSIG), which is about the thread that started a process, and
    that one is inside Ray.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def tie_children() -> None:
    """Have the kernel end what this process spawns as soon as this process is gone.

    :func:`prepare` does it from inside, but only when the child has imported vLLM, and until then
    an orphan would live on for as long as that takes. This does it in the child's first statement.
    """
    plain = spawn.get_command_line
    if plain.__module__ == __name__ or not sys.platform.startswith("linux"):
        return

    def tied(**kwargs: Any) -> list[str]:
        command: list[str] = plain(**kwargs)
        program = command.index("-c") + 1
        # As in die_with.
        command[program] = (
            "import ctypes, os; "
            f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {signal.SIGKILL:d}, 0, 0, 0); "
            f"os.getppid() == {os.getpid()} or os._exit(1); {command[program]}"
        )
        return command

    spawn.get_command_line = tied


def die_with(parent: int | None) -> None:
    """Have the kernel end this process as soon as the one that started it is gone.

    vLLM's EngineCore has no such tie: after a SIGKILL of its replica it keeps the GPU
    (vllm#55510).
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)

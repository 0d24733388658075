"""Processes that die with their parent, also with one that was killed (``kill -9``).

Whoever starts a process decides how. What we spawn ourselves, vLLM's engine and its workers, the
kernel ends (:func:`tie_children`): at once, and also while a library holds the interpreter's lock.
What Ray starts, a replica and vLLM's workers on Ray, looks at its parent by itself
(:func:`exit_with_parent`): the kernel's tie is to the thread that started a process, and that one
is inside Ray.
"""

from __future__ import annotations

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

    For what Ray started: it outlives a raylet that was killed.
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

    vLLM's EngineCore has no such tie: after a SIGKILL of its replica it keeps the GPU
    (vllm#55510). The tie is the child's first statement. What a child spawns in its turn is tied
    where the child calls this too.
    """
    plain = spawn.get_command_line
    if plain.__module__ == __name__ or not sys.platform.startswith("linux"):
        return

    def tied(**kwargs: Any) -> list[str]:
        command: list[str] = plain(**kwargs)
        program = command.index("-c") + 1
        # The parent may have died before the tie, and then nobody sends the signal.
        command[program] = (
            "import ctypes, os; "
            f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {signal.SIGKILL:d}, 0, 0, 0); "
            f"os.getppid() == {os.getpid()} or os._exit(1); {command[program]}"
        )
        return command

    spawn.get_command_line = tied

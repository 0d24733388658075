"""What is done inside the processes that vLLM starts (EngineCore and its workers).

vLLM calls :func:`prepare` there as a plugin (``vllm.general_plugins`` in pyproject.toml).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from serve_app.processes import exit_with_parent

START_FOLDER = "SERVE_APP_START_FOLDER"
"""Environment variable: the folder in which processes tell the replica of the engine's start."""

REASON = "reason"
"""File in it: why a process could not start."""

PHASE = "phase"
"""File in it: what the engine is doing now."""

LINES = {
    "Initializing a V1 LLM engine": "starting the workers",
    "Starting to load model": "loading weights",
    "Loading model from scratch": "loading weights",
    "Using model weights format": "downloading weights",
    "Time spent downloading weights": "loading weights",
    "Filesystem type for checkpoints": "loading weights",
    "Loading weights took": "profiling memory",
    "Model loading took": "profiling memory",  # with dummy weights there is only this one
    "Start compiling function": "compiling",
    "Using cache directory: %s for vLLM's torch.compile": "compiling",
    "Warming up model for the compilation": "compiling",
    "torch.compile took": "profiling memory",
    "GPU KV cache size": "warming up",
    "CG Capture": "capturing CUDA graphs",
    "Rank %d: Torch profiler disabled for CUDA graph capture": "capturing CUDA graphs",
    "Graph capturing finished": "warming up",
    "init engine": "starting the server",
}
"""How those lines of vLLM 0.29's log begin that begin a phase of its start, and the phase."""

# Some of these lines are for debugging. vLLM's own handler still drops them.
_DETAILS = (
    "vllm.compilation.decorators",
    "vllm.model_executor.model_loader.weight_utils",
    "vllm.v1.worker.gpu.cudagraph_utils",
)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# vLLM logs the reason there, and raises only "initialization failed" in the parent.
_LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")


def prepare() -> None:
    """Tie this process to its parent, and have its start and the reason of a failure written down.

    Called by vLLM in every process, also in those that are not ours (a `vllm serve` of the same
    environment). The replica itself and workers that Ray started are children of the raylet: the
    kernel's tie is not for them, and why they fail reaches the replica as an exception.
    """
    folder = Path(os.environ.get(START_FOLDER, os.devnull))
    logging.getLogger("vllm").addHandler(_Phase(folder / PHASE))
    for name in _DETAILS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    parent = multiprocessing.parent_process()
    if parent is None:
        if START_FOLDER in os.environ:
            exit_with_parent()
        return
    _die_with(parent.pid)
    tie_children()
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(_FirstError(folder / REASON))


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
        # As in _die_with.
        command[program] = (
            "import ctypes, os; "
            f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {signal.SIGKILL:d}, 0, 0, 0); "
            f"os.getppid() == {os.getpid()} or os._exit(1); {command[program]}"
        )
        return command

    spawn.get_command_line = tied


def _die_with(parent: int | None) -> None:
    """Have the kernel end this process as soon as the one that started it is gone.

    vLLM's EngineCore has no such tie: after a SIGKILL of its replica it keeps the GPU
    (vllm#55510).
    """
    if sys.platform.startswith("linux"):
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
            # It exists already, or the start is over.
            with contextlib.suppress(OSError), self._path.open("x") as file:
                file.write(f"{type(error).__name__}: {error}")


class _Phase(logging.Handler):
    """Writes to a file which phase a line of vLLM's log begins."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        for line, phase in LINES.items():
            if str(record.msg).startswith(line):
                with contextlib.suppress(OSError):  # the start is over, or its folder elsewhere
                    self._path.write_text(phase)

"""Runs inside the processes that vLLM starts (EngineCore and its workers).

vLLM calls :func:`prepare` there as a plugin (``vllm.general_plugins`` in pyproject.toml).
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
from pathlib import Path

from serve_app import lifeline
from serve_app.replica import clients, slot
from serve_app.replica.start import memory

START_FOLDER = "SERVE_APP_START_FOLDER"
"""Environment variable: the folder in which processes tell the replica of the engine's start."""

REASON = "reason"
"""File in it: why a process could not start."""

PHASE = "phase"
"""File in it: what the engine is doing now."""

MEMORY = "memory"
"""File in it: vLLM's lines about a GPU's memory."""

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
"""Phases of a start, by the beginning of the line of vLLM 0.29's log that opens each."""

# Some of these lines have level DEBUG. vLLM's own handler still drops them.
_DETAILS = (
    "vllm.compilation.decorators",
    "vllm.model_executor.model_loader.weight_utils",
    "vllm.v1.worker.gpu.cudagraph_utils",
)

# vLLM logs the reason there, and raises only "initialization failed" in the parent.
_LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")


def prepare() -> None:
    """Tie this process's life to its parent's, and note the phases and errors of its start.

    vLLM calls this in every process that it starts, a `vllm serve` in the same Python environment
    included; those are left alone. Ours are known by an environment variable, which vLLM passes to
    all processes of an engine, also on other nodes.
    """
    if START_FOLDER not in os.environ:
        return
    folder = Path(os.environ[START_FOLDER])
    logging.getLogger("vllm").addHandler(_Phase(folder / PHASE))
    logging.getLogger("vllm").addHandler(_Memory(folder / MEMORY))
    for name in _DETAILS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    if multiprocessing.parent_process() is None:
        # The replica itself, or a worker that Ray started: its error reaches the replica as an
        # exception.
        lifeline.exit_with_parent()
        return
    lifeline.tie_children()
    clients.prepare()
    if slot.TURN_ENV in os.environ:
        (folder / PHASE).write_text("queued for its turn on the GPU")
    slot.prepare()
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(_FirstError(folder / REASON))


class _FirstError(logging.Handler):
    """Writes the first logged exception to a file. Later ones follow from the first."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            # The file exists already, or the start is over and its folder gone.
            with contextlib.suppress(OSError), self._path.open("x") as file:
                file.write(f"{type(error).__name__}: {error}")


class _Phase(logging.Handler):
    """Writes the phase that vLLM's log has come to into a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        for line, phase in LINES.items():
            if str(record.msg).startswith(line):
                with contextlib.suppress(OSError):  # the start is over, or on another node
                    self._path.write_text(phase)


class _Memory(logging.Handler):
    """Keeps the lines of :mod:`serve_app.replica.start.memory` in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith(memory.LINES):
            with contextlib.suppress(OSError), self._path.open("a") as file:
                file.write(record.getMessage() + "\n")

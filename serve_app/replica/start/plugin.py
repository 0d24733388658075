"""What is done inside the processes that vLLM starts (EngineCore and its workers).

vLLM calls :func:`prepare` there as a plugin (``vllm.general_plugins`` in pyproject.toml).
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
from pathlib import Path

from serve_app import lifeline

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

# vLLM logs the reason there, and raises only "initialization failed" in the parent.
_LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")


def prepare() -> None:
    """Have this process end with its parent, and write down its start and why that failed.

    Called by vLLM in every process of it, also in those that are not ours (a `vllm serve` of the
    same environment): these are left alone. vLLM hands the environment on to all processes of an
    engine, also to those on other nodes.
    """
    if START_FOLDER not in os.environ:
        return
    folder = Path(os.environ[START_FOLDER])
    logging.getLogger("vllm").addHandler(_Phase(folder / PHASE))
    for name in _DETAILS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    if multiprocessing.parent_process() is None:
        # The replica itself, or a worker that Ray started. Why one fails reaches the replica as
        # an exception.
        lifeline.exit_with_parent()
        return
    lifeline.tie_children()
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(_FirstError(folder / REASON))


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

"""A GPU with room for one model, for vLLM's CPU engine, whose sleep frees nothing.

It stands in for vLLM's CPUWorker where that would use a GPU's memory: what a model takes is the
lock of a file, which the kernel frees with its process, as a driver does memory. Who finds it taken
is out of memory. Sleeping and waking take a while, so that a test can come in between.

EngineCore loads it as a plugin of vLLM's (:func:`environment`).
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

_FOLDER = "GPU_STAND_IN_FOLDER"
STEP_S = 1.5
"""Seconds that a sleep or a wake takes."""


def environment(folder: Path) -> dict[str, str]:
    """``env`` of a model on this GPU; ``folder`` gets its files."""
    package = folder / "gpu_stand_in-1.dist-info"
    package.mkdir(exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: gpu_stand_in\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ngpu_stand_in = harness.gpu_stand_in:prepare\n"
    )
    tests = Path(__file__).parents[1]
    paths = [str(folder), str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    return {_FOLDER: str(folder), "PYTHONPATH": ":".join(filter(None, paths))}


def phase(folder: Path, engine: int) -> str:
    """What an engine does, by its pid: ``loading``, ``awake``, ``sleeping``, ``asleep`` or
    ``waking``; empty before that."""
    file = folder / str(engine)
    return file.read_text() if file.exists() else ""


def out_of_memory(folder: Path) -> list[str]:
    """Whoever was."""
    file = folder / "out of memory"
    return file.read_text().splitlines() if file.exists() else []


def prepare() -> None:
    if _FOLDER not in os.environ or not multiprocessing.current_process().name.startswith("Engine"):
        return
    from vllm.v1.worker.cpu_worker import CPUWorker

    gpu = _GPU(Path(os.environ[_FOLDER]))
    worker: Any = CPUWorker
    load = worker.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        gpu.says("loading")
        gpu.take()
        load(self, *args, **kwargs)
        gpu.says("awake")

    def sleep(self: Any, level: int = 1) -> None:
        gpu.says("sleeping")
        time.sleep(STEP_S)
        gpu.free()
        gpu.says("asleep")

    def wake_up(self: Any, tags: Any = None) -> None:
        gpu.says("waking")
        gpu.take()
        time.sleep(STEP_S)
        gpu.says("awake")

    worker.load_model, worker.sleep, worker.wake_up = load_model, sleep, wake_up


class _GPU:
    """As one engine has it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._memory: int | None = None

    def says(self, phase: str) -> None:
        file = self._folder / f"{os.getpid()}.new"
        file.write_text(phase)
        file.rename(file.with_suffix(""))

    def take(self) -> None:
        file = os.open(self._folder / "gpu", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with (self._folder / "out of memory").open("a") as told:
                told.write(f"{os.getpid()}\n")
            raise RuntimeError("out of memory") from None
        self._memory = file

    def free(self) -> None:
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

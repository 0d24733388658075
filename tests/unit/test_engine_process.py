"""What is done inside vLLM's processes, without an engine in them."""

from __future__ import annotations

import ast
import importlib.util
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.processes import eventually, title

from serve_app.replica.start import memory, plugin
from serve_app.replica.start.plugin import LINES, MEMORY, PHASE, START_FOLDER

# --- phases of a start ---------------------------------------------------------------------------


@pytest.fixture
def vllm_logger() -> Iterator[logging.Logger]:
    """The logger above all of vLLM's, as it was afterwards."""
    logger = logging.getLogger("vllm")
    handlers, level = list(logger.handlers), logger.level
    logger.setLevel(logging.INFO)
    yield logger
    logger.handlers = handlers
    logger.setLevel(level)


def test_a_line_of_vllms_log_is_noted_as_its_phase(
    vllm_logger: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(START_FOLDER, str(tmp_path))
    plugin.prepare()
    noted = []
    loader = logging.getLogger("vllm.model_executor.model_loader.weight_utils")
    for say, line, *args in (
        (vllm_logger.info, "Starting to load model %s...", "org/model"),
        (loader.debug, "Using model weights format %s", ["*.safetensors"]),
        (loader.info, "Filesystem type for checkpoints: %s.", "EXT4"),
        (vllm_logger.info, "nothing about the start"),
        (vllm_logger.info, "init engine (profile, create kv cache, warmup model) took %.2f s", 9.0),
    ):
        say(line, *args)
        noted.append((tmp_path / PHASE).read_text())
    assert noted == [
        "loading weights",
        "downloading weights",
        *["loading weights"] * 2,
        "starting the server",
    ]


def test_a_line_after_the_start_is_no_error(
    vllm_logger: logging.Logger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(START_FOLDER, str(tmp_path / "deleted"))
    plugin.prepare()
    vllm_logger.info("Starting to load model %s...", "org/model")
    assert "Error" not in capsys.readouterr().err
    assert not (tmp_path / "deleted").exists()


def vllm_folder() -> Path:
    """Where vLLM is installed; importing it takes seconds."""
    found = importlib.util.find_spec("vllm")
    assert found and found.origin
    return Path(found.origin).parent


def test_the_installed_vllm_still_has_every_line() -> None:
    root = vllm_folder()
    code = "".join(
        file.read_text()
        for folder in ("v1/engine", "v1/core", "v1/worker", "compilation", "model_executor")
        for file in (root / folder).glob("model_loader/*.py" if "exec" in folder else "**/*.py")
    )
    assert [line for line in LINES if f'"{line}' not in code] == []


def test_the_installed_vllm_still_logs_there() -> None:
    for name in (*plugin._DETAILS, *plugin._LOGGERS):
        file = vllm_folder().parent.joinpath(*name.split(".")).with_suffix(".py")
        assert "logger = init_logger(__name__)" in file.read_text()


# --- the memory of a GPU -------------------------------------------------------------------------

LOADED = "Model loading took %s GiB memory and %.6f seconds"


def told_at_the_end() -> str:
    """The line of the installed vLLM after the start, with a number for each that it fills in."""
    code = (vllm_folder() / "v1/worker/gpu_worker.py").read_text()
    texts = [it.values for it in ast.walk(ast.parse(code)) if isinstance(it, ast.JoinedStr)]
    numbers = (f"{n}.25" for n in range(1, 100))
    (found,) = (
        "".join(v.value if isinstance(v, ast.Constant) else next(numbers) for v in values)
        for values in texts
        if isinstance(values[0], ast.Constant)
        and str(values[0].value).startswith("Free memory on device (")
    )
    return found


def test_vllms_lines_tell_what_is_in_a_gpus_memory(
    vllm_logger: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(START_FOLDER, str(tmp_path))
    plugin.prepare()
    folder = vllm_folder() / "v1/worker"
    for file in ("gpu_model_runner.py", "gpu/model_runner.py"):
        assert f'"{LOADED}"' in (folder / file).read_text()
    line = told_at_the_end()  # free 1.25, all 2.25, utilization 3.25, of all 4.25, …
    assert line.startswith("Free memory on device (1.25/2.25 GiB) on startup")
    vllm_logger.info(LOADED, "0.5", 3.0)
    vllm_logger.info("nothing about memory")
    assert memory.read(tmp_path / MEMORY, 2) is None  # it is not over
    for free in ("1.25", "99.25"):  # a second worker
        vllm_logger.info(line.replace("(1.25/", f"({free}/"))
    graphs, kv_cache = 7.25, float(line.split()[-2])
    assert "7.25 GiB for CUDAGraph memory" in line
    parts = {"weights": 0.5, "kv_cache": kv_cache, "graphs": graphs, "other": 0.0}
    assert memory.read(tmp_path / MEMORY, 2) == {"gpu_gib": 2.25, "gpus": 2, "parts": parts}


def test_what_remains_of_the_memory_that_vllm_may_use_is_for_other_things(tmp_path: Path) -> None:
    file = tmp_path / MEMORY
    assert memory.read(file, 1) is None
    file.write_text(
        "Model loading took 16.1 GiB memory and 9.000000 seconds\n"
        "Free memory on device (78.6/79.2 GiB) on startup. Desired GPU memory utilization is "
        "(0.9, 71.28 GiB). Actual usage is 17.0 GiB for consumed memory (weights + non-torch), 1.5 "
        "GiB for peak activation, and 0.6 GiB for CUDAGraph memory. Replace … Current kv cache "
        "memory in use is 52.78 GiB.\n"
    )
    found = memory.read(file, 1)
    assert found is not None
    assert found["parts"] == {"weights": 16.1, "kv_cache": 52.78, "graphs": 0.6, "other": 1.8}


# --- the tie to the parent -----------------------------------------------------------------------

PARENT = """
import multiprocessing, time
from serve_app.lifeline import tie_children
tie_children()
tie_children()
child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
child.start()
print(child.pid, flush=True)
child.join()
"""


def test_a_spawned_process_dies_with_its_parent_before_it_has_imported_anything() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout
        child = int(parent.stdout.readline())
        assert eventually(lambda: "multiprocessing-fork" in title(child))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    try:
        assert eventually(lambda: not title(child))
    finally:
        if title(child):
            os.kill(child, signal.SIGKILL)


ENGINE = """
import ctypes, logging, multiprocessing
from multiprocessing import spawn
from serve_app.replica.start import plugin

def engine():
    plugin.prepare()
    signal = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(signal), 0, 0, 0)  # PR_GET_PDEATHSIG
    handlers = [h for h in logging.getLogger("vllm").handlers if type(h) is plugin._Phase]
    print(spawn.get_command_line.__module__, signal.value, len(handlers), flush=True)

if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=engine)
    child.start()
    child.join()
"""


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({START_FOLDER: "/nowhere"}, "serve_app.lifeline 0 1"),
        ({}, "multiprocessing.spawn 0 0"),
    ],
    ids=["ours", "another"],
)
def test_a_vllm_that_is_not_ours_is_left_alone(environment: dict[str, str], said: str) -> None:
    """A `vllm serve` of the same environment loads the plugin as well."""
    done = subprocess.run(
        [sys.executable, "-c", ENGINE],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == said, done.stderr

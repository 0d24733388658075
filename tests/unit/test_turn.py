"""An engine starts on a shared GPU only into memory that is and stays free; the GPU is played."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.planner import hardware
from serve_app.planner.hardware import CONTEXT_BYTES, GIB, MIB
from serve_app.replica import share
from serve_app.replica.start import gpu, memory, turn
from serve_app.replica.start.gpu import Holder
from serve_app.replica.start.plugin import PHASE, START_FOLDER

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


class PlayedGPU:
    """A GPU whose memory the test takes and returns."""

    uuid = "GPU-played"
    kind = hardware.gpus()["H100"]

    def __init__(self, held: dict[int, int] | None = None) -> None:
        self.held = held or {}

    def free(self) -> int:
        return self.kind.memory_bytes - sum(self.held.values())

    def holders(self) -> list[Holder]:
        return [Holder(pid, size) for pid, size in self.held.items()]


def take(
    device: PlayedGPU,
    folder: Path,
    needed: int = GIB,
    limit_s: float = 60,
    told: Any = None,
    alone: bool = False,
) -> Any:
    return turn.turn(
        device,
        needed,
        model="m",
        limit_s=limit_s,
        tell=(told if told is not None else []).append,
        alone=alone,
        folder=str(folder),
    )


OTHER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from serve_app.planner.hardware import GIB
from serve_app.replica.start import turn
device = SimpleNamespace(uuid="GPU-played", free=lambda: 80 * GIB, holders=list)
with turn.turn(device, int(sys.argv[2]), model="other", limit_s=60, tell=lambda phase: None,
               alone="alone" in sys.argv, folder=sys.argv[1]):
    print("starts", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_starts(folder: Path, part: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Another replica, with such a part of the GPU, whose engine starts during the block."""
    command = [sys.executable, "-c", OTHER, str(folder), str(part), *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "starts\n"
        try:
            yield process
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_free_gpu_is_started_on_at_once(tmp_path: Path) -> None:
    told: list[str] = []
    with take(PlayedGPU(), tmp_path, told=told):
        pass
    assert told == [turn.FIRST]


def test_engines_whose_parts_fit_together_start_side_by_side(tmp_path: Path) -> None:
    with another_starts(tmp_path, 40 * GIB), take(PlayedGPU(), tmp_path, 39 * GIB, limit_s=0):
        pass


def test_what_a_neighbour_has_not_taken_yet_is_not_free(tmp_path: Path) -> None:
    device, told = PlayedGPU(), []
    with another_starts(tmp_path, 50 * GIB) as other:
        ends = threading.Thread(target=lambda: (until(lambda: bool(told)), other.kill()))
        ends.start()
        with take(device, tmp_path, 40 * GIB, told=told):
            assert other.wait(30) == -signal.SIGKILL  # its note is void
        ends.join()
    assert told == [turn.TURN, turn.FIRST]
    assert [path.name for path in tmp_path.iterdir()] == ["serve-app-GPU-played.lock"]


def test_what_a_neighbour_has_taken_of_its_part_is_counted_once(tmp_path: Path) -> None:
    device = PlayedGPU()
    with another_starts(tmp_path, 50 * GIB) as other:
        device.held = {other.pid: 45 * GIB}  # 34.2 are free, of which 5 are still to come
        with take(device, tmp_path, 29 * GIB, limit_s=0):
            pass
        with pytest.raises(UserError), take(device, tmp_path, 30 * GIB, limit_s=0):
            pass


def test_an_engine_that_measures_starts_alone(tmp_path: Path) -> None:
    with (
        another_starts(tmp_path, GIB),
        pytest.raises(UserError),
        take(PlayedGPU(), tmp_path, limit_s=0, alone=True),
    ):
        pass
    with (
        another_starts(tmp_path, GIB, "alone"),
        pytest.raises(UserError),
        take(PlayedGPU(), tmp_path, limit_s=0),
    ):
        pass
    with take(PlayedGPU(), tmp_path, limit_s=0, alone=True):
        pass


def test_starts_on_two_gpus_do_not_wait_for_each_other(tmp_path: Path) -> None:
    device = PlayedGPU()
    device.uuid = "GPU-other"
    with another_starts(tmp_path, 70 * GIB), take(device, tmp_path, 70 * GIB, limit_s=0):
        pass


def test_a_turn_that_does_not_come_ends_in_a_sentence(tmp_path: Path) -> None:
    said = r"'m' did not get its turn .* raise start_timeout_s$"
    with (
        another_starts(tmp_path, 70 * GIB),
        pytest.raises(UserError, match=said),
        take(PlayedGPU(), tmp_path, 40 * GIB, limit_s=0),
    ):
        pass


def test_another_users_lock_can_be_taken(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch(0o444)
    with turn._file(lock) as file:
        assert turn._taken(file)


def test_a_successor_waits_for_its_dead_predecessors_memory(tmp_path: Path) -> None:
    device, told = PlayedGPU({1: 70 * GIB}), []
    dies = threading.Thread(target=lambda: (until(lambda: bool(told)), device.held.clear()))
    dies.start()
    with take(device, tmp_path, needed=40 * GIB, told=told):
        assert device.free() > 40 * GIB
    dies.join()
    assert told == [turn.MEMORY, turn.FIRST]


def test_memory_that_stays_taken_is_told_with_who_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn, "RETURNED_S", 0.0)
    device = PlayedGPU({os.getpid(): 50 * GIB, 4_000_000: 20 * GIB})
    said = (
        rf"^'m' needs 40.0 GiB free on its GPU \(H100\), and 9.2 are, .* held by python\S* "
        rf"\(pid {os.getpid()}, 50.0 GiB\), a process of another container \(pid 4000000, 20.0 GiB"
    )
    with pytest.raises(UserError, match=said), take(device, tmp_path, needed=40 * GIB):
        pass
    with take(device, tmp_path, limit_s=0):  # the turn has been given back
        pass


def test_an_engine_of_ours_is_named_by_its_model() -> None:
    title = "import time; print(flush=True); time.sleep(600)"
    command = ["ray::ServeReplica:bge-m3:ModelServer", "-c", title]
    with subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert gpu.name_of(process.pid) == "'bge-m3'"
        mine = [Holder(process.pid, 5), Holder(os.getpid(), 2), Holder(1, 100)]
        assert gpu.held_by(os.getpid(), mine) == 7
        assert gpu.held_by(os.getpid(), [Holder(process.pid, None)]) is None
        process.kill()


class PlayedNVML:
    """NVIDIA's driver with one GPU, as ``pynvml`` shows it."""

    asked: Any = None

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.asked = index
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked = uuid
        return "handle"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return "GPU-1"

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return type("Memory", (), {"total": 81559 * MIB, "free": 81000 * MIB})

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        process = type("Process", (), {"pid": 7, "usedGpuMemory": None})
        larger = type("Process", (), {"pid": 8, "usedGpuMemory": 9})
        return [process, larger]


@pytest.mark.parametrize(
    ("visible", "asked"), [(None, 0), ("3,4", 3), ("GPU-abc", "GPU-abc"), ("MIG-x", "MIG-x")]
)
def test_the_gpu_is_the_one_that_ray_shows_the_replica(visible: str | None, asked: Any) -> None:
    nvml = PlayedNVML()
    device = gpu._Nvidia(nvml, visible)
    assert nvml.asked == asked and device.uuid == "GPU-1"
    assert device.kind is hardware.gpus()["H100"]
    assert device.free() == 81000 * MIB
    assert device.holders() == [Holder(8, 9), Holder(7, None)]


def config(**resources: Any) -> ModelConfig:
    engine = {"max_model_len": 8192}
    return ModelConfig.model_validate({"model": LLAMA, "engine": engine, "resources": resources})


def test_a_replica_waits_for_what_vllm_wants_free_and_its_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(START_FOLDER, str(tmp_path))
    monkeypatch.setattr(turn, "LOCKS", str(tmp_path))
    monkeypatch.setattr(turn, "RETURNED_S", 0.0)
    part = share.of(config(gpu_share=0.5), PlayedGPU())
    assert part is not None and part.budget == int(0.5 * PlayedGPU.kind.memory_bytes)
    assert part.arguments.keys() == {"gpu_memory_utilization", "kv_cache_memory_bytes"}
    with share.turn(part, config(gpu_share=0.5)):
        assert (tmp_path / PHASE).read_text() == turn.FIRST
    part.device.held[4_000_000] = part.budget  # type: ignore[attr-defined]
    with share.turn(part, config(gpu_share=0.5)):
        pass
    part.device.held[4_000_000] += CONTEXT_BYTES  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"needs 39\.6 GiB free"), share.turn(part, config()):
        pass
    assert (tmp_path / PHASE).read_text() == turn.MEMORY


def test_what_the_engine_holds_is_told_beside_its_part(tmp_path: Path) -> None:
    device = PlayedGPU({os.getpid(): 39 * GIB, 4_000_000: 20 * GIB})
    part = share.of(config(gpu_share=0.5), device)
    assert part is not None and part.held == 39 * GIB
    file = tmp_path / "memory"
    file.write_text("Model loading took 15.0 GiB memory and 9.0 seconds\n")
    assert part.described(memory.of_part(file, 22 * GIB, part.taken)) == {
        "gpu": "GPU-played",
        "gpu_gib": 79.18,
        "part_gib": 39.59,
        "gpus": 1,
        "parts": {"weights": 15.0, "kv_cache": 22.0, "other": 2.0},
    }
    device.held = {4_000_000: 20 * GIB}  # in a container: its number there is not known here
    assert part.held is None and part.taken == part.budget


async def test_an_engine_beyond_its_part_is_watched_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(share, "WATCH_S", 0.01)
    monkeypatch.setattr(share.logger, "propagate", True)
    device, front_ends = PlayedGPU(), SimpleNamespace(over_plan=0)
    part = share.of(config(gpu_share=0.5), device)
    assert part is not None
    watch = asyncio.create_task(share.watch(part, cast(Any, front_ends)))

    async def until_over(size: int) -> None:
        async with asyncio.timeout(30):
            while front_ends.over_plan != size:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    device.held = {os.getpid(): part.budget + GIB}
    await until_over(GIB)
    device.held = {os.getpid(): part.budget}
    await until_over(0)
    watch.cancel()
    [said] = {one for it in caplog.records if "beyond its part" in (one := it.getMessage())}
    assert said.startswith("this engine holds 1.00 GiB of its GPU beyond its part of 39.59 GiB")


def test_a_replica_with_whole_gpus_waits_for_nothing() -> None:
    assert share.of(config(), PlayedGPU()) is None


def test_what_cannot_be_planned_is_measured() -> None:
    unknown = config(gpu_share=0.5).model_copy(update={"model": "/no/such/model"})
    part = share.of(unknown, PlayedGPU())
    assert part is not None and part.arguments.keys() == {"gpu_memory_utilization"}
    assert part.measures
    given = config(gpu_share=0.5).model_copy(
        update={"model": "/no/such/model", "engine": {"kv_cache_memory_bytes": 2 * GIB}}
    )
    part = share.of(given, PlayedGPU())
    assert part is not None and not part.measures
    planned = share.of(config(gpu_share=0.5), PlayedGPU())
    assert planned is not None and not planned.measures


def test_a_part_needs_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "given", lambda: None)
    with pytest.raises(UserError, match="gpu_share needs an NVIDIA GPU"):
        share.of(config(gpu_share=0.5))

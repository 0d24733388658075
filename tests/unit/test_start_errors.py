"""Why an engine did not start, from what vLLM, the hub and Ray really say."""

from __future__ import annotations

import gc
import os
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import spawn
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve_app.cluster import progress
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.replica.start import supervision
from serve_app.replica.start.errors import explain, too_slow
from serve_app.replica.start.plugin import REASON, START_FOLDER
from serve_app.replica.start.supervision import supervised

MODEL = ModelConfig.model_validate({"model": "org/model", "engine": {"max_num_seqs": 64}})

# As Ray 2.60 sent it on an H200, shortened in the middle.
FROM_A_WORKER = (
    "RayTaskError(ValueError): \x1b[36mray::RayWorkerProc.initialize_worker()\x1b[39m (pid=5208, "
    "ip=127.0.0.1, repr=<vllm.v1.executor.ray_executor_v2.RayWorkerProc object at 0x7f77>)\n"
    "           ^^^^^^^^^^^^^^^^^^^^^\n"
    '  File "/site/vllm/v1/executor/ray_executor_v2.py", line 185, in initialize_worker\n'
    "    super().__init__(\n"
    "ValueError: {}"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
            "'org/model' does not fit: the GPU ran out of memory while it loaded; raise "
            "tensor_parallel_size (now 1), use a quantized checkpoint, or lower max_num_seqs "
            "(now 64) and max_model_len (now the model's own)",
        ),
        (
            FROM_A_WORKER.format(
                "Free memory on device cuda:0 (83.35/139.8 GiB) on startup is less than desired "
                "GPU memory utilization (0.92, 128.62 GiB). Decrease GPU memory utilization or "
                "reduce GPU memory used by other processes."
            ),
            "another process holds memory of the GPU that 'org/model' was given; end it "
            "(nvidia-smi names it), or lower gpu_memory_utilization (now 0.92)",
        ),
        (
            "OSError: Repo id must use alphanumeric chars, '-', '_' or '.'. The name cannot start "
            "or end with '-' or '.' and the maximum length is 96: '/nowhere'.",
            "'org/model' is neither a folder on this node nor a model that the hub shows; check "
            "the spelling, and if it is private or gated set HF_TOKEN where Ray runs (on EKS: the "
            "secret that the RayService refers to)",
        ),
        (
            "OutOfMemoryError: Task was killed due to the node running low on memory.\n"
            "Memory on the node was 30.8GB / 31.0GB (0.99)",
            "the node ran out of host memory while 'org/model' loaded; set resources.memory_gib to "
            "what it needs, so that it gets a node with as much, or give the nodes more",
        ),
        (
            FROM_A_WORKER.format(
                "NCCL error: unhandled system error. Last error: Error while creating shared "
                "memory segment /dev/shm/nccl-Ab12 (size 9637892), error: No space left on device"
            ),
            "/dev/shm of the node is too small for the workers of 'org/model' "
            "(tensor_parallel_size 1); make it larger (in a pod: an emptyDir with medium: Memory "
            "mounted there)",
        ),
        (
            "ActorDiedError: The actor died unexpectedly before finishing this task.\n"
            "\tclass_name: RayWorkerProc\n\tactor_id: ab12\nThe actor is dead because its worker "
            "process has died. Worker exit type: SYSTEM_ERROR",
            "a worker of 'org/model' died while it loaded; mostly the node ran out of host memory "
            "(dmesg says so: set resources.memory_gib), else its log on that node has the reason",
        ),
        (
            "ValueError: To serve at least one request with the models's max seq len (131072), "
            "(16.0 GiB KV cache is needed, which is larger than the available KV cache memory "
            "(9.21 GiB). Based on the available memory, the estimated maximum model length is",
            "the KV cache of 'org/model' cannot hold one request of max_model_len (now the model's "
            "own); lower it, or raise gpu_memory_utilization (now 0.92) or tensor_parallel_size "
            "(now 1); serve-app plan says what fits",
        ),
        (
            FROM_A_WORKER.format("something nobody has seen"),
            "the engine of 'org/model' did not start: ValueError: something nobody has seen",
        ),
    ],
)
def test_the_sentence_that_matters(error: str, said: str) -> None:
    assert explain(error, MODEL) == said


def test_a_start_that_was_broken_off_says_what_it_was_doing() -> None:
    said = too_slow("loading weights", MODEL)
    assert said.startswith(
        "'org/model' did not start within start_timeout_s (3600 s); it was loading weights; "
    )


@pytest.mark.parametrize(
    "error",
    [
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "ValueError: No available memory for the cache blocks.",
        "ValueError: … cache is needed, which is larger than the available KV cache memory",
    ],
)
def test_a_part_of_a_gpu_is_what_is_too_small(error: str) -> None:
    part = ModelConfig.model_validate({"model": "m", "resources": {"gpu_share": 0.3}})
    said = explain(error, part)
    assert "give it a larger part of the GPU (resources.gpu_share)" in said
    assert "tensor_parallel_size" not in said and "gpu_memory_utilization" not in said


def test_a_long_unknown_error_is_cut_on_one_line() -> None:
    said = explain("RuntimeError: a\nb " + "x" * 2000, MODEL)
    assert said.startswith("the engine of 'org/model' did not start: RuntimeError: a b xxx")
    assert "\n" not in said
    assert len(said) < 700


# --- the start as a whole ------------------------------------------------------------------------


def supervise(monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[None]:
    monkeypatch.setattr(spawn, "get_command_line", spawn.get_command_line)  # it is changed
    monkeypatch.setenv(START_FOLDER, "")
    monkeypatch.setattr(progress, "publish", lambda replica, phase: None)
    monkeypatch.setattr(progress, "forget", lambda replicas: None)
    return supervised(MODEL, "m", "r1")


def test_the_garbage_collector_rests_during_the_start_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with supervise(monkeypatch):
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(UserError), supervise(monkeypatch):
        raise RuntimeError
    assert gc.isenabled()


def test_a_failed_start_says_what_vllm_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(UserError, match="does not fit: the GPU ran out of memory"),
        supervise(monkeypatch),
    ):
        raise RuntimeError("CUDA out of memory")


def test_a_failed_start_says_what_the_engines_process_left_word_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        pytest.raises(UserError, match="no space is left on the disk"),
        supervise(monkeypatch),
    ):
        Path(os.environ[START_FOLDER], REASON).write_text("OSError: No space left on device")
        raise RuntimeError("Engine core initialization failed")
    assert not Path(os.environ[START_FOLDER]).exists()


def test_a_start_that_was_broken_off_says_that_it_took_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overdue = nullcontext(SimpleNamespace(overdue=True))
    monkeypatch.setattr(supervision, "StartWatch", lambda *_: overdue)
    with pytest.raises(UserError, match="did not start within"), supervise(monkeypatch):
        raise RuntimeError("Engine core initialization failed")


def test_our_own_sentence_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^rank 0 did not start$"), supervise(monkeypatch):
        raise UserError("rank 0 did not start")

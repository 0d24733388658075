"""What vLLM keeps in host memory in place of a GPU's, and the drafts that a checkpoint holds."""

from __future__ import annotations

from typing import Any

import pytest
from harness.models import LLAMA, kept, model, plan

from serve_app.config.settings import ModelConfig
from serve_app.planner import ec2, pods, report
from serve_app.planner.hardware import GIB
from serve_app.planner.vllm.memory import Plan

LLAMA_70B = "meta-llama/Llama-3.3-70B-Instruct"
LAYER = 2 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336 + 2 * 4096)
"""Bytes of a layer of an 8B."""


def of_8b(**arguments: Any) -> Plan:
    return plan(model(LLAMA), "L40S", max_model_len=8192, **arguments)


def test_weights_move_until_the_size_is_reached_and_give_room_to_the_kv_cache() -> None:
    base, moved = of_8b(), of_8b(cpu_offload_gb=4)
    gone = base.tightest.weights - moved.tightest.weights
    assert 4 * GIB <= gone < 4 * GIB + LAYER
    assert moved.host_bytes == gone
    assert moved.tightest.kv_cache - base.tightest.kv_cache == gone
    assert base.host_bytes == 0


def test_only_layers_move_and_only_what_is_named() -> None:
    everything = of_8b(cpu_offload_gb=100)
    assert everything.host_bytes == pytest.approx(32 * LAYER, rel=1e-4)
    named = of_8b(cpu_offload_gb=100, cpu_offload_params=["mlp"])
    assert named.host_bytes == pytest.approx(32 * 2 * 3 * 4096 * 14336, rel=1e-4)


def test_each_gpu_moves_its_own() -> None:
    of = kept(LLAMA_70B)
    found = plan(of, tensor_parallel_size=2, pipeline_parallel_size=2, cpu_offload_gb=3)
    assert found.host_bytes / GIB == pytest.approx(4 * 3, rel=0.1)


def test_groups_of_layers_leave_buffers_for_those_that_are_fetched_ahead() -> None:
    base = of_8b()
    found = of_8b(offload_group_size=8, offload_num_in_group=2, offload_prefetch_step=2)
    assert found.host_bytes == pytest.approx(8 * LAYER, rel=1e-4)
    gone = base.tightest.weights - found.tightest.weights
    assert gone == pytest.approx(6 * LAYER, rel=1e-4)


def test_the_kv_cache_that_is_kept_in_host_memory_is_of_the_engine_not_of_a_gpu() -> None:
    of = kept("Qwen/Qwen3-30B-A3B")
    base = plan(of, tensor_parallel_size=2, max_model_len=8192)
    found = plan(of, tensor_parallel_size=2, max_model_len=8192, kv_offloading_size=64)
    assert found.tightest == base.tightest
    assert found.host_bytes == 64 * GIB
    ranks = {"data_parallel_size": 2, "enable_expert_parallel": True}
    found = plan(of, max_model_len=8192, kv_offloading_size=64, **ranks)
    assert found.host_bytes == 2 * 64 * GIB
    other = plan(of, max_model_len=8192, kv_offloading_size=64, kv_offloading_backend="lmcache")
    assert other.host_bytes == 0  # of LMCache's own process


def test_a_machine_must_have_the_host_memory() -> None:
    def machines(gib: int) -> Any:
        engine = {"kv_offloading_size": gib}
        return ec2.machines(of_8b(**engine), ModelConfig(model="org/model", engine=engine))

    few, _ = machines(4)
    many, refused = machines(200)
    assert "g6e.xlarge" in {m.instance.name for m in few}
    assert "g6e.xlarge" not in {m.instance.name for m in many}
    [why] = [one.reason for one in refused if one.name == "g6e.xlarge"]
    assert "takes 2 cores and 220 GiB" in why


def test_a_pod_has_the_host_memory() -> None:
    plain = ModelConfig(model="org/model")
    pinning = ModelConfig(model="org/model", engine={"cpu_offload_gb": 10, "kv_offloading_size": 5})
    assert pods.memory_gib(pinning, 2, 8) - pods.memory_gib(plain, 2, 8) == 2 * 10 + 2 * 5


MTP = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}


@pytest.mark.parametrize(
    ("name", "tp", "gib"),
    [
        # A layer of 256 experts in fp8, and the projection of 2 × 7168 in 16 bits.
        ("deepseek-ai/DeepSeek-V3", 8, (256 * 3 * 7168 * 2048 / 8 + 2 * 2 * 7168**2) / GIB),
        # A layer of 512 experts in 16 bits.
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 4, 2 * 512 * 3 * 2048 * 512 / 4 / GIB),
    ],
)
def test_a_draft_in_the_checkpoint_is_counted(name: str, tp: int, gib: float) -> None:
    settings: dict[str, Any] = {"tensor_parallel_size": tp, "max_model_len": 8192}
    base, drafting = plan(kept(name), **settings), plan(kept(name), **settings, **MTP)
    more = drafting.tightest.weights - base.tightest.weights
    assert more / GIB == pytest.approx(gib, rel=0.15)
    assert drafting.kv_bytes_per_token > base.kv_bytes_per_token
    assert not any("MTP" in note for note in report.notes_on(drafting))


def test_a_draft_that_nothing_tells_of_is_said_to_be_left_out() -> None:
    found = plan(model(LLAMA), max_model_len=8192, **MTP)
    assert any("MTP layers' weights are left out" in note for note in report.notes_on(found))

"""The budget of a GPU: vLLM's defaults, and what each engine argument does to it."""

from __future__ import annotations

from typing import Any

import pytest
from harness.models import GEMMA, LLAMA, QWEN3_NEXT, kept, model, plan

from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError
from serve_app.planner import choose, hardware
from serve_app.planner.hardware import GIB
from serve_app.planner.loading import load_model
from serve_app.planner.vllm import defaults, memory

LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize(
    ("gpu", "tokens", "seqs"),
    [("L4", 2048, 256), ("A100-80G", 2048, 256), ("H100", 8192, 1024), ("B200", 16384, 1024)],
)
def test_batch_defaults_depend_on_the_gpu(gpu: str, tokens: int, seqs: int) -> None:
    resolved = defaults.resolve({}, kept(LLAMA_8B).shape, hardware.gpus()[gpu])
    assert (resolved.max_num_batched_tokens, resolved.max_num_seqs) == (tokens, seqs)


def test_cudagraph_sizes_as_vllm_lists_them() -> None:
    h100 = hardware.gpus()["H100"]
    sizes = defaults.cudagraph_sizes({}, h100, 1024, 8192)
    assert len(sizes) == 51  # 1, 2, 4, 8 … 248 by 8, 256 … 512 by 16
    assert sizes[:5] == (1, 2, 4, 8, 16)
    assert sizes[-3:] == (480, 496, 512)
    assert defaults.cudagraph_sizes({}, h100, 8, 8192) == (1, 2, 4, 8, 16)
    assert defaults.cudagraph_sizes({}, hardware.gpus()["B200"], 1024, 16384)[-1] == 1024
    listed = {"cudagraph_capture_sizes": [4, 1, 9999]}
    assert defaults.cudagraph_sizes(listed, h100, 64, 2048) == (1, 4)


def test_the_parts_add_up_to_what_is_requested() -> None:
    found = plan(kept(LLAMA_8B), gpu_memory_utilization=0.9, max_model_len=8192)
    stage = found.tightest
    parts = stage.weights + stage.non_torch + stage.buffers + stage.activation + stage.cudagraph
    assert parts + stage.kv_cache == stage.requested
    assert stage.requested == -(-hardware.gpus()["H200"].memory_bytes * 9 // 10)


def test_graphs_of_decode_steps_are_of_at_most_max_num_seqs() -> None:
    few = plan(kept(LLAMA_8B), max_model_len=8192, max_num_seqs=256)
    assert len(few.engine.cudagraph_sizes) == 51
    many = plan(kept(LLAMA_8B), max_model_len=8192)
    base = memory.CUDAGRAPH_BASE_BYTES
    share = (few.tightest.cudagraph - base) / (many.tightest.cudagraph - base)
    assert share == pytest.approx(35 / 51)  # 1, 2, 4, 8 … 248 by 8, 256


def weights(**arguments: Any) -> int:
    return plan(kept(LLAMA_8B), max_model_len=8192, **arguments).tightest.weights


def test_arguments_change_the_part_they_should() -> None:
    base = plan(kept(LLAMA_8B), max_model_len=8192)
    eager = plan(kept(LLAMA_8B), max_model_len=8192, enforce_eager=True)
    assert eager.tightest.cudagraph == 0 < base.tightest.cudagraph
    fp8_kv = plan(kept(LLAMA_8B), max_model_len=8192, kv_cache_dtype="fp8")
    assert fp8_kv.kv_cache_tokens == pytest.approx(2 * base.kv_cache_tokens, rel=1e-4)
    # An adapter slot of rank 16 beside q, k, v, o, gate, up and down of each layer.
    ranks = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3
    assert weights(enable_lora=True, max_loras=3) - weights() == 3 * 16 * ranks * 32 * 2
    few = plan(kept(LLAMA_8B), max_model_len=8192, max_num_seqs=64)
    assert few.tightest.buffers < base.tightest.buffers


def test_auto_length_is_the_longest_that_fits() -> None:
    found = plan(kept(LLAMA_8B), "L4", max_model_len=-1)
    assert found.fits
    assert 1 <= found.concurrency() < 1.01
    one_more = plan(kept(LLAMA_8B), "L4", max_model_len=found.engine.max_model_len + 16)
    assert not one_more.fits
    assert "max_model_len" in one_more.reasons[0]


def test_a_draft_takes_weights_and_kv_cache() -> None:
    config = ModelConfig(
        model="meta-llama/Llama-3.3-70B-Instruct",
        engine={
            "tensor_parallel_size": 4,
            "max_model_len": 8192,
            "speculative_config": {
                "method": "eagle3",
                "model": "yuhuili/EAGLE3-LLaMA3.3-Instruct-70B",
                "num_speculative_tokens": 3,
            },
        },
    )
    of = load_model(config, offline=True)
    h100 = hardware.gpus()["H100"]
    found = choose.plan_on(of, config.engine, h100)
    alone = choose.plan_on(of, {k: v for k, v in config.engine.items() if "spec" not in k}, h100)
    assert found.kv_bytes_per_token == alone.kv_bytes_per_token + 2 * 2 * 128 * 2  # one layer more
    assert found.tightest.weights - alone.tightest.weights > 0.7 * GIB
    mtp = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    deepseek = kept("deepseek-ai/DeepSeek-V3")
    h200 = plan(deepseek, tensor_parallel_size=8, max_model_len=8192)
    drafting = plan(deepseek, tensor_parallel_size=8, max_model_len=8192, **mtp)
    assert drafting.kv_bytes_per_token == h200.kv_bytes_per_token * 62 // 61


def test_encoders_have_no_kv_cache() -> None:
    found = plan(kept("BAAI/bge-m3"), "L4")
    assert found.fits
    assert found.groups == ()
    assert found.kv_cache_tokens == 0
    assert found.concurrency() == 256
    assert found.engine.dtype == "float16"  # pooling halves float32 to fp16
    assert found.engine.max_num_batched_tokens == 8194  # one prompt in one piece


def test_hybrid_models_grow_their_blocks_to_a_state() -> None:
    found = plan(model(QWEN3_NEXT), tensor_parallel_size=2, max_model_len=32768)
    full = next(group for group in found.groups if group.spec.kind == "full")
    state = next(group for group in found.groups if group.spec.kind == "ssm")
    assert full.spec.block_size > 16
    assert full.spec.page_bytes == state.spec.page_bytes
    assert found.concurrency(65536) < found.concurrency(1024)


def test_expert_parallelism_and_data_parallelism() -> None:
    of = kept("Qwen/Qwen3-30B-A3B")
    both = plan(of, tensor_parallel_size=2, data_parallel_size=4, enable_expert_parallel=True,
                max_model_len=8192)  # fmt: skip
    assert both.parallel.gpus == 8
    alone = plan(of, tensor_parallel_size=2, max_model_len=8192)
    assert both.tightest.weights < alone.tightest.weights / 2
    assert both.kv_cache_tokens > 4 * alone.kv_cache_tokens


def test_weights_on_all_gpus_are_those_of_every_data_parallel_rank() -> None:
    """Experts are split over the ranks; all else is on each of them."""
    of = kept("Qwen/Qwen3-30B-A3B")
    found = plan(of, data_parallel_size=2, enable_expert_parallel=True, max_model_len=8192)
    assert found.weights_on_all_gpus == 2 * found.tightest.weights
    assert found.weights_on_all_gpus / GIB == pytest.approx(59.8, abs=0.05)
    experts = 48 * 128 * 3 * 768 * 2048 * 2
    alone = plan(of, max_model_len=8192).weights_on_all_gpus
    assert found.weights_on_all_gpus == pytest.approx(2 * (alone - experts) + experts, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_model_len": "many"}, "whole number"),
        ({"max_num_seqs": -1}, "at least 1"),
        ({"max_num_seqs": 512, "max_num_batched_tokens": 256}, "max_num_batched_tokens"),
        ({"quantization": "awq"}, "checkpoint"),
        ({"kv_cache_dtype": "turboquant_k8v4"}, "kv_cache_dtype"),
        ({"block_size": 7}, "multiples of 16"),
        ({"tensor_parallel_size": 10**9}, "no cluster"),
    ],
)
def test_bad_values_are_one_sentence(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        defaults.resolve(arguments, kept(LLAMA_8B).shape, hardware.gpus()["H100"])
    assert "\n" not in str(caught.value)


def test_shared_memory_is_for_several_workers() -> None:
    assert memory.shm_bytes(1) == 0
    assert memory.shm_bytes(8) > memory.shm_bytes(4) > GIB
    assert LLAMA["num_hidden_layers"] == 32


def test_rope_tables_are_as_long_as_their_scaling_makes_them() -> None:
    """Of Gemma-3, the table of full attention is scaled and that of windows is not."""
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    of = model(GEMMA, max_position_embeddings=131072, **scaled).shape
    assert memory.rope_bytes(of, "bfloat16") == (8 + 1) * 131072 * 256 * 2
    video = model(LLAMA, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}).shape
    assert memory.rope_bytes(video, "bfloat16") == 4 * 131072 * 128 * 2
    gpt_oss = kept("openai/gpt-oss-20b").shape
    assert memory.rope_bytes(gpt_oss, "bfloat16") == 131072 * 64 * 4


def test_a_pooling_model_has_no_head() -> None:
    """Qwen3-Embedding-8B's shape: 1.16 GiB less than the model that writes text."""
    of = model(LLAMA, vocab_size=151_669, num_hidden_layers=36)
    head = 151_669 * 4096 * 2
    generating = plan(of, max_model_len=8192).tightest
    for arguments in ({"runner": "pooling"}, {"convert": "embed"}):
        pooling = plan(of, max_model_len=8192, **arguments)
        assert generating.weights - pooling.tightest.weights == pytest.approx(head, rel=1e-2)
        assert pooling.groups
    assert plan(of, max_model_len=8192, runner="generate").tightest.weights == generating.weights


def test_an_encoder_leaves_what_it_does_not_need() -> None:
    assert plan(kept("BAAI/bge-m3"), "L4").tightest.kv_cache == 0

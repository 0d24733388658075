"""The KV cache against vLLM's own code: blocks, tokens, concurrency, longest context."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from harness.models import GEMMA, LLAMA, QWEN3_NEXT, kept, model

from serve_app.planner import hardware
from serve_app.planner.vllm import defaults, kv_cache
from serve_app.planner.vllm.sharding import Parallelism, stages


@pytest.fixture(scope="module")
def utils() -> Any:
    """vLLM's own module; importing it takes seconds, so only where it is used."""
    from vllm.v1.core import kv_cache_utils

    return kv_cache_utils


def vllm_specs(specs: list[tuple[int, kv_cache.LayerSpec]]) -> dict[str, Any]:
    """The planner's layers as vLLM's specs with the same pages."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

    found: dict[str, Any] = {}
    for layer, spec in specs:
        # One byte per element, one head: head_size bytes of K, none of V.
        attention = {
            "block_size": spec.block_size,
            "num_kv_heads": 1,
            "head_size": spec.page_bytes // spec.block_size,
            "head_size_v": 0,
            "dtype": torch.int8,
        }
        if spec.kind == "ssm":
            found[f"layers.{layer}.ssm"] = MambaSpec(
                block_size=spec.block_size,
                shapes=((spec.page_bytes,),),
                dtypes=(torch.int8,),
                mamba_cache_mode=spec.mamba_mode,
            )
        elif spec.kind == "sliding":
            found[f"layers.{layer}"] = SlidingWindowSpec(**attention, sliding_window=spec.window)
        else:
            found[f"layers.{layer}"] = FullAttentionSpec(**attention)
    return found


def vllm_config(max_model_len: int, in_flight: int, mamba_mode: str) -> Any:
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=max_model_len, original_max_model_len=max_model_len
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(
            num_gpu_blocks_override=None,
            mamba_cache_mode=mamba_mode,
            prefix_cache_retention_interval=None,
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBNHC,
        ),
        speculative_config=None,
        max_in_flight_tokens=in_flight,
    )


GPT_OSS = {**LLAMA, "layer_types": ["sliding_attention", "full_attention"] * 16,
           "sliding_window": 128}  # fmt: skip
UNEVEN = {**LLAMA, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 10
          + ["sliding_attention"] * 2, "sliding_window": 1024}  # fmt: skip


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize(
    ("name", "config", "arguments"),
    [
        ("llama", LLAMA, {"max_model_len": 8192}),
        ("llama fp8", LLAMA, {"max_model_len": 32768, "kv_cache_dtype": "fp8"}),
        ("gemma", GEMMA, {"max_model_len": 32768}),
        ("gpt-oss", GPT_OSS, {"max_model_len": 16384}),
        ("uneven", UNEVEN, {"max_model_len": 16384}),
        ("mistral", {**LLAMA, "model_type": "mistral", "sliding_window": 4096}, {}),
        ("qwen3-next", QWEN3_NEXT, {"max_model_len": 32768}),
        ("no caching", QWEN3_NEXT, {"max_model_len": 32768, "enable_prefix_caching": False}),
        ("deepseek", None, {"max_model_len": 32768}),
    ],
)
def test_same_blocks_tokens_and_limits(
    utils: Any, name: str, config: dict[str, Any] | None, arguments: dict[str, Any], pipeline: int
) -> None:
    of = model(config) if config else kept("deepseek-ai/DeepSeek-V3")
    gpu = hardware.gpus()["H200"]
    resolved = defaults.resolve(arguments, of.shape, gpu, Parallelism(pipeline=pipeline))
    specs = kv_cache.layer_specs(of.shape, resolved)
    parts = stages(of.shape.num_hidden_layers, pipeline)
    free = [40 * 10**9 + 12345, 37 * 10**9][:pipeline]
    groups = kv_cache.groups_of(specs)
    in_flight = resolved.in_flight_tokens
    ours = kv_cache.allocate(
        groups, parts, free, max_model_len=resolved.max_model_len, in_flight=in_flight
    )
    longest = kv_cache.longest_model_len(groups, parts, free, most=10**9, in_flight=in_flight)

    theirs_config = vllm_config(resolved.max_model_len, in_flight, resolved.mamba_mode)
    per_worker = [vllm_specs([s for s in specs if s[0] in part]) for part in parts]
    theirs = utils.get_kv_cache_configs(theirs_config, per_worker, free)[0]
    tokens, concurrency = utils.get_kv_cache_capacity(theirs_config, theirs)
    assert ours.num_blocks == theirs.num_blocks
    assert ours.max_concurrency == pytest.approx(concurrency)
    assert ours.tokens == tokens

    theirs_config.model_config.max_model_len = 10**9
    merged = {name: spec for worker in per_worker for name, spec in worker.items()}
    theirs_groups = utils.get_kv_cache_groups(theirs_config, merged)
    projected = [utils._project_kv_cache_groups_to_worker(theirs_groups, w) for w in per_worker]
    usable = [
        bytes_ - utils._pool_bytes_per_block(worker)
        for bytes_, worker in zip(free, projected, strict=True)
    ]
    assert longest == min(
        utils._estimate_max_model_len_from_groups(theirs_config, worker, bytes_)
        for worker, bytes_ in zip(projected, usable, strict=True)
    )


def test_bytes_per_token_of_known_models() -> None:
    def of(name: str, tp: int, dtype: str = "bfloat16") -> int:
        shape = kept(name).shape
        return shape.num_hidden_layers * kv_cache.attention_bytes_per_token(shape, tp, dtype)

    assert of("meta-llama/Llama-3.3-70B-Instruct", 1) == 327_680
    assert of("meta-llama/Llama-3.3-70B-Instruct", 4) == 81_920
    assert of("meta-llama/Llama-3.3-70B-Instruct", 16) == 40_960  # one KV head each, replicated
    assert of("meta-llama/Llama-3.3-70B-Instruct", 4, "fp8") == 40_960
    assert of("deepseek-ai/DeepSeek-V3", 1) == 61 * 576 * 2
    assert of("deepseek-ai/DeepSeek-V3", 8) == 61 * 576 * 2  # MLA does not shrink with TP

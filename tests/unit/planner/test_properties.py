"""What must hold for every model, not only for those that have a name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from harness.models import LLAMA, model, plan
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.planner import choose, hardware
from serve_app.planner.model import names
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.vllm import defaults, memory, parallelism, sharding
from serve_app.planner.vllm.memory import COMMUNICATION_BYTES
from serve_app.planner.vllm.sharding import Parallelism

POWERS = st.sampled_from([1, 2, 4, 8])


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Configs of decoders from 10 M to 400 B parameters: GQA or MQA, dense or MoE, windows."""
    heads = draw(st.sampled_from([8, 16, 32, 64]))
    head_dim = draw(st.sampled_from([64, 128]))
    config = {
        **LLAMA,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "hidden_size": heads * head_dim,
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4, 8])),
        "intermediate_size": 1024 * draw(st.integers(1, 28)),
        "num_hidden_layers": draw(st.integers(8, 96)),
        "vocab_size": draw(st.integers(1000, 200_000)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if draw(st.booleans()):
        config |= {
            "model_type": "qwen3_moe",
            "num_experts": draw(st.sampled_from([8, 64, 128])),
            "num_experts_per_tok": draw(st.integers(1, 8)),
            "moe_intermediate_size": 256 * draw(st.integers(1, 8)),
        }
    elif draw(st.booleans()):
        every = draw(st.integers(2, 6))
        kinds = ["full_attention" if i % every == 0 else "sliding_attention" for i in range(96)]
        config |= {"layer_types": kinds, "sliding_window": draw(st.integers(128, 8192))}
    return config


def needs(of: Model, parallel: Parallelism) -> memory.GPUMemory:
    """The fullest GPU, apart from its KV cache."""
    gpu = hardware.gpus()["H200"]
    resolved = defaults.resolve({"max_model_len": 4096}, of.shape, gpu, parallel)
    return max(memory.plan(of, resolved, gpu).stages, key=lambda stage: stage.without_kv)


@settings(max_examples=60, deadline=None)
@given(configs(), POWERS, POWERS, st.booleans())
def test_more_gpus_never_need_more_memory_each(
    config: dict[str, Any], tp: int, pp: int, expert_parallel: bool
) -> None:
    """Doubling TP or PP: no part grows. Only the first step pays for communication, once, and
    a further stage for the tensors that it receives."""
    of = model(config)
    expert_parallel = expert_parallel and of.shape.moe is not None
    before = needs(of, Parallelism(tp, pp, expert_parallel=expert_parallel))
    wider = needs(of, Parallelism(2 * tp, pp, expert_parallel=expert_parallel))
    deeper = needs(of, Parallelism(tp, 2 * pp, expert_parallel=expert_parallel))
    first_step = COMMUNICATION_BYTES if tp * pp == 1 else 0
    # The gathered logits are one more copy of a share of them.
    logits = before.activation if tp == 1 else 0
    assert wider.weights <= before.weights
    assert wider.without_kv <= before.without_kv + first_step + logits
    received = 2 * 8192 * of.shape.hidden_size * 2 if pp == 1 else 0
    assert deeper.weights <= before.weights
    assert deeper.without_kv <= before.without_kv + first_step + received
    assert deeper.activation <= before.activation


@settings(max_examples=60, deadline=None)
@given(configs(), POWERS, POWERS, st.integers(1, 200_000), st.integers(1, 200_000))
def test_longer_context_never_gives_more_concurrency(
    config: dict[str, Any], tp: int, pp: int, one: int, other: int
) -> None:
    short, long = sorted((one, other))
    of = model(config, max_position_embeddings=200_000)
    found = plan(of, max_model_len=long, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    assert found.concurrency(long) <= found.concurrency(short)
    shorter = plan(of, max_model_len=short, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    assert found.concurrency() <= shorter.concurrency() or not shorter.fits


@settings(max_examples=60, deadline=None)
@given(configs(), POWERS, st.integers(1, 8), st.booleans())
def test_shards_together_hold_the_whole(
    config: dict[str, Any], tp: int, pp: int, expert_parallel: bool
) -> None:
    of = model(config)
    parallel = Parallelism(tp, pp, expert_parallel=expert_parallel and of.shape.moe is not None)
    whole = sum(t.nbytes for t in of.tensors if names.is_loaded(t, of.shape))
    stages = sharding.stage_weights(of.tensors, of.shape, parallel, "bfloat16")
    assert sum(stages) * tp >= whole
    assert sharding.stage_weights(of.tensors, of.shape, Parallelism(), "bfloat16")[0] >= whole


@settings(max_examples=60, deadline=None)
@given(configs(), st.sampled_from(["L4", "A100-40G", "H100", "H200"]), st.floats(0.3, 0.98))
def test_a_plan_that_fits_stays_within_what_is_requested(
    config: dict[str, Any], gpu: str, utilization: float
) -> None:
    found = plan(model(config), gpu, max_model_len=4096, gpu_memory_utilization=utilization)
    stage = found.tightest
    assert found.fits == (not found.reasons)
    if found.fits:
        assert stage.without_kv + stage.kv_cache == stage.requested
        assert found.cache.num_blocks * found.cache.bytes_per_block <= stage.kv_cache
        assert found.concurrency() >= 1
        assert found.kv_cache_tokens >= 4096


@settings(max_examples=20, deadline=None)
@given(configs(), st.sampled_from(["L40S", "H100", "B200"]))
def test_the_smallest_layout_fits_and_no_smaller_one_does(
    config: dict[str, Any], name: str
) -> None:
    of, gpu = model(config), hardware.gpus()[name]
    arguments = {"max_model_len": 4096}
    choice = choose.smallest(of, arguments, gpu)
    if choice.plan is None:
        assert choice.refused
        return
    assert choice.plan.fits
    for gpus in range(1, choice.plan.parallel.gpus):
        smaller = Parallelism(tensor=gpus)
        if not parallelism.problems(of.shape, smaller):
            found = choose.plan_on(of, arguments, gpu, smaller)
            assert found.tight or not found.fits


@settings(max_examples=100, deadline=None)
@given(configs(), st.integers(1, 64), st.integers(1, 12))
def test_accepted_sizes_divide(config: dict[str, Any], tp: int, pp: int) -> None:
    shape = model(config).shape
    if not parallelism.problems(shape, Parallelism(tp, pp)):
        assert shape.num_attention_heads % tp == 0
        assert shape.num_key_value_heads % tp == 0 or tp % shape.num_key_value_heads == 0
        assert math.ceil(shape.vocab_size / 64) * 64 % tp == 0
        assert pp <= shape.num_hidden_layers


@settings(max_examples=30, deadline=None)
@given(configs(), st.sampled_from(["fp8", "fp8_per_block", "nvfp4_per_token"]))
def test_quantizing_never_adds_weight(config: dict[str, Any], scheme: str) -> None:
    of = model(config)
    found = plan(of, "B200", max_model_len=4096, quantization=scheme)
    plain = plan(of, "B200", max_model_len=4096)
    assert found.tightest.weights < plain.tightest.weights
    halved = replace(found.engine, quantization=None)
    assert memory.weight_bytes(of, halved) == [stage.weights for stage in plain.stages]

"""Parallel sizes that a model cannot take are refused with the ones that it can."""

from __future__ import annotations

from typing import Any

import pytest
from harness.models import kept

from serve_app.errors import ConfigError
from serve_app.planner.model import shape
from serve_app.planner.vllm import defaults, parallelism
from serve_app.planner.vllm.sharding import Parallelism

LLAMA_70B = {
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
SMOLLM = {  # 9 heads: three is the only split
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
QWEN_MOE = {  # Qwen3-30B-A3B
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "mlp_only_layers": [],
    "vocab_size": 151936,
}
DEEPSEEK = {  # V3: latent attention, the first three layers dense
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
AWQ_32B = {  # Qwen2.5-32B-AWQ
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "num_hidden_layers": 64,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "vocab_size": 152064,
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128},
}


def problems(hf_config: dict[str, Any], **engine: Any) -> list[str]:
    described = shape.from_config(hf_config)
    return parallelism.problems(described, defaults.parallelism(engine))


def refusal(hf_config: dict[str, Any], **engine: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        parallelism.refuse(shape.from_config(hf_config), defaults.parallelism(engine))
    return str(refused.value)


def tensor_sizes(hf_config: dict[str, Any], limit: int = 64) -> list[int]:
    sizes = range(1, limit + 1)
    return [size for size in sizes if not problems(hf_config, tensor_parallel_size=size)]


@pytest.mark.parametrize(
    ("hf_config", "engine"),
    [
        (LLAMA_70B, {}),
        (LLAMA_70B, {"tensor_parallel_size": 8}),
        (LLAMA_70B, {"tensor_parallel_size": 4, "pipeline_parallel_size": 3}),
        (LLAMA_70B, {"tensor_parallel_size": 16}),
        (LLAMA_70B, {"tensor_parallel_size": 16, "decode_context_parallel_size": 2}),
        (SMOLLM, {"tensor_parallel_size": 3}),
        (QWEN_MOE, {"tensor_parallel_size": 2, "data_parallel_size": 4}),
        (
            QWEN_MOE,
            {"tensor_parallel_size": 1, "data_parallel_size": 5, "enable_expert_parallel": True},
        ),
        (DEEPSEEK, {"tensor_parallel_size": 16}),
        (DEEPSEEK, {"tensor_parallel_size": 8, "decode_context_parallel_size": 8}),
        ({"text_config": LLAMA_70B, "vision_config": {}}, {"tensor_parallel_size": 8}),
        (
            LLAMA_70B,  # ranks of their own for the prefill: rules that are left to vLLM
            {
                "tensor_parallel_size": 2,
                "prefill_context_parallel_size": 2,
                "decode_context_parallel_size": 4,
            },
        ),
    ],
)
def test_sizes_that_fit_pass(hf_config: dict[str, Any], engine: dict[str, Any]) -> None:
    assert problems(hf_config, **engine) == []


@pytest.mark.parametrize(
    ("name", "parallel", "word"),
    [
        ("meta-llama/Llama-3.3-70B-Instruct", Parallelism(3), "64 attention heads"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", Parallelism(9), "padded vocab"),
        ("BAAI/bge-m3", Parallelism(1, 2), "cannot be split into stages"),
        # 25600 / 16 = 1600 is no multiple of the fp8 block of 128.
        ("Qwen/Qwen3-32B-FP8", Parallelism(16), "block of 128"),
        ("Qwen/Qwen3-30B-A3B", Parallelism(1, data=5), "enable_expert_parallel"),
    ],
)
def test_sizes_that_a_model_on_the_hub_cannot_take(
    name: str, parallel: Parallelism, word: str
) -> None:
    assert any(word in why for why in parallelism.problems(kept(name).shape, parallel))


def test_heads_must_divide_and_the_sizes_that_do_are_named() -> None:
    text = refusal(LLAMA_70B, tensor_parallel_size=6)
    assert text.startswith("engine.tensor_parallel_size 6 does not divide the 64 attention heads")
    assert text.endswith("tensor_parallel_size can be 1, 2, 4, 8, 16, 32, 64")


def test_only_sizes_that_a_machine_has_are_proposed() -> None:
    described = shape.from_config(LLAMA_70B)
    found = dict(parallelism.remedies(described, Parallelism(6), largest_group=8))
    assert "tensor_parallel_size 6 does not divide intermediate_size 28672" in found
    assert set(found.values()) == {"tensor_parallel_size can be 1, 2, 4, 8"}


def test_a_multimodal_model_is_judged_by_its_language_part() -> None:
    assert "64 attention heads" in refusal({"text_config": LLAMA_70B}, tensor_parallel_size=3)


def test_key_value_heads_divide_or_are_multiplied() -> None:
    model = LLAMA_70B | {"num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128}
    assert "12 is no multiple of the 8 KV heads" in refusal(model, tensor_parallel_size=12)
    assert "3 does not divide the 8 KV heads" in refusal(model, tensor_parallel_size=3)


def test_latent_attention_has_no_key_value_heads_to_divide() -> None:
    assert tensor_sizes(DEEPSEEK | {"num_key_value_heads": 3})[:4] == [1, 2, 4, 8]


def test_the_padded_vocabulary_must_divide() -> None:
    model = SMOLLM | {"vocab_size": 49153}  # padded to 49216, which 3 does not divide
    assert "padded vocabulary (49216)" in refusal(model, tensor_parallel_size=3)
    assert not problems(LLAMA_70B | {"vocab_size": 128257}, tensor_parallel_size=2)


def test_a_quantization_group_is_never_cut() -> None:
    # 27648 / 8 = 3456 = 27 groups of 128, and 5120 / 8 = 640 = 5 groups.
    assert not problems(AWQ_32B, tensor_parallel_size=8)
    cut = refusal(AWQ_32B | {"intermediate_size": 27648 - 512}, tensor_parallel_size=8)
    assert "group of 128" in cut
    assert cut.endswith("tensor_parallel_size can be 1, 2, 4")
    # DeepSeek's dense layers: 18432 / 32 = 576 is not a multiple of the fp8 block.
    assert "intermediate_size 18432" in refusal(DEEPSEEK, tensor_parallel_size=32)


def test_what_is_left_unquantized_has_no_groups() -> None:
    quantization = AWQ_32B["quantization_config"] | {"modules_to_not_convert": ["mlp"]}
    model = AWQ_32B | {"intermediate_size": 27136, "quantization_config": quantization}
    assert not problems(model, tensor_parallel_size=8)


def test_experts_may_be_cut_inside_a_group() -> None:
    model = QWEN_MOE | {"quantization_config": AWQ_32B["quantization_config"]}
    assert not problems(model, tensor_parallel_size=4)  # 768 / 4 = 192: a group and a half


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "group_size": 128, "desc_act": False},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {"weights": {"num_bits": 4, "group_size": 128, "type": "int"}}
            },
        },
        {"quant_method": "awq", "q_group_size": 128},
    ],
)
def test_every_spelling_of_a_group_is_read(quantization: dict[str, Any]) -> None:
    model = AWQ_32B | {"intermediate_size": 27136, "quantization_config": quantization}
    assert "group of 128" in refusal(model, tensor_parallel_size=8)


def test_act_order_repeats_its_scales_on_every_rank() -> None:
    quantization = {"quant_method": "gptq", "group_size": 128, "desc_act": True}
    model = AWQ_32B | {"intermediate_size": 27136, "quantization_config": quantization}
    assert not problems(model, tensor_parallel_size=8)


def test_experts_are_cut_by_all_ranks_unless_they_stay_whole() -> None:
    text = refusal(QWEN_MOE, tensor_parallel_size=1, data_parallel_size=5)
    assert "does not divide the experts' intermediate size 768" in text
    assert not problems(QWEN_MOE, data_parallel_size=5, enable_expert_parallel=True)
    assert "tensor_parallel_size can be 1, 2, 4" in refusal(
        QWEN_MOE | {"moe_intermediate_size": 100}, tensor_parallel_size=8
    )


def test_a_dense_model_has_no_experts_to_spread() -> None:
    assert refusal(LLAMA_70B, enable_expert_parallel=True).endswith("remove enable_expert_parallel")
    assert "set replicas" in refusal(LLAMA_70B, data_parallel_size=2)


def test_no_stage_is_left_without_a_layer() -> None:
    text = refusal(SMOLLM, pipeline_parallel_size=31)
    assert "31 is more than the 30 layers" in text
    assert text.endswith("pipeline_parallel_size can be 1 to 30")


def test_context_parallel_sizes_follow_the_key_value_heads() -> None:
    text = refusal(LLAMA_70B, tensor_parallel_size=8, decode_context_parallel_size=2)
    assert text.endswith("decode_context_parallel_size can be 1")
    assert "does not divide tensor_parallel_size 16" in refusal(
        LLAMA_70B, tensor_parallel_size=16, decode_context_parallel_size=3
    )


def test_the_sizes_of_a_small_model() -> None:
    assert tensor_sizes(SMOLLM) == [1, 3]

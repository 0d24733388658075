"""Weights from config.json alone come to the published counts, and shard as vLLM shards them."""

import pytest
from harness.models import LLAMA, QWEN3_NEXT, kept, model

from serve_app.planner.model import derive, metadata, names, shape
from serve_app.planner.model.quantization import Quantization
from serve_app.planner.model.shape import ModelShape
from serve_app.planner.model.tensors import Tensor, grouped, parameter_bytes
from serve_app.planner.vllm import sharding
from serve_app.planner.vllm.sharding import Parallelism

# "Model size … params" of the hub, and `metadata.total_size` of the index where it has one.
PUBLISHED = {
    "meta-llama/Llama-3.3-70B-Instruct": (70_553_706_496, 141_107_412_992),
    "meta-llama/Llama-3.1-8B-Instruct": (8_030_261_248, 16_060_522_496),
    "Qwen/Qwen3-32B": (32_762_123_264, None),
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, 61_064_245_248),
    "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8": (235_093_634_560, None),
    "openai/gpt-oss-20b": (20_914_757_184, None),
    "openai/gpt-oss-120b": (116_829_156_672, None),
    "deepseek-ai/DeepSeek-V3": (671_026_419_200, None),
    "BAAI/bge-m3": (567_754_752, None),
    "BAAI/bge-reranker-v2-m3": (567_755_777, None),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (134_515_008, 269_030_016),
    "sentence-transformers/all-MiniLM-L6-v2": (22_713_216, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_come_to_the_published_count(name: str) -> None:
    of = kept(name)
    count, total_size = PUBLISHED[name]
    plain = [
        tensor
        for tensor in derive.unquantized(of.shape)
        if (names.layer_of(tensor.name) or 0) < of.shape.num_hidden_layers
    ]
    assert sum(tensor.elements for tensor in plain) == count
    if total_size:
        assert sum(tensor.nbytes for tensor in of.tensors) == total_size


LLAMA_4 = {
    "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "hidden_size": 5120,
    "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 48,
    "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 202048,
    "num_experts_per_tok": 1, "max_position_embeddings": 1048576, "attention_chunk_size": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("experts", "every", "count"),
    [(16, 1, 107_769_861_120), (128, 2, 400_711_848_960)],  # Scout's and Maverick's text models
)
def test_llama_4_comes_to_its_published_count(experts: int, every: int, count: int) -> None:
    sizes = {"num_local_experts": experts, "interleave_moe_layer_step": every}
    of = model(LLAMA_4, **sizes)
    assert of.parameters == count
    assert of.shape.layers[:5] == ("chunked", "chunked", "chunked", "full", "chunked")
    assert of.shape.is_moe(0) is (every == 1)


def test_qwen3_vl_comes_to_its_published_count() -> None:
    """Qwen3-VL-30B-A3B-Instruct: 31.07 B, of which 0.54 see."""
    text = {
        "model_type": "qwen3_vl_moe_text", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144,
    }  # fmt: skip
    vision = {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 2048,
        "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    whole = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
    described = shape.from_config({**whole, "text_config": text, "vision_config": vision})
    plain = derive.unquantized(described)
    seen = sum(t.elements for t in plain if t.name.startswith("visual."))
    assert seen / 1e9 == pytest.approx(0.54, abs=0.005)
    assert sum(t.elements for t in plain) / 1e9 == pytest.approx(31.07, abs=0.005)


def test_a_module_is_ignored_by_a_whole_part_of_its_name() -> None:
    """``gate`` is the router, and not ``gate_proj``."""
    scheme = Quantization("fp8", 8, ignored=("gate", "lm_head"))
    assert scheme.ignores("model.layers.0.mlp.gate")
    assert not scheme.ignores("model.layers.0.mlp.experts.0.gate_proj")


def test_seed_table_of_precisions() -> None:
    sizes = [parameter_bytes(70 * 10**9, p) / 1e9 for p in ("fp32", "bf16", "int8", "int4")]
    assert sizes == [280, 140, 70, 35]


def test_every_kept_model_can_be_read() -> None:
    for name in metadata.kept_models():
        assert kept(name).tensors, name


@pytest.mark.parametrize(
    ("name", "bits_per_weight"),
    [
        # 8 bits and one float32 per block of 128 × 128; 4 bits, and a 16-bit scale and a 4-bit
        # zero point per group of 128; the embedding and the head stay at 16 bits.
        ("Qwen/Qwen3-32B-FP8", 8 + 32 / 128**2),
        ("Qwen/Qwen2.5-32B-Instruct-AWQ", 4 + (16 + 4) / 128),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", 4 + (16 + 4) / 128),
    ],
)
def test_quantized_linear_layers_take_their_bits(name: str, bits_per_weight: float) -> None:
    of = kept(name)
    linear = [t for t in derive.unquantized(of.shape) if names.is_linear(t)]
    other = [t for t in derive.unquantized(of.shape) if not names.is_linear(t)]
    expected = sum(t.elements for t in linear) * bits_per_weight / 8 + sum(t.nbytes for t in other)
    stored = [t for t in of.tensors if not t.name.endswith(".g_idx")]
    assert sum(t.nbytes for t in stored) == pytest.approx(expected, rel=1e-4)


def test_experts_are_counted_not_listed() -> None:
    listed = [Tensor(f"model.layers.0.mlp.experts.{i}.up_proj.weight", "BF16", (4, 8)) for i in
              range(64)]  # fmt: skip
    assert grouped(listed) == [
        Tensor("model.layers.0.mlp.experts.*.up_proj.weight", "BF16", (4, 8), 64)
    ]


def share(of: ModelShape, name: str, dims: tuple[int, ...], tp: int, count: int = 1) -> float:
    tensor = Tensor(name, "BF16", dims, count)
    return sharding.rank_bytes(tensor, of, Parallelism(tp), "bfloat16") / tensor.nbytes


def test_tensor_parallelism_splits_as_vllm_does() -> None:
    shape = model().shape
    at = "model.layers.0."
    assert share(shape, at + "self_attn.q_proj.weight", (4096, 4096), 4) == 1 / 4
    assert share(shape, at + "self_attn.o_proj.weight", (4096, 4096), 4) == 1 / 4
    assert share(shape, at + "mlp.down_proj.weight", (4096, 14336), 4) == 1 / 4
    assert share(shape, at + "input_layernorm.weight", (4096,), 4) == 1
    # 8 KV heads over 16 ranks: one each, every head twice.
    assert share(shape, at + "self_attn.k_proj.weight", (1024, 4096), 8) == 1 / 8
    assert share(shape, at + "self_attn.k_proj.weight", (1024, 4096), 16) == 1 / 8
    # Rows of the embedding are padded to a multiple of 64.
    assert share(shape, "model.embed_tokens.weight", (1000, 4096), 2) == 1024 / 1000 / 2
    assert share(shape, "vision_tower.encoder.layers.0.mlp.fc1.weight", (64, 64), 4) == 1


def test_expert_parallelism_gives_whole_experts() -> None:
    shape = kept("Qwen/Qwen3-30B-A3B").shape
    experts = Tensor("model.layers.0.mlp.experts.*.up_proj.weight", "BF16", (768, 2048), 128)
    with_ep = Parallelism(6, expert_parallel=True)
    # 128 experts over 6 ranks: the first two hold 22.
    assert sharding.rank_bytes(experts, shape, with_ep, "bfloat16") == experts.nbytes * 22 // 128
    assert sharding.rank_bytes(experts, shape, Parallelism(8), "bfloat16") == experts.nbytes // 8


@pytest.mark.parametrize(
    ("layers", "pp", "sizes"),
    [(80, 4, [20] * 4), (61, 4, [15, 15, 16, 15]), (61, 2, [31, 30]), (62, 4, [15, 16, 16, 15])],
)
def test_pipeline_stages_as_vllm_cuts_them(layers: int, pp: int, sizes: list[int]) -> None:
    assert [len(part) for part in sharding.stages(layers, pp)] == sizes


def test_first_and_last_stage_hold_embedding_and_head() -> None:
    of = model()
    parallel = Parallelism(pipeline=4)
    first, second, third, last = sharding.stage_weights(of.tensors, of.shape, parallel, "bfloat16")
    embedding = 128256 * 4096 * 2
    assert first - second == embedding
    assert second == third
    assert last - second == embedding + 4096 * 2  # the head and the final norm
    tied = model(tie_word_embeddings=True)
    stages = sharding.stage_weights(tied.tensors, tied.shape, parallel, "bfloat16")
    assert stages[-1] == last  # the tied head is loaded again there


def test_draft_layers_are_not_loaded_without_speculation() -> None:
    of = kept("deepseek-ai/DeepSeek-V3")
    draft = [t for t in of.tensors if names.layer_of(t.name) == 61]
    assert draft
    assert not any(names.is_loaded(t, of.shape) for t in draft)
    assert any(names.is_loaded(t, of.shape, draft=True) for t in draft)


def test_hybrid_and_window_layers_are_told_apart() -> None:
    hybrid = shape.from_config(QWEN3_NEXT)
    assert hybrid.layers.count("full") == 12
    assert hybrid.layers.count("ssm") == 36
    assert hybrid.layers[3] == "full"
    mistral = shape.from_config({**LLAMA, "model_type": "mistral", "sliding_window": 4096})
    assert set(mistral.layers) == {"sliding"}
    off = {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}
    assert set(shape.from_config({**LLAMA, **off}).layers) == {"full"}


def test_nested_text_config_is_read() -> None:
    described = shape.from_config(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
        }
    )
    assert (described.num_attention_heads, described.num_key_value_heads, described.head_dim) == (
        8,
        4,
        256,
    )
    assert described.vision is not None
    assert not described.pooling

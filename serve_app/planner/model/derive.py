"""The tensors that a config implies, for models whose weights are not at hand.

The names and shapes are those of checkpoints on the Hugging Face hub. So the rest of the planner
treats a derived list like one that was read from safetensors headers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from serve_app.errors import ConfigError
from serve_app.planner.model import names
from serve_app.planner.model.quantization import Quantization
from serve_app.planner.model.shape import ModelShape
from serve_app.planner.model.tensors import TORCH_DTYPES, Tensor

_QKV_BIAS = {"qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_text"}
_QK_NORM = {
    "qwen3", "qwen3_moe", "gemma3", "gemma3_text", "qwen3_next", "qwen3_vl", "qwen3_vl_text",
    "exaone4", "olmo2", "olmo3", "qwen3_vl_moe", "qwen3_vl_moe_text", "minimax_m2",
}  # fmt: skip
_FOUR_NORMS = {"gemma2", "gemma3", "gemma3_text", "glm4"}
_UNGATED = {"nemotron_h", "starcoder2"}


def tensors(shape: ModelShape) -> list[Tensor]:
    """Every tensor of the checkpoint, draft layers included, packed as it is stored.

    Raises:
        ConfigError: an architecture whose tensors are not known.
    """
    if not shape.known:
        raise ConfigError(
            f"the tensors of '{shape.architecture}' ({shape.model_type}) cannot be told from "
            "config.json; give a folder or hub id with safetensors weights"
        )
    return quantized(unquantized(shape), shape.quantization)


def unquantized(shape: ModelShape) -> list[Tensor]:
    """The same tensors before quantization: one matrix ``[out, in]`` for each linear layer."""
    dtype = TORCH_DTYPES.get(shape.dtype, "BF16")
    layers = _encoder(shape) if not shape.causal else _decoder(shape)
    return [Tensor(name, dtype, dims, count) for name, dims, count in layers]


def quantized(plain: list[Tensor], scheme: Quantization | None) -> list[Tensor]:
    """``plain`` with every linear matrix packed by ``scheme``; all else stays as it is."""
    if scheme is None:
        return plain
    packed: list[Tensor] = []
    for tensor in plain:
        packed += scheme.pack(tensor) if _is_packed(tensor, scheme) else [tensor]
    return packed


def _is_packed(tensor: Tensor, scheme: Quantization) -> bool:
    module = tensor.name.removesuffix(".weight")
    if module.endswith("lm_head"):
        return scheme.lm_head
    if scheme.method in ("experts_int8", "mxfp4") and ".experts." not in module:
        return False
    return names.is_linear(tensor) and not scheme.ignores(module)


_Spec = tuple[str, tuple[int, ...], int]


def _one(name: str, *dims: int) -> _Spec:
    return name, dims, 1


def _decoder(shape: ModelShape) -> Iterator[_Spec]:
    hidden = shape.hidden_size
    if "draft_vocab_size" in shape.config:
        yield from _eagle3(shape)
        return
    yield _one("model.embed_tokens.weight", shape.vocab_size, hidden)
    for i in range(shape.num_hidden_layers):
        yield from _decoder_layer(shape, i)
    yield _one("model.norm.weight", hidden)
    if not shape.tie_word_embeddings:
        yield _one("lm_head.weight", shape.vocab_size, hidden)
    if shape.model_type == "qwen3_next":
        yield from _qwen3_next_draft(shape)
    else:
        for i in range(shape.num_hidden_layers, shape.num_hidden_layers + shape.draft_layers):
            yield from _draft_layer(shape, i)
    if shape.vision is not None:
        yield from _vision_tower(shape)


def _decoder_layer(shape: ModelShape, i: int) -> Iterator[_Spec]:
    at, hidden = f"model.layers.{i}", shape.hidden_size
    kind = shape.layers[min(i, shape.num_hidden_layers - 1)]
    yield _one(f"{at}.input_layernorm.weight", hidden)
    if kind == "ssm":
        yield from _ssm(shape, f"{at}.mamba")
    elif kind != "none":
        yield from _mla(shape, f"{at}.self_attn") if shape.mla else _gqa(shape, f"{at}.self_attn")
        if shape.model_type == "falcon_h1":  # attention and Mamba side by side
            yield from _ssm(shape, f"{at}.mamba")
    # Nemotron-H gives a layer one mixer; pure Mamba has no MLP.
    alone = shape.model_type in ("nemotron_h", "mamba", "mamba2", "falcon_mamba")
    if alone and kind != "none":
        return
    yield _one(f"{at}.post_attention_layernorm.weight", hidden)
    if shape.model_type in _FOUR_NORMS:
        yield _one(f"{at}.pre_feedforward_layernorm.weight", hidden)
        yield _one(f"{at}.post_feedforward_layernorm.weight", hidden)
    # A multi-token-prediction layer is built like the model's last layer.
    if shape.is_moe(min(i, shape.num_hidden_layers - 1)):
        yield from _moe(shape, f"{at}.mlp")
    else:
        gated = shape.model_type not in _UNGATED
        yield from _mlp(f"{at}.mlp", hidden, shape.intermediate_size, gated)


def _gqa(shape: ModelShape, at: str) -> Iterator[_Spec]:
    hidden, size = shape.hidden_size, shape.head_dim
    q, kv = shape.num_attention_heads * size, shape.num_key_value_heads * size
    bias = shape.model_type in _QKV_BIAS or bool(shape.config.get("attention_bias"))
    # Qwen3-Next's queries carry an output gate of the same width (models/qwen3_next.py).
    gated = 2 if shape.model_type == "qwen3_next" else 1
    for name, out in (("q_proj", q * gated), ("k_proj", kv), ("v_proj", kv)):
        yield _one(f"{at}.{name}.weight", out, hidden)
        if bias:
            yield _one(f"{at}.{name}.bias", out)
    yield _one(f"{at}.o_proj.weight", hidden, q)
    if shape.model_type == "gpt_oss":
        yield _one(f"{at}.o_proj.bias", hidden)
        yield _one(f"{at}.sinks", shape.num_attention_heads)
    if shape.model_type in _QK_NORM:
        # MiniMax-M2's is over all heads of a token (models/minimax_m2.py:215).
        of_all = shape.model_type == "minimax_m2"
        yield _one(f"{at}.q_norm.weight", q if of_all else size)
        yield _one(f"{at}.k_norm.weight", kv if of_all else size)


def _mla(shape: ModelShape, at: str) -> Iterator[_Spec]:
    mla, hidden, heads = shape.mla, shape.hidden_size, shape.num_attention_heads
    assert mla is not None
    q = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    if mla.q_lora_rank:
        yield _one(f"{at}.q_a_proj.weight", mla.q_lora_rank, hidden)
        yield _one(f"{at}.q_a_layernorm.weight", mla.q_lora_rank)
        yield _one(f"{at}.q_b_proj.weight", q, mla.q_lora_rank)
    else:
        yield _one(f"{at}.q_proj.weight", q, hidden)
    yield _one(f"{at}.kv_a_proj_with_mqa.weight", mla.kv_lora_rank + mla.qk_rope_head_dim, hidden)
    yield _one(f"{at}.kv_a_layernorm.weight", mla.kv_lora_rank)
    yield _one(
        f"{at}.kv_b_proj.weight",
        heads * (mla.qk_nope_head_dim + mla.v_head_dim),
        mla.kv_lora_rank,
    )
    yield _one(f"{at}.o_proj.weight", hidden, heads * mla.v_head_dim)
    if shape.model_type == "deepseek_v32":  # the indexer (models/deepseek_v2.py:667)
        size, count = shape.config["index_head_dim"], shape.config["index_n_heads"]
        yield _one(f"{at}.indexer.wq_b.weight", count * size, mla.q_lora_rank or hidden)
        yield _one(f"{at}.indexer.wk.weight", size, hidden)
        yield _one(f"{at}.indexer.weights_proj.weight", count, hidden)
        yield from _layer_norm(f"{at}.indexer.k_norm", size)


def _mlp(at: str, hidden: int, intermediate: int, gated: bool = True) -> Iterator[_Spec]:
    if gated:
        yield _one(f"{at}.gate_proj.weight", intermediate, hidden)
    yield _one(f"{at}.up_proj.weight", intermediate, hidden)
    yield _one(f"{at}.down_proj.weight", hidden, intermediate)


def _moe(shape: ModelShape, at: str) -> Iterator[_Spec]:
    moe, hidden = shape.moe, shape.hidden_size
    assert moe is not None
    yield _one(f"{at}.gate.weight", moe.num_experts, hidden)
    if shape.config.get("topk_method") == "noaux_tc" or shape.config.get("use_routing_bias"):
        yield _one(f"{at}.gate.e_score_correction_bias", moe.num_experts)
    for name, dims, _ in _mlp(f"{at}.experts.*", hidden, moe.intermediate_size):
        yield name, dims, moe.num_experts
        if shape.model_type == "gpt_oss":
            yield f"{name.removesuffix('.weight')}.bias", dims[:1], moe.num_experts
    if shape.model_type == "gpt_oss":
        yield _one(f"{at}.gate.bias", moe.num_experts)
    if moe.shared_intermediate_size:
        yield from _mlp(f"{at}.shared_experts", hidden, moe.shared_intermediate_size)
        if shape.model_type in ("qwen2_moe", "qwen3_next"):
            yield _one(f"{at}.shared_expert_gate.weight", 1, hidden)


def _ssm(shape: ModelShape, at: str) -> Iterator[_Spec]:
    ssm, hidden = shape.ssm, shape.hidden_size
    assert ssm is not None
    yield _one(f"{at}.conv1d.weight", ssm.conv_dim, 1, ssm.conv_kernel)
    if ssm.kind == "gdn":
        keys = ssm.conv_dim - ssm.inner_size
        yield _one(f"{at}.in_proj_qkvz.weight", keys + 2 * ssm.inner_size, hidden)
        yield _one(f"{at}.in_proj_ba.weight", 2 * ssm.heads, hidden)
    elif ssm.kind == "mamba1":
        rank = int(shape.config.get("time_step_rank") or shape.config.get("mamba_dt_rank") or 0)
        rank = rank or -(-hidden // 16)
        yield _one(f"{at}.in_proj.weight", 2 * ssm.inner_size, hidden)
        yield _one(f"{at}.x_proj.weight", rank + 2 * ssm.state_size, ssm.inner_size)
        yield _one(f"{at}.dt_proj.weight", ssm.inner_size, rank)
        yield _one(f"{at}.A_log", ssm.inner_size, ssm.state_size)
    elif ssm.kind == "mamba2":
        yield _one(f"{at}.in_proj.weight", ssm.conv_dim + ssm.inner_size + ssm.heads, hidden)
        yield _one(f"{at}.norm.weight", ssm.inner_size)
    else:
        yield _one(f"{at}.in_proj.weight", 3 * hidden, hidden)
    if ssm.heads:
        yield _one(f"{at}.D", ssm.heads)
        yield _one(f"{at}.dt_bias", ssm.heads)
    yield _one(f"{at}.out_proj.weight", hidden, ssm.inner_size)


def _draft_layer(shape: ModelShape, i: int) -> Iterator[_Spec]:
    """DeepSeek's multi-token-prediction module: a layer, two norms, a projection, its own head."""
    at, hidden = f"model.layers.{i}", shape.hidden_size
    yield from _decoder_layer(shape, i)
    yield _one(f"{at}.embed_tokens.weight", shape.vocab_size, hidden)
    yield _one(f"{at}.enorm.weight", hidden)
    yield _one(f"{at}.hnorm.weight", hidden)
    yield _one(f"{at}.eh_proj.weight", hidden, 2 * hidden)
    yield _one(f"{at}.shared_head.norm.weight", hidden)
    yield _one(f"{at}.shared_head.head.weight", shape.vocab_size, hidden)


def _qwen3_next_draft(shape: ModelShape) -> Iterator[_Spec]:
    """Qwen3-Next's multi-token prediction: one layer with attention (models/qwen3_next_mtp.py)."""
    hidden, last = shape.hidden_size, shape.num_hidden_layers - 1
    yield _one("mtp.fc.weight", hidden, 2 * hidden)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield _one(f"mtp.{norm}.weight", hidden)
    for name, dims, count in _decoder_layer(shape, last):
        yield name.replace(f"model.layers.{last}.", "mtp.layers.0."), dims, count


def _eagle3(shape: ModelShape) -> Iterator[_Spec]:
    """An EAGLE-3 draft: hidden states of three target layers in, a reduced vocabulary out.

    Its embedding is the target's, unless their widths differ (vllm/models/llama_eagle3.py).
    """
    hidden, at = shape.hidden_size, "model.layers.0"
    target = int(shape.config.get("target_hidden_size") or hidden)
    draft_vocab = int(shape.config["draft_vocab_size"])
    if target != hidden:
        yield _one("model.embed_tokens.weight", shape.vocab_size, hidden)
    yield _one("model.fc.weight", hidden, 3 * target)
    yield _one("d2t", draft_vocab)
    # The first layer sees the token's embedding beside the hidden state.
    for name, dims, _ in _gqa(shape, f"{at}.self_attn"):
        yield _one(name, *((dims[0], 2 * hidden) if not name.endswith("o_proj.weight") else dims))
    yield from _mlp(f"{at}.mlp", hidden, shape.intermediate_size)
    yield _one(f"{at}.hidden_norm.weight", hidden)
    yield _one(f"{at}.input_layernorm.weight", hidden)
    yield _one(f"{at}.post_attention_layernorm.weight", hidden)
    yield _one("model.norm.weight", hidden)
    yield _one("lm_head.weight", draft_vocab, hidden)


def _vision_tower(shape: ModelShape) -> Iterator[_Spec]:
    """A plain ViT of the given sizes, and a two-layer projector: close, not exact."""
    vision = shape.vision or {}
    if "deepstack_visual_indexes" in vision:
        yield from _qwen3_vision(vision)
        return
    hidden = int(vision.get("hidden_size") or vision.get("embed_dim") or 1024)
    layers = int(vision.get("num_hidden_layers") or vision.get("depth") or 24)
    inner = int(vision.get("intermediate_size") or hidden * (vision.get("mlp_ratio") or 4))
    patch = vision.get("patch_size") or 14
    patch = patch if isinstance(patch, int) else patch[0]
    yield _one("vision_tower.embeddings.patch_embedding.weight", hidden, 3 * patch * patch)
    for i in range(layers):
        at = f"vision_tower.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield _one(f"{at}.self_attn.{name}.weight", hidden, hidden)
        yield _one(f"{at}.mlp.fc1.weight", inner, hidden)
        yield _one(f"{at}.mlp.fc2.weight", hidden, inner)
    yield _one("multi_modal_projector.linear_1.weight", shape.hidden_size, hidden)
    yield _one("multi_modal_projector.linear_2.weight", shape.hidden_size, shape.hidden_size)


def _qwen3_vision(vision: dict[str, Any]) -> Iterator[_Spec]:
    """Qwen3-VL's tower, with a merger of patches after it and one for each layer that it gives to
    the language model (models/qwen3_vl.py)."""
    hidden, inner, out = (
        vision["hidden_size"],
        vision["intermediate_size"],
        vision["out_hidden_size"],
    )
    patch, frames = int(vision["patch_size"]), int(vision.get("temporal_patch_size") or 2)
    merged = hidden * int(vision.get("spatial_merge_size") or 2) ** 2
    yield from _linear("visual.patch_embed.proj", hidden, 3 * frames * patch * patch)
    yield _one("visual.pos_embed.weight", int(vision["num_position_embeddings"]), hidden)
    for i in range(int(vision["depth"])):
        at = f"visual.blocks.{i}"
        yield from _linear(f"{at}.attn.qkv", 3 * hidden, hidden)
        yield from _linear(f"{at}.attn.proj", hidden, hidden)
        yield from _linear(f"{at}.mlp.linear_fc1", inner, hidden)
        yield from _linear(f"{at}.mlp.linear_fc2", hidden, inner)
        yield from _layer_norm(f"{at}.norm1", hidden)
        yield from _layer_norm(f"{at}.norm2", hidden)
    early = [
        f"visual.deepstack_merger_list.{i}" for i in range(len(vision["deepstack_visual_indexes"]))
    ]
    for at in ("visual.merger", *early):
        yield from _layer_norm(f"{at}.norm", merged if at in early else hidden)
        yield from _linear(f"{at}.linear_fc1", merged, merged)
        yield from _linear(f"{at}.linear_fc2", out, merged)


def _modernbert(shape: ModelShape) -> Iterator[_Spec]:
    """Rotary positions, no biases, gated MLPs (models/modernbert.py)."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    yield _one("embeddings.tok_embeddings.weight", shape.vocab_size, hidden)
    yield _one("embeddings.norm.weight", hidden)
    for i in range(shape.num_hidden_layers):
        at = f"layers.{i}"
        if i:
            yield _one(f"{at}.attn_norm.weight", hidden)
        yield _one(f"{at}.attn.Wqkv.weight", 3 * hidden, hidden)
        yield _one(f"{at}.attn.out_proj.weight", hidden, hidden)
        yield _one(f"{at}.mlp_norm.weight", hidden)
        yield from _mlp(f"{at}.mlp", hidden, inner)
    yield _one("final_norm.weight", hidden)
    if shape.architecture.endswith("ForSequenceClassification"):
        yield _one("head.dense.weight", hidden, hidden)
        yield _one("head.norm.weight", hidden)
        yield from _linear("classifier", len(shape.config.get("id2label") or {}) or 2, hidden)


def _nomic_bert(shape: ModelShape) -> Iterator[_Spec]:
    """Rotary positions, gated MLPs, biases where the config says so (models/bert_with_rope.py)."""
    hidden = shape.hidden_size
    yield _one("embeddings.word_embeddings.weight", shape.vocab_size, hidden)
    types = int(shape.config.get("type_vocab_size") or 0)
    if types:
        yield _one("embeddings.token_type_embeddings.weight", types, hidden)
    yield from _layer_norm("emb_ln", hidden)
    for i in range(shape.num_hidden_layers):
        at = f"encoder.layers.{i}"
        yield _one(f"{at}.attn.Wqkv.weight", 3 * hidden, hidden)
        yield _one(f"{at}.attn.out_proj.weight", hidden, hidden)
        yield from _mlp(f"{at}.mlp", hidden, shape.intermediate_size)
        yield from _layer_norm(f"{at}.norm1", hidden)
        yield from _layer_norm(f"{at}.norm2", hidden)


def _encoder(shape: ModelShape) -> Iterator[_Spec]:
    """BERT and its kin. The pooler is in the checkpoint whether or not the head uses it."""
    if shape.model_type in ("modernbert", "nomic_bert"):
        yield from (_modernbert if shape.model_type == "modernbert" else _nomic_bert)(shape)
        return
    hidden, inner = shape.hidden_size, shape.intermediate_size
    classifies = shape.architecture.endswith("ForSequenceClassification")
    roberta = "roberta" in shape.model_type or shape.model_type == "camembert"
    prefix = "" if not classifies else "roberta." if roberta else "bert."
    embeddings = f"{prefix}embeddings"
    yield _one(f"{embeddings}.word_embeddings.weight", shape.vocab_size, hidden)
    positions = int(shape.config.get("max_position_embeddings") or 512)
    yield _one(f"{embeddings}.position_embeddings.weight", positions, hidden)
    types = int(shape.config.get("type_vocab_size") or 1)
    yield _one(f"{embeddings}.token_type_embeddings.weight", types, hidden)
    yield from _layer_norm(f"{embeddings}.LayerNorm", hidden)
    for i in range(shape.num_hidden_layers):
        at = f"{prefix}encoder.layer.{i}"
        for name in ("query", "key", "value"):
            yield from _linear(f"{at}.attention.self.{name}", hidden, hidden)
        yield from _linear(f"{at}.attention.output.dense", hidden, hidden)
        yield from _layer_norm(f"{at}.attention.output.LayerNorm", hidden)
        yield from _linear(f"{at}.intermediate.dense", inner, hidden)
        yield from _linear(f"{at}.output.dense", hidden, inner)
        yield from _layer_norm(f"{at}.output.LayerNorm", hidden)
    if classifies:
        labels = len(shape.config.get("id2label") or {}) or 2
        if roberta:
            yield from _linear("classifier.dense", hidden, hidden)
            yield from _linear("classifier.out_proj", labels, hidden)
        else:
            yield from _linear("bert.pooler.dense", hidden, hidden)
            yield from _linear("classifier", labels, hidden)
    else:
        yield from _linear("pooler.dense", hidden, hidden)


def _linear(at: str, out: int, inputs: int) -> Iterator[_Spec]:
    yield _one(f"{at}.weight", out, inputs)
    yield _one(f"{at}.bias", out)


def _layer_norm(at: str, size: int) -> Iterator[_Spec]:
    yield _one(f"{at}.weight", size)
    yield _one(f"{at}.bias", size)

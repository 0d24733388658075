"""What a tensor's name tells: its layer, its role there, and whether vLLM loads it at all.

vLLM decides by the class of a module's layer. Here the module's name decides; for the names in
today's checkpoints the result is the same.
"""

from __future__ import annotations

import re
from typing import Literal

from serve_app.planner.model.shape import ModelShape
from serve_app.planner.model.tensors import Tensor

Role = Literal["vocab", "column", "kv", "qkv", "row", "expert", "linear", "tower", "replicated"]
"""How a tensor is split. ``linear`` is a matrix that every rank holds whole."""

_ROLES: dict[str, Role] = {
    **dict.fromkeys(
        ("embed_tokens", "lm_head", "word_embeddings", "wte", "tok_embeddings", "embed_in",
         "position_embeddings", "token_type_embeddings", "head"), "vocab"),
    **dict.fromkeys(
        ("q_proj", "gate_proj", "up_proj", "gate_up_proj", "q_b_proj", "kv_b_proj", "query",
         "w1", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "in_proj", "in_proj_qkvz",
         "in_proj_ba", "in_proj_qkv", "in_proj_z", "conv1d", "A_log", "D", "dt_bias", "dt_proj",
         "intermediate.dense"), "column"),
    **dict.fromkeys(("k_proj", "v_proj", "key", "value"), "kv"),
    **dict.fromkeys(("qkv_proj", "query_key_value", "Wqkv", "W_pack", "c_attn"), "qkv"),
    **dict.fromkeys(
        ("o_proj", "down_proj", "w2", "fc2", "fc_out", "c_proj", "out_proj", "dense_4h_to_h",
         "x_proj", "output.dense", "self_attention.dense"), "row"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa", "eh_proj", "wq_b"), "linear"),
}  # fmt: skip

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_TOWER = re.compile(r"^(?:model\.)?(?:visual|vision_|multi_modal_projector|audio_|mm_|vit)")
_PARAMETER = re.compile(
    r"\.(?:weight|bias|qweight|qzeros|scales|g_idx|weight_scale(?:_inv|_2)?|weight_packed"
    r"|weight_shape|input_scale|weight_zero_point|blocks|e_score_correction_bias)$"
)


def role(name: str) -> Role:
    """How vLLM splits the tensor called ``name``."""
    if _TOWER.match(name):
        return "tower"
    module = _PARAMETER.sub("", name)
    parts = module.split(".")
    if "experts" in parts:
        return "expert"
    two = ".".join(parts[-2:])
    return _ROLES.get(two) or _ROLES.get(parts[-1]) or "replicated"


def is_linear(tensor: Tensor) -> bool:
    """Whether a quantization scheme may pack this tensor."""
    return (
        tensor.name.endswith(".weight")
        and len(tensor.shape) == 2
        and role(tensor.name) in ("column", "kv", "qkv", "row", "expert", "linear")
    )


def layer_of(name: str) -> int | None:
    """The index of the transformer layer that a tensor belongs to."""
    found = _LAYER.search(name)
    return int(found[1]) if found and not _TOWER.match(name) else None


def is_loaded(tensor: Tensor, shape: ModelShape, *, draft: bool = False) -> bool:
    """Whether vLLM keeps this tensor of the checkpoint on the GPU.

    ``draft`` also takes the multi-token-prediction layers, which only speculation loads.
    """
    name = tensor.name
    layer = layer_of(name)
    if layer is not None and layer >= shape.num_hidden_layers:
        # They share the embedding and the head with the model (models/deepseek_mtp.py).
        return draft and role(name) != "vocab"
    if name.startswith("mtp."):
        return draft
    if name.endswith(("rotary_emb.inv_freq", ".weight_shape", "position_ids", ".masked_bias")):
        return False
    if name.startswith("lm_head.") and shape.tie_word_embeddings:
        return False
    # An embedding model pools without BERT's pooler (models/bert.py, models/roberta.py).
    return not (name.startswith("pooler.") and not shape.causal)

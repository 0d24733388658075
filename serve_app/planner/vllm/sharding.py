"""The part of a tensor that one GPU holds, for tensor, pipeline and expert parallelism.

vLLM decides by the class of a module's layer (``vllm/model_executor/layers/linear.py``,
``vocab_parallel_embedding.py``, ``fused_moe/``). Here :func:`names.role` decides by its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from serve_app.planner.model.names import is_loaded, layer_of, role
from serve_app.planner.model.shape import ModelShape
from serve_app.planner.model.tensors import DTYPE_BITS, FLOATS, TORCH_DTYPES, Tensor
from serve_app.planner.vllm.allocator import merged

VOCAB_PADDING = 64  # vocab_parallel_embedding.py:33 DEFAULT_VOCAB_PADDING_SIZE


@dataclass(frozen=True)
class Parallelism:
    """How one replica is split. GPUs = tensor × pipeline × data."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert_parallel: bool = False
    context: int = 1
    """Decode context parallelism (DCP): tensor ranks that share the KV cache of one head."""

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def expert(self) -> int:
        """Ranks that split a layer's experts: by EP, or by TP over all data-parallel ranks."""
        return self.tensor * self.data

    def __str__(self) -> str:
        text = f"TP {self.tensor} × PP {self.pipeline}"
        if self.data > 1:
            text += f" × DP {self.data}"
        return text + (" with EP" if self.expert_parallel else "")


def stages(layers: int, pipeline: int) -> list[range]:
    """The layers of each pipeline stage, as vllm/distributed/utils.py:127 splits them.

    Layers that remain go to the stages before the last, one each.
    """
    sizes = [layers // pipeline] * pipeline
    for i in range(2, layers % pipeline + 2):
        sizes[-i] += 1
    starts = [sum(sizes[:i]) for i in range(pipeline)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def local_kv_heads(shape: ModelShape, tensor: int) -> int:
    """KV heads on one rank: at least one, replicated if need be (config/model.py:1517)."""
    return max(1, shape.num_key_value_heads // tensor)


def rank_bytes(tensor: Tensor, shape: ModelShape, parallel: Parallelism, dtype: str) -> int:
    """Bytes of ``tensor`` on one GPU, once loaded with the engine's ``dtype``."""
    nbytes = loaded_bytes(tensor, shape, dtype)
    kind = role(tensor.name)
    tp = parallel.tensor
    if kind == "expert":
        experts = _experts_in(tensor)
        if parallel.expert_parallel:
            # The first ranks hold one expert more (fused_moe/expert_map_manager.py:67).
            return math.ceil(nbytes * math.ceil(experts / parallel.expert) / experts)
        return math.ceil(nbytes / parallel.expert)
    if tp == 1 and kind != "vocab":
        return nbytes
    if kind == "vocab":
        if len(tensor.shape) < 2:
            return nbytes
        rows = tensor.shape[0]
        padded = math.ceil(rows / VOCAB_PADDING) * VOCAB_PADDING
        return math.ceil(nbytes * padded / rows / tp)
    is_bias = tensor.name.endswith(".bias")
    if kind == "column" or (kind == "row" and not is_bias):
        return math.ceil(nbytes / tp)
    kv = shape.num_key_value_heads
    if kind == "kv":
        return math.ceil(nbytes * local_kv_heads(shape, tp) / kv) if kv else nbytes
    if kind == "qkv":
        heads = shape.num_attention_heads
        local = heads / tp + 2 * local_kv_heads(shape, tp)
        return math.ceil(nbytes * local / (heads + 2 * kv))
    return nbytes


def _experts_in(tensor: Tensor) -> int:
    """The experts in an entry: one by one, or stacked along its first axis."""
    if tensor.count > 1:
        return tensor.count
    return tensor.shape[0] if len(tensor.shape) > 2 else 1


def loaded_bytes(tensor: Tensor, shape: ModelShape, dtype: str) -> int:
    """Bytes on a GPU that holds the whole tensor. Floating-point weights get the engine's dtype."""
    target = TORCH_DTYPES[dtype]
    scale = "scale" in tensor.name.rsplit(".", 1)[-1]
    if tensor.dtype in FLOATS and not scale:
        return math.ceil(tensor.elements * DTYPE_BITS[target] / 8)
    return tensor.nbytes


def stage_weights(
    tensors: Iterable[Tensor], shape: ModelShape, parallel: Parallelism, dtype: str
) -> list[int]:
    """Bytes of the checkpoint's weights on one GPU of each pipeline stage."""
    held = stage_parameters(tensors, shape, parallel, dtype)
    return [sum(parameters.values()) for parameters in held]


def stage_parameters(
    tensors: Iterable[Tensor], shape: ModelShape, parallel: Parallelism, dtype: str
) -> list[dict[str, int]]:
    """The vLLM parameters on one GPU of each pipeline stage, with their bytes."""
    parts = stages(shape.num_hidden_layers, parallel.pipeline)
    held: list[dict[str, int]] = [{} for _ in range(parallel.pipeline)]
    last = parallel.pipeline - 1
    stage_by_layer = {layer: stage for stage, part in enumerate(parts) for layer in part}
    for tensor in tensors:
        if not is_loaded(tensor, shape):
            continue
        nbytes = rank_bytes(tensor, shape, parallel, dtype)
        layer = layer_of(tensor.name)
        holders = {last}
        if layer is not None:
            holders = {stage_by_layer[layer]}
        elif shape.model_type in _WHOLE_ON_EVERY_STAGE and role(tensor.name) != "tower":
            holders = set(range(parallel.pipeline))
        elif _is_input(tensor.name):
            holders = {0}
            if shape.tie_word_embeddings and "embed_tokens" in tensor.name:
                holders.add(last)  # the tied head (models/llama.py:373)
        parameter = merged(tensor.name)
        for stage in holders:
            held[stage][parameter] = held[stage].get(parameter, 0) + nbytes
    return held


# Models whose class in vllm/model_executor/models/ builds the embedding, the last norm and the
# head on every stage. Other classes build them on the first and the last stage only.
_WHOLE_ON_EVERY_STAGE = {
    "gemma", "gemma2", "gemma3", "gemma3_text", "granitemoe", "granitemoehybrid", "cohere",
    "cohere2", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "gpt_oss", "stablelm", "jamba",
    "nemotron_h", "mamba", "falcon_mamba", "mamba2", "zamba2", "lfm2",
}  # fmt: skip


def _is_input(name: str) -> bool:
    return role(name) == "tower" or any(
        part in name for part in ("embed_tokens", "embeddings", "wte", "wpe", "embed_in")
    )

"""Which parallel sizes a model can take, told from its ``config.json`` alone.

vLLM refuses the others too, but only once it holds the GPUs, and in terms of its layers. The
rules are vLLM 0.29's; each names the line that enforces it. A rule that depends on more than the
config (a kernel's shapes, say) is left to vLLM: what is refused here could never have worked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.errors import ConfigError

_VOCAB_PADDING = 64  # vllm/model_executor/layers/vocab_parallel_embedding.py:33
_MOST_GPUS_PER_GROUP = 64


def refuse_impossible(engine: Mapping[str, Any], hf_config: Mapping[str, Any]) -> None:
    """Refuse parallel sizes that this model cannot be split into.

    Args:
        engine: engine arguments by vLLM's names.
        hf_config: the content of the model's ``config.json``.

    Raises:
        ConfigError: the argument, why its value does not fit, and the values that do.
    """
    model = _Model.read(hf_config)
    tensor = _size(engine, "tensor_parallel_size")
    data = _size(engine, "data_parallel_size")
    experts_whole = bool(engine.get("enable_expert_parallel"))
    if experts_whole and not model.experts:
        raise ConfigError(
            "engine.enable_expert_parallel is true, but this model has no experts; remove it"
        )
    if data > 1 and not model.experts:
        raise ConfigError(
            f"engine.data_parallel_size is {data}, but vLLM splits only mixture-of-experts models "
            "that way; for more throughput set replicas"
        )

    def why_not(size: int) -> str | None:
        return _why_not_tensor(model, size, size * data, experts_whole)

    _refuse(
        "tensor_parallel_size",
        tensor,
        why_not,
        range(1, min(model.heads or _MOST_GPUS_PER_GROUP, _MOST_GPUS_PER_GROUP) + 1),
    )
    layers = model.layers or 0
    _refuse(
        "pipeline_parallel_size",
        _size(engine, "pipeline_parallel_size"),
        lambda size: f"the model has only {layers} layers" if 0 < layers < size else None,
        range(1, layers + 1),
    )
    if _size(engine, "prefill_context_parallel_size") == 1:
        _refuse(
            "decode_context_parallel_size",
            _size(engine, "decode_context_parallel_size"),
            lambda size: _why_not_context(model, tensor, size),
            range(1, tensor + 1),
        )


def tensor_parallel_sizes(hf_config: Mapping[str, Any]) -> list[int]:
    """Every ``tensor_parallel_size`` up to 64 that a model can take, without other splits."""
    model = _Model.read(hf_config)
    sizes = range(1, _MOST_GPUS_PER_GROUP + 1)
    return [size for size in sizes if _why_not_tensor(model, size, size, False) is None]


def _size(engine: Mapping[str, Any], name: str) -> int:
    return int(engine.get(name) or 1)


def _refuse(
    name: str, size: int, why_not: Callable[[int], str | None], sizes: Iterable[int]
) -> None:
    reason = why_not(size)
    if reason is None:
        return
    good = [other for other in sizes if why_not(other) is None]
    raise ConfigError(f"engine.{name} is {size}, but {reason}; {_listed(good)}")


def _listed(sizes: list[int]) -> str:
    if not sizes:
        return "no value fits"
    if len(sizes) > 8 and sizes == list(range(1, len(sizes) + 1)):
        return f"values that fit: 1 to {sizes[-1]}"
    return "values that fit: " + ", ".join(map(str, sizes))


def _why_not_tensor(
    model: _Model, tensor: int, tensor_data: int, experts_whole: bool
) -> str | None:
    """Why ``tensor`` ranks cannot share each layer, or None.

    ``tensor_data`` ranks share the experts of a layer, by their columns unless ``experts_whole``.
    """
    if model.heads and model.heads % tensor:  # vllm/config/model.py:1411
        return f"the model's {model.heads} attention heads do not divide by {tensor}"
    kv = model.kv_heads
    if kv and not model.latent:  # QKVParallelLinear, vllm/model_executor/layers/linear.py:1043
        if tensor < kv and kv % tensor:
            return f"the model's {kv} key-value heads do not divide by {tensor}"
        if tensor >= kv and tensor % kv:
            return f"{tensor} is not a multiple of the model's {kv} key-value heads"
    if model.vocab and _padded(model.vocab) % tensor:  # VocabParallelEmbedding
        return (
            f"the model's vocabulary (padded: {_padded(model.vocab)}) does not divide by {tensor}"
        )
    for what, size in (("attention", model.attention), ("feed-forward", model.dense)):
        if not size:
            continue
        if size % tensor:
            return f"the model's {what} width ({size}) does not divide by {tensor}"
        # A rank must hold whole quantization groups of a matrix that is split by its input
        # (vllm/distributed/utils.py:67), or blocks (quantization/utils/fp8_utils.py:1197).
        # Experts have kernels without that limit (quantization/fp8.py:500, auto_awq.py:350).
        if tensor > 1 and model.group and (size // tensor) % model.group:
            return (
                f"the model's {what} width ({size}), cut into {tensor}, is not a whole number of "
                f"its quantization groups of {model.group}"
            )
    # fused_moe/config.py:1349
    if model.expert and not experts_whole and model.expert % tensor_data:
        return f"the width of an expert ({model.expert}) does not divide by {tensor_data}"
    return None


def _why_not_context(model: _Model, tensor: int, context: int) -> str | None:
    """Why the KV cache cannot be split between ``context`` of the ``tensor`` ranks, or None."""
    if context == 1:
        return None
    if tensor % context:  # vllm/config/parallel.py:552
        return f"it must divide tensor_parallel_size ({tensor})"
    if model.latent or not model.kv_heads or not model.heads:
        return None
    if tensor <= model.kv_heads or context > tensor // model.kv_heads:  # config/model.py:1432
        return (
            f"tensor_parallel_size {tensor} gives each of the model's {model.kv_heads} key-value "
            f"heads to {max(1, tensor // model.kv_heads)} at most"
        )
    if (model.heads // model.kv_heads) % context:
        return f"the {model.heads // model.kv_heads} query heads of a key-value head do not divide"
    return None


def _padded(vocab: int) -> int:
    return -(-vocab // _VOCAB_PADDING) * _VOCAB_PADDING


@dataclass(frozen=True)
class _Model:
    """The sizes that parallelism splits; None or 0 where the config does not tell."""

    heads: int | None
    kv_heads: int | None
    latent: bool
    """Multi-head latent attention: keys and values are one vector, which every rank holds."""
    layers: int | None
    vocab: int | None
    attention: int | None
    """Width of the attention's output, before its projection."""
    dense: int | None
    """Width of the feed-forward layers that are not experts."""
    experts: int
    expert: int | None
    """Width of one expert."""
    group: int | None
    """Consecutive input columns of a matrix that share a quantization scale."""

    @staticmethod
    def read(hf_config: Mapping[str, Any]) -> _Model:
        text = _text_config(hf_config)
        heads = _first(text, "num_attention_heads", "n_head")
        hidden = _first(text, "hidden_size", "n_embd", "d_model")
        head = _first(text, "v_head_dim", "head_dim")
        if not head and hidden and heads:
            head = hidden // heads
        experts = _first(
            text, "num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts"
        )
        width = _first(text, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
        expert = _first(text, "moe_intermediate_size", "expert_intermediate_size") or width
        # A mixture of experts may name a width that none of its layers has.
        some_dense = bool(text.get("first_k_dense_replace") or text.get("mlp_only_layers"))
        return _Model(
            heads=heads,
            kv_heads=_first(
                text, "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"
            )
            or (1 if text.get("multi_query") else heads),
            latent=bool(text.get("kv_lora_rank")),
            layers=_first(text, "num_hidden_layers", "n_layer", "num_layers"),
            vocab=_first(text, "vocab_size"),
            attention=heads * head if heads and head else None,
            dense=width if not experts or some_dense else None,
            experts=experts or 0,
            expert=expert if experts else None,
            group=_quantization_group(hf_config, text),
        )


def _text_config(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal config."""
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(nested := hf_config.get(key), Mapping):
            return _text_config(nested)
    return hf_config


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of ``names`` that is set, where it is one number for all layers."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _quantization_group(hf_config: Mapping[str, Any], text: Mapping[str, Any]) -> int | None:
    quantization = hf_config.get("quantization_config") or text.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return None
    method = str(quantization.get("quant_method") or "").lower()
    group: Any = None
    if "awq" in method or ("gptq" in method and not quantization.get("desc_act")):
        group = quantization.get("group_size") or quantization.get("q_group_size")
    elif method == "fp8" and isinstance(block := quantization.get("weight_block_size"), list):
        group = block[-1]
    elif method == "compressed-tensors":
        groups = quantization.get("config_groups")
        first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
        weights = first.get("weights") if isinstance(first, Mapping) else None
        group = weights.get("group_size") if isinstance(weights, Mapping) else None
    return group if isinstance(group, int) and group > 0 else None

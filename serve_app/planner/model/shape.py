"""The sizes in a model's ``config.json``, under one set of names.

Checkpoints spell the same size in many ways; the rest of the planner reads a :class:`ModelShape`.
Sizes are those of the whole model, before any parallelism.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from serve_app.errors import ConfigError
from serve_app.planner.model import quantization
from serve_app.planner.model.quantization import Quantization

LayerKind = Literal["full", "sliding", "chunked", "ssm", "none"]
"""What a layer caches of a request: all tokens, a window, a chunk, one state, or nothing."""


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention: one compressed vector per token in place of keys and values."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class MoE:
    """Mixture of experts. ``layers`` says of each layer whether it has experts."""

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int
    layers: tuple[bool, ...]


@dataclass(frozen=True)
class SSM:
    """A state-space or linear-attention layer: a short convolution and a recurrent state.

    ``conv_dim`` channels are convolved with ``conv_kernel`` taps; the state is ``heads`` matrices
    of ``head_dim`` × ``state_size``. ``groups`` is 0 where TP does not pad groups.
    """

    kind: Literal["mamba1", "mamba2", "gdn", "conv"]
    inner_size: int
    groups: int
    heads: int
    head_dim: int
    state_size: int
    conv_dim: int
    conv_kernel: int
    state_dtype: str | None = None


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes. Dimensions are elements, not bytes."""

    architecture: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    dtype: str
    tie_word_embeddings: bool
    layers: tuple[LayerKind, ...]
    sliding_window: int | None
    attention_chunk_size: int | None
    moe: MoE | None
    mla: MLA | None
    ssm: SSM | None
    quantization: Quantization | None
    pooling: bool
    """Whether the model embeds, scores or classifies instead of generating."""
    causal: bool
    """False for an encoder, which keeps no KV cache."""
    vision: dict[str, Any] | None
    draft_layers: int
    """Multi-token-prediction layers after the model's own, loaded only to speculate."""
    known: bool
    """Whether :mod:`derive` knows this architecture's tensors."""
    config: dict[str, Any]
    """The (text) config itself, for details that only one module needs."""

    def __hash__(self) -> int:
        return hash((self.architecture, json.dumps(self.config, sort_keys=True)))

    def is_moe(self, layer: int) -> bool:
        return self.moe is not None and layer < len(self.moe.layers) and self.moe.layers[layer]


# Decoders whose tensors are q/k/v/o and gate/up/down under `model.layers.N`.
_DECODERS = {
    "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text",
    "phi3", "granite", "granitemoe", "olmo2", "olmo3", "smollm3", "cohere", "cohere2", "glm4",
    "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "kimi_k2", "gpt_oss",
    "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl", "qwen3_vl_text", "llava",
    "starcoder2", "stablelm", "exaone4", "ernie4_5", "hunyuan_v1_dense", "seed_oss", "glm4_moe",
    "qwen3_vl_moe", "qwen3_vl_moe_text", "minimax_m2", "llama4", "llama4_text", "deepseek_v32",
}  # fmt: skip
_ENCODERS = {"bert", "roberta", "xlm-roberta", "camembert", "modernbert", "nomic_bert"}
_SSM = {
    "mamba", "falcon_mamba", "mamba2", "jamba", "bamba", "granitemoehybrid", "nemotron_h",
    "falcon_h1", "qwen3_next", "zamba2", "lfm2",
}  # fmt: skip

# Defaults of transformers' config classes for keys that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
        "max_position_embeddings": 131072, "sliding_window": 4096, "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window_pattern": 2, "sliding_window": 4096},
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True, "sliding_window_pattern": 4, "sliding_window": 4096},
    "mistral": {"num_key_value_heads": 8},
    "qwen3_next": {"full_attention_interval": 4},
    "bert": {"type_vocab_size": 2},
}  # fmt: skip


def from_config(config: dict[str, Any]) -> ModelShape:
    """Read a model's shape from its ``config.json``.

    Raises:
        ConfigError: a size is missing, not a number, or absurd (below 1, or beyond any model).
    """
    text = _text_config(config)
    model_type = str(text.get("model_type") or config.get("model_type") or "unknown")
    if config.get("is_encoder_decoder") or model_type == "whisper":
        raise ConfigError(
            f"it is an encoder-decoder ({model_type}), whose memory is not planned here: start it "
            "once, on a GPU with twice the size of its weights"
        )
    text = {**_DEFAULTS.get(model_type, {}), **{k: v for k, v in text.items() if v is not None}}
    architectures = config.get("architectures") or text.get("architectures") or []
    architecture = str(architectures[0]) if architectures else "unknown"
    layers = _size(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers", most=2000)
    hidden = _size(text, "hidden_size", "n_embd", "d_model", most=10**6)
    heads = _size(text, "num_attention_heads", "n_head", default=0, most=10**5)
    if heads == 0 and model_type not in ("mamba", "falcon_mamba", "mamba2"):
        raise ConfigError("config.json: 'num_attention_heads' is missing")
    head_dim = _size(
        text,
        "head_dim",
        "hidden_size_per_head",
        default=hidden // heads if heads else 0,
        most=65536,
    )
    kinds = _layer_kinds(text, model_type, layers)
    window = text.get("sliding_window") if "sliding" in kinds else None
    causal = model_type not in _ENCODERS
    return ModelShape(
        architecture=architecture,
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=_intermediate_size(text, hidden),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_size(
            text,
            "num_key_value_heads",
            "num_kv_heads",
            "n_head_kv",
            "multi_query_group_num",
            default=1 if text.get("multi_query") else heads,
            most=10**5,
        ),
        head_dim=head_dim,
        vocab_size=_size(text, "vocab_size", most=10**8),
        max_position_embeddings=max_model_len(text),
        dtype=_dtype(config, text),
        tie_word_embeddings=bool(
            config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        ),
        layers=kinds,
        sliding_window=int(window) if window else None,
        attention_chunk_size=text.get("attention_chunk_size") if "chunked" in kinds else None,
        moe=_moe(text, model_type, layers),
        mla=_mla(text),
        ssm=_ssm(text, model_type, hidden),
        quantization=quantization.from_config(config),
        pooling=not causal or _pools(architecture),
        causal=causal,
        vision=config.get("vision_config") or text.get("vision_config"),
        draft_layers=int(text.get("num_nextn_predict_layers") or 0),
        known=model_type in _DECODERS | _ENCODERS | _SSM,
        config=text,
    )


# Suffixes of vLLM's architecture names for models that generate, and for others. A name with
# neither generates (vllm/config/model.py: _SUFFIX_TO_DEFAULTS, and the registry's exceptions).
_GENERATES = (
    "ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ChatModel", "ChatGLMModel",
    "MiDashengLMModel", "MossAudioModel", "Qwen2_5OmniModel", "UltravoxModel",
)  # fmt: skip
_POOLS = (
    "Model", "ForTextEncoding", "Classification", "ForRewardModeling", "ForRetrieval", "ForRanking",
    "ForMaskedLM", "HF_ColBERT", "ColQwen3", "ColQwen3_5", "Terratorch",
)  # fmt: skip


def _pools(architecture: str) -> bool:
    return not architecture.endswith(_GENERATES) and architecture.endswith(_POOLS)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a multimodal config, else the config itself."""
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        nested = config.get(key)
        if isinstance(nested, dict):
            return _text_config(nested)
    return config


def _size(config: dict[str, Any], *names: str, default: int | None = None, most: int) -> int:
    """The first of ``names`` that is set, checked to be a whole number within reason."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, list):
            value = max(value, default=0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
            raise ConfigError(f"config.json: '{name}' is {value!r}, but must be a whole number")
        if not 1 <= value <= most:
            raise ConfigError(f"config.json: '{name}' is {value}, outside 1 to {most}")
        return int(value)
    if default is None:
        raise ConfigError(f"config.json: '{names[0]}' is missing")
    return default


def _intermediate_size(text: dict[str, Any], hidden: int) -> int:
    """Of the layers that are no experts; Llama-4 has another name for it."""
    return _size(
        text, "intermediate_size_mlp", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size",
        default=4 * hidden, most=10**7,
    )  # fmt: skip


def _dtype(config: dict[str, Any], text: dict[str, Any]) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
    value = value or text.get("torch_dtype") or "bfloat16"
    return str(value).removeprefix("torch.")


def max_model_len(text: dict[str, Any]) -> int:
    """The longest context that vLLM allows by default (vllm/config/model.py:2384)."""
    if text.get("max_trained_positions"):  # Nomic's, beyond which its positions are stretched
        return int(text["max_trained_positions"])
    known = [
        text[key]
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length",
                    "model_max_length", "max_sequence_length", "max_seq_length", "seq_len")
        if isinstance(text.get(key), int)
    ]  # fmt: skip
    if not known:
        return 2048
    longest = float(min(known))
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") if isinstance(rope, dict) else None
    if kind and kind not in ("su", "longrope", "llama3", "default", "mrope"):
        if "gemma3" not in str(text.get("model_type")):
            if kind == "yarn":
                longest = rope.get("original_max_position_embeddings") or longest
            longest *= rope.get("factor") or 1.0
    elif kind == "longrope" and text.get("original_max_position_embeddings"):
        longest = text["original_max_position_embeddings"]
    return int(longest)


_KINDS: dict[str, LayerKind] = {
    "full_attention": "full", "attention": "full", "*": "full", "hybrid": "full",
    "sliding_attention": "sliding", "chunked_attention": "chunked",
    "linear_attention": "ssm", "mamba": "ssm", "mamba2": "ssm", "M": "ssm", "conv": "ssm",
    "-": "none", "E": "none", "mlp": "none", "moe": "none",
}  # fmt: skip

# Models whose `sliding_window` holds for every layer.
_ALL_SLIDING = {"mistral", "mixtral", "phi3", "starcoder2"}


def _layer_kinds(text: dict[str, Any], model_type: str, layers: int) -> tuple[LayerKind, ...]:
    listed = text.get("layer_types") or text.get("layers_block_type")
    pattern = text.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        listed = list(pattern)
    if isinstance(listed, list) and len(listed) >= layers:
        known: list[LayerKind] = [_KINDS.get(str(kind), "full") for kind in listed[:layers]]
        return tuple(known)
    if model_type.startswith("llama4") and text.get("attention_chunk_size"):
        # Layers without positions see all tokens, the others a chunk (models/llama4.py:250).
        interval = int(text.get("no_rope_layer_interval") or 4)
        rope = text.get("no_rope_layers") or [(i + 1) % interval for i in range(layers)]
        return tuple("chunked" if has else "full" for has in rope[:layers])
    is_attention = _attention_period(text)
    if is_attention is not None:
        kinds: list[LayerKind] = ["full" if is_attention(i) else "ssm" for i in range(layers)]
        return tuple(kinds)
    whole: LayerKind = "ssm" if model_type in ("mamba", "mamba2", "falcon_mamba") else "full"
    every = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern")
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        if isinstance(every, int) and every > 1:
            windows: list[LayerKind] = ["sliding"] * layers
            windows[every - 1 :: every] = ["full"] * len(windows[every - 1 :: every])
            return tuple(windows)
        if model_type in _ALL_SLIDING:
            whole = "sliding"
    return (whole,) * layers


def _attention_period(text: dict[str, Any]) -> Callable[[int], bool] | None:
    """Which layers of a hybrid model are attention layers, if its config gives a period."""
    if isinstance(indices := text.get("attn_layer_indices"), list):
        return lambda i: i in indices
    if isinstance(period := text.get("attn_layer_period"), int) and period > 0:
        offset = text.get("attn_layer_offset") or 0
        return lambda i: i % period == offset
    if isinstance(interval := text.get("full_attention_interval"), int) and interval > 0:
        return lambda i: (i + 1) % interval == 0
    return None


def _mla(text: dict[str, Any]) -> MLA | None:
    if not text.get("kv_lora_rank"):
        return None
    return MLA(
        q_lora_rank=text.get("q_lora_rank"),
        kv_lora_rank=_size(text, "kv_lora_rank", most=10**6),
        qk_nope_head_dim=_size(text, "qk_nope_head_dim", most=65536),
        qk_rope_head_dim=_size(text, "qk_rope_head_dim", most=65536),
        v_head_dim=_size(text, "v_head_dim", most=65536),
    )


def _moe(text: dict[str, Any], model_type: str, layers: int) -> MoE | None:
    names = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
    experts = _size(text, *names, default=0, most=10**5) if any(map(text.get, names)) else 0
    if experts < 2:
        return None
    size = _size(
        text, "moe_intermediate_size", "expert_intermediate_size", "intermediate_size", most=10**7
    )
    shared = text.get("shared_expert_intermediate_size") or text.get("shared_intermediate_size")
    if shared is None and model_type.startswith("llama4"):
        shared = size  # models/llama4.py:109
    if shared is None:
        shared = size * int(text.get("n_shared_experts") or text.get("num_shared_experts") or 0)
    first_dense = int(text.get("first_k_dense_replace") or 0)
    every = int(
        text.get("decoder_sparse_step") or text.get("moe_layer_freq")
        or text.get("expert_layer_period") or text.get("interleave_moe_layer_step") or 1
    )  # fmt: skip
    offset = int(text.get("expert_layer_offset") or 0)
    dense_only = set(text.get("mlp_only_layers") or ())
    steps_from_one = bool({"decoder_sparse_step", "interleave_moe_layer_step"} & text.keys())

    pattern = text.get("hybrid_override_pattern")

    def sparse(i: int) -> bool:
        if isinstance(pattern, str):
            return pattern[i] == "E"
        if i < first_dense or i in dense_only:
            return False
        return (i + 1) % every == 0 if steps_from_one else i % every == offset % every

    top_k = _size(
        text, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts",
        default=1, most=experts,
    )  # fmt: skip
    return MoE(experts, top_k, size, int(shared), tuple(sparse(i) for i in range(layers)))


def _ssm(text: dict[str, Any], model_type: str, hidden: int) -> SSM | None:
    if text.get("linear_num_value_heads"):
        keys = text["linear_key_head_dim"] * text["linear_num_key_heads"]
        values = text["linear_value_head_dim"] * text["linear_num_value_heads"]
        return SSM(
            "gdn",
            inner_size=values,
            groups=0,
            heads=text["linear_num_value_heads"],
            head_dim=text["linear_value_head_dim"],
            state_size=text["linear_key_head_dim"],
            conv_dim=2 * keys + values,
            conv_kernel=int(text.get("linear_conv_kernel_dim") or 4),
            state_dtype=text.get("mamba_ssm_dtype"),
        )
    if model_type in ("mamba", "falcon_mamba", "jamba"):
        inner = hidden * int(text.get("mamba_expand") or text.get("expand") or 2)
        if model_type != "jamba":
            inner = int(text.get("intermediate_size") or inner)
        return SSM(
            "mamba1",
            inner_size=inner,
            groups=0,
            heads=inner,
            head_dim=1,
            state_size=int(text.get("state_size") or text.get("mamba_d_state") or 16),
            conv_dim=inner,
            conv_kernel=int(text.get("conv_kernel") or text.get("mamba_d_conv") or 4),
        )
    heads = text.get("mamba_n_heads") or text.get("mamba_num_heads") or text.get("n_mamba_heads")
    if model_type == "mamba2":
        heads = text.get("num_heads")
    if heads:
        head_dim = int(text.get("mamba_d_head") or text.get("mamba_head_dim")
                       or text.get("mamba_headdim") or text.get("head_dim") or 64)  # fmt: skip
        inner = int(text.get("mamba_d_ssm") or heads * head_dim)
        groups = int(text.get("mamba_n_groups") or text.get("mamba_ngroups")
                     or text.get("n_groups") or 1)  # fmt: skip
        state = int(text.get("mamba_d_state") or text.get("ssm_state_size")
                    or text.get("state_size") or 128)  # fmt: skip
        return SSM(
            "mamba2",
            inner_size=inner,
            groups=groups,
            heads=int(heads),
            head_dim=head_dim,
            state_size=state,
            conv_dim=inner + 2 * groups * state,
            conv_kernel=int(text.get("mamba_d_conv") or text.get("conv_kernel") or 4),
            state_dtype=text.get("mamba_ssm_cache_dtype"),
        )
    if model_type == "lfm2":
        return SSM("conv", hidden, 0, 0, 0, 0, hidden, int(text.get("conv_L_cache") or 3))
    return None

"""Models made of numbers, for tests."""

from __future__ import annotations

from typing import Any

from serve_app.planner import hardware
from serve_app.planner.model import derive, metadata, shape
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.vllm import defaults, memory
from serve_app.planner.vllm.memory import Plan

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
GEMMA: dict[str, Any] = {
    **LLAMA,
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
QWEN3_NEXT: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}


def model(config: dict[str, Any] | None = None, **changes: Any) -> Model:
    """A model from a config; its tensors are derived."""
    described = shape.from_config({**(config or LLAMA), **changes})
    return Model("test", described, tuple(derive.tensors(described)), False, "test")


def kept(name: str) -> Model:
    return metadata.load(name, offline=True)


def plan(of: Model, gpu: str = "H200", **arguments: Any) -> Plan:
    chosen = hardware.gpus()[gpu]
    return memory.plan(of, defaults.resolve(arguments, of.shape, chosen), chosen)

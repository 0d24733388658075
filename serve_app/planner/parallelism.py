"""What tensor, pipeline and expert parallelism must divide.

Each rule is one that vLLM 0.29 refuses to start without; the place stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

from serve_app.planner import sharding
from serve_app.planner.model_shape import ModelShape
from serve_app.planner.quantization import Quantization
from serve_app.planner.sharding import Parallelism


def problems(
    shape: ModelShape, parallel: Parallelism, scheme: Quantization | None = None
) -> list[str]:
    """Why ``shape`` cannot be split as ``parallel``, one sentence each; empty if it can."""
    return list(_problems(shape, parallel, scheme or shape.quantization))


def _problems(
    shape: ModelShape, parallel: Parallelism, scheme: Quantization | None
) -> Iterator[str]:
    tp, pp = parallel.tensor, parallel.pipeline
    heads, kv = shape.num_attention_heads, shape.num_key_value_heads
    if heads and heads % tp:  # config/model.py:1411
        yield f"tensor_parallel_size {tp} does not divide the {heads} attention heads"
    elif heads and not shape.mla:  # QKVParallelLinear, linear.py
        if tp >= kv and tp % kv:
            yield f"tensor_parallel_size {tp} is no multiple of the {kv} KV heads"
        elif tp < kv and kv % tp:
            yield f"tensor_parallel_size {tp} does not divide the {kv} KV heads"
    padded = -(-shape.vocab_size // sharding.VOCAB_PADDING) * sharding.VOCAB_PADDING
    if padded % tp:  # vocab_parallel_embedding.py: divide()
        yield f"tensor_parallel_size {tp} does not divide the padded vocabulary ({padded})"
    dense = not all(shape.is_moe(i) for i in range(shape.num_hidden_layers))
    if dense and shape.intermediate_size % tp:  # linear.py: divide()
        inner = shape.intermediate_size
        yield f"tensor_parallel_size {tp} does not divide intermediate_size {inner}"
    if shape.ssm and shape.ssm.heads and shape.ssm.heads % tp:  # mamba_utils.py: divide()
        yield f"tensor_parallel_size {tp} does not divide the {shape.ssm.heads} state-space heads"
    yield from _experts(shape, parallel)
    if scheme is not None and tp > 1:
        yield from _quantized(shape, parallel, scheme)
    if pp > shape.num_hidden_layers:
        yield f"pipeline_parallel_size {pp} is more than the {shape.num_hidden_layers} layers"
    if pp > 1 and not shape.causal:  # config/model.py:1423: no SupportsPP
        yield f"{shape.architecture} cannot be split into pipeline stages"


def _experts(shape: ModelShape, parallel: Parallelism) -> Iterator[str]:
    if shape.moe is None:
        if parallel.expert_parallel:  # config/model.py: _verify_with_expert_parallelism
            yield "enable_expert_parallel needs a mixture of experts, which this model is not"
        return
    if parallel.expert_parallel:
        if parallel.expert > shape.moe.num_experts:
            yield f"{parallel.expert} expert-parallel ranks for {shape.moe.num_experts} experts"
    elif shape.moe.intermediate_size % parallel.expert:
        yield (
            f"TP × DP {parallel.expert} does not divide the experts' intermediate size "
            f"{shape.moe.intermediate_size}; enable_expert_parallel splits by whole experts"
        )


def _quantized(shape: ModelShape, parallel: Parallelism, scheme: Quantization) -> Iterator[str]:
    """Shards must hold whole quantization groups and blocks.

    distributed/utils.py:67 for groups, quantization/utils/fp8_utils.py:1197 for blocks. Block
    scales of experts are refined while loading (quantization/fp8.py:490), so they may be cut.
    """
    tp = parallel.tensor
    split: list[tuple[str, int]] = []
    if not all(shape.is_moe(i) for i in range(shape.num_hidden_layers)):
        split.append(("intermediate_size", shape.intermediate_size))
    if not shape.mla and shape.num_attention_heads:
        split.append(("the attention's width", shape.num_attention_heads * shape.head_dim))
    if shape.moe and not parallel.expert_parallel and scheme.block is None:
        split.append(("the experts' intermediate size", shape.moe.intermediate_size))
    unit, kind = (scheme.block[0], "block") if scheme.block else (scheme.group_size, "group")
    if unit <= 1:
        return
    for name, size in split:
        if size % tp == 0 and (size // tp) % unit:
            yield (
                f"tensor_parallel_size {tp} cuts {name} {size} into shards of {size // tp}, "
                f"no multiple of the {scheme.label} {kind} of {unit}"
            )


def tensor_sizes(shape: ModelShape, limit: int, scheme: Quantization | None = None) -> list[int]:
    """The tensor-parallel sizes up to ``limit`` that vLLM accepts, smallest first."""
    return [tp for tp in range(1, limit + 1) if not problems(shape, Parallelism(tp), scheme)]

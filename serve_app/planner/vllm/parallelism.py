"""The sizes of tensor, pipeline, data, expert and context parallelism that a model can take.

vLLM refuses other sizes too, but only once it holds the GPUs, and in terms of its layers. Each rule
here is one without which vLLM 0.29 does not start; its place in vLLM is beside it. Rules that need
more than ``config.json`` (a kernel's shapes, say) are left to vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from serve_app.errors import ConfigError
from serve_app.planner.model.quantization import Quantization
from serve_app.planner.model.shape import ModelShape
from serve_app.planner.vllm import sharding
from serve_app.planner.vllm.sharding import Parallelism

_MOST_GPUS_PER_GROUP = 64
_ARGUMENTS = {
    "tensor": "tensor_parallel_size",
    "pipeline": "pipeline_parallel_size",
    "data": "data_parallel_size",
    "context": "decode_context_parallel_size",
    "expert_parallel": "enable_expert_parallel",
}


def problems(
    shape: ModelShape, parallel: Parallelism, scheme: Quantization | None = None
) -> list[str]:
    """The reasons why ``shape`` cannot be split as ``parallel``, one sentence each."""
    return [why for _, why in _problems(shape, parallel, scheme)]


def refuse(shape: ModelShape, parallel: Parallelism) -> None:
    """Refuse sizes that the model cannot be split into.

    Raises:
        ConfigError: the first problem, and the values that the argument can take.
    """
    for why, remedy in remedies(shape, parallel):
        raise ConfigError(f"engine.{why}; {remedy}")


def remedies(
    shape: ModelShape,
    parallel: Parallelism,
    scheme: Quantization | None = None,
    *,
    largest_group: int = _MOST_GPUS_PER_GROUP,
) -> Iterator[tuple[str, str]]:
    """Each problem, with the values that the argument at fault can take instead."""
    most = {
        "tensor": largest_group,
        "pipeline": shape.num_hidden_layers,
        "data": _MOST_GPUS_PER_GROUP,
        "context": parallel.tensor,
    }
    for size, why in _problems(shape, parallel, scheme):
        if size not in most:
            yield why, f"remove {_ARGUMENTS[size]}"
            continue
        fitting = []
        for value in range(1, most[size] + 1):
            changed: dict[str, Any] = {size: value}
            if size not in dict(_problems(shape, replace(parallel, **changed), scheme)):
                fitting.append(value)
        yield why, f"{_ARGUMENTS[size]} can be {_listed(fitting)}"


def _listed(sizes: list[int]) -> str:
    if len(sizes) > 8 and sizes[-1] == len(sizes):
        return f"1 to {sizes[-1]}"
    return ", ".join(map(str, sizes))


def _problems(
    shape: ModelShape, parallel: Parallelism, scheme: Quantization | None
) -> Iterator[tuple[str, str]]:
    """Each problem: the field of ``parallel`` at fault, and the sentence."""
    tp, pp = parallel.tensor, parallel.pipeline
    for why in _tensor(shape, tp, scheme or shape.quantization):
        yield "tensor", f"tensor_parallel_size {tp} {why}"
    if pp > shape.num_hidden_layers:
        yield (
            "pipeline",
            f"pipeline_parallel_size {pp} is more than the {shape.num_hidden_layers} layers",
        )
    if pp > 1 and not shape.causal:  # config/model.py:1423: no SupportsPP
        yield (
            "pipeline",
            f"pipeline_parallel_size {pp}: {shape.architecture} cannot be split into stages",
        )
    yield from _experts(shape, parallel)
    yield from _context(shape, parallel)


def _tensor(shape: ModelShape, tp: int, scheme: Quantization | None) -> Iterator[str]:
    heads, kv = shape.num_attention_heads, shape.num_key_value_heads
    if heads and heads % tp:  # config/model.py:1411
        yield f"does not divide the {heads} attention heads"
    elif heads and not shape.mla:  # QKVParallelLinear, linear.py
        if tp >= kv and tp % kv:
            yield f"is no multiple of the {kv} KV heads"
        elif tp < kv and kv % tp:
            yield f"does not divide the {kv} KV heads"
    padded = -(-shape.vocab_size // sharding.VOCAB_PADDING) * sharding.VOCAB_PADDING
    if padded % tp:  # vocab_parallel_embedding.py: divide()
        yield f"does not divide the padded vocabulary ({padded})"
    if _has_dense_layers(shape) and shape.intermediate_size % tp:  # linear.py: divide()
        yield f"does not divide intermediate_size {shape.intermediate_size}"
    if shape.ssm and shape.ssm.heads and shape.ssm.heads % tp:  # mamba_utils.py: divide()
        yield f"does not divide the {shape.ssm.heads} state-space heads"
    if scheme is not None and tp > 1:
        yield from _quantized(shape, tp, scheme)


def _has_dense_layers(shape: ModelShape) -> bool:
    return not all(shape.is_moe(i) for i in range(shape.num_hidden_layers))


def _quantized(shape: ModelShape, tp: int, scheme: Quantization) -> Iterator[str]:
    """A rank must hold whole quantization groups of a matrix that is split along its input.

    See distributed/utils.py:67 for groups, quantization/utils/fp8_utils.py:1197 for blocks. The
    experts' kernels lack this limit (quantization/fp8.py:490, auto_awq.py:344, mxfp4.py:186). With
    act order every rank holds all scales (auto_gptq.py:367).
    """
    unit, kind = (scheme.block[1], "block") if scheme.block else (scheme.group_size, "group")
    if unit <= 1 or scheme.desc_act:
        return
    # The first and the last layers are often left unquantized.
    layer = f"model.layers.{shape.num_hidden_layers // 2}"
    head = shape.mla.v_head_dim if shape.mla else shape.head_dim
    split = [
        ("the attention's width", shape.num_attention_heads * head, f"{layer}.self_attn.o_proj")
    ]
    if _has_dense_layers(shape):
        split.append(("intermediate_size", shape.intermediate_size, f"{layer}.mlp.down_proj"))
    for name, size, module in split:
        if size % tp == 0 and (size // tp) % unit and not scheme.ignores(module):
            yield (
                f"cuts {name} {size} into shards of {size // tp}, "
                f"no multiple of the {scheme.label} {kind} of {unit}"
            )


def _experts(shape: ModelShape, parallel: Parallelism) -> Iterator[tuple[str, str]]:
    if shape.moe is None:
        if parallel.expert_parallel:  # config/model.py:1361
            yield (
                "expert_parallel",
                "enable_expert_parallel needs a mixture of experts, which this model is not",
            )
        if parallel.data > 1:  # engine/arg_utils.py:2220
            yield (
                "data",
                f"data_parallel_size {parallel.data} needs a mixture of experts, which this model "
                "is not; for more throughput set replicas",
            )
    # fused_moe/config.py:1349
    elif not parallel.expert_parallel and shape.moe.intermediate_size % parallel.expert:
        at_fault = "data" if parallel.data > 1 else "tensor"
        yield (
            at_fault,
            f"{_ARGUMENTS[at_fault]} {getattr(parallel, at_fault)} (TP × DP {parallel.expert}) "
            f"does not divide the experts' intermediate size {shape.moe.intermediate_size}; "
            "enable_expert_parallel splits by whole experts",
        )


def _context(shape: ModelShape, parallel: Parallelism) -> Iterator[tuple[str, str]]:
    """DCP splits the KV cache between ranks that would otherwise hold copies of the same heads."""
    tp, context = parallel.tensor, parallel.context
    heads, kv = shape.num_attention_heads, shape.num_key_value_heads
    why = None
    if tp % context:  # config/parallel.py:552
        why = f"does not divide tensor_parallel_size {tp}"
    elif context > 1 and not shape.mla and kv:  # config/model.py:1432
        if context > tp // kv:
            why = f"is more than the {max(1, tp // kv)} ranks that hold each of the {kv} KV heads"
        elif (heads // kv) % context:
            why = f"does not divide the {heads // kv} query heads of a KV head"
    if why:
        yield "context", f"decode_context_parallel_size {context} {why}"

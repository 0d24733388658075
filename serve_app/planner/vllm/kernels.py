"""What vLLM's kernels make of a checkpoint's tensors while it loads them.

A quantized layer is repacked for the kernel that the GPU's compute capability decides on, which can
need more memory than the checkpoint's tensors: rows and columns of zeros, wider zero points,
tensors that another kernel would drop. Everything else is kept as it is in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from serve_app.planner.model.names import role
from serve_app.planner.model.quantization import Quantization
from serve_app.planner.model.shape import ModelShape
from serve_app.planner.model.tensors import Tensor
from serve_app.planner.vllm.sharding import Parallelism

HOPPER = 90
_BLACKWELL = range(100, 110)  # of data centres; the others (120) have other kernels


@lru_cache(maxsize=64)
def held(
    tensors: tuple[Tensor, ...],
    shape: ModelShape,
    scheme: Quantization | None,
    parallel: Parallelism,
    capability: int,
) -> tuple[Tensor, ...]:
    """The tensors that vLLM keeps of ``tensors``, before they are split over ``parallel``.

    ``scheme`` is the quantization in use; ``capability`` the GPU's, times ten.
    """
    if scheme is None or scheme.online:
        return tensors
    if scheme.method in ("awq", "gptq"):
        machete = _machete(scheme, parallel, capability)
        return tuple(kept for one in tensors if (kept := _integers(one, scheme, machete)))
    if scheme.method == "mxfp4" and shape.moe is not None:
        rest = tuple(one for one in tensors if role(one.name) != "expert")
        return (*rest, *_mxfp4_experts(shape, parallel, capability))
    return tensors


def _machete(scheme: Quantization, parallel: Parallelism, capability: int) -> bool:
    """Whether linear layers run on Machete, which is before Marlin in vLLM's list.

    ``kernels/linear/mixed_precision/machete.py:29``. That an output must be a multiple of 128 is
    left out: heads and intermediate sizes of today's models are.
    """
    reordered = scheme.desc_act and parallel.tensor > 1
    return capability == HOPPER and scheme.group_size in (-1, 64, 128) and not reordered


def _integers(tensor: Tensor, scheme: Quantization, machete: bool) -> Tensor | None:
    """A tensor of AWQ or GPTQ as its kernel keeps it; None if it does not.

    Machete multiplies zero points by their scales, which makes them 16 bits wide
    (machete.py:98), and leaves those alone that a symmetric scheme ignores. Marlin keeps zero
    points packed, and empties what it does not use (marlin.py:171, 199). Experts run on Marlin,
    which there keeps zero points that are not used (auto_gptq.py:591).
    """
    expert = role(tensor.name) == "expert"
    if tensor.name.endswith(".g_idx"):
        return tensor if scheme.desc_act or (machete and not expert) else None
    if not tensor.name.endswith((".qzeros", ".weight_zero_point")):
        return tensor
    if not scheme.zero_points:
        return tensor if machete or expert else None
    if not machete or expert:
        return tensor
    *lead, last = tensor.shape
    per_word = int(32 / scheme.bits)
    return replace(tensor, dtype="F16", shape=(*lead, last * per_word))


def _mxfp4_experts(shape: ModelShape, parallel: Parallelism, capability: int) -> Iterator[Tensor]:
    """A layer's experts in mxfp4, padded as the kernel needs (fused_moe/oracle/mxfp4.py:713).

    The kernel is the first of vLLM's list that takes the GPU: Triton's on Hopper for gpt-oss,
    TRT-LLM's on Blackwell, else Marlin's. Each tensor is experts × ranks that split one × bytes of
    the rank's part.
    """
    moe = shape.moe
    assert moe is not None
    ranks = 1 if parallel.expert_parallel else parallel.expert
    inner, hidden = math.ceil(moe.intermediate_size / ranks), shape.hidden_size
    triton = capability == HOPPER and shape.model_type == "gpt_oss"
    if triton:
        inner = _up(inner, 64)
        rows, columns = 256, 4  # of scales: _swizzle_mxfp4, and HopperMXScaleLayout with 8 warps
    else:
        inner, hidden = _up(inner, 128), _up(hidden, 256)
        rows, columns = 1, 1
    parts = {
        "w13_weight": 2 * inner * hidden // 2,
        "w2_weight": hidden * inner // 2,
        "w13_weight_scale": _up(2 * inner, rows) * _up(hidden // 32, columns),
        "w2_weight_scale": _up(hidden, rows) * _up(inner // 32, columns),
    }
    if shape.model_type == "gpt_oss":  # its experts have biases, which Marlin leaves at 16 bits
        wide = 4 if triton or capability in _BLACKWELL else 2
        parts |= {"w13_bias": 2 * inner * wide, "w2_bias": hidden * wide}
    for layer in range(shape.num_hidden_layers):
        if shape.is_moe(layer):
            for name, size in parts.items():
                at = f"model.layers.{layer}.mlp.experts.{name}"
                yield Tensor(at, "U8", (moe.num_experts, ranks, size))


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit

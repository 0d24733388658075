"""One tensor of a checkpoint, and the bytes it takes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

# Bits per element, by the names that a safetensors header uses.
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "I64": 64, "U64": 64,
    "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip

FLOATS = ("F64", "F32", "F16", "BF16")

# The same, by the names that config.json and vLLM's --dtype use.
TORCH_DTYPES = {
    "float32": "F32", "float": "F32", "float16": "F16", "half": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip

PRECISION_BITS = {
    "fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """``count`` tensors of one shape. A ``*`` stands for the part in which their names differ."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int = 1

    @property
    def elements(self) -> int:
        return math.prod(self.shape) * self.count

    @property
    def nbytes(self) -> int:
        return math.ceil(self.elements * DTYPE_BITS[self.dtype] / 8)


def parameter_bytes(parameters: int, precision: str) -> int:
    """Bytes of ``parameters`` weights at a precision, without scales or padding.

    >>> [parameter_bytes(70 * 10**9, p) // 10**9 for p in ("fp32", "bf16", "int8", "int4")]
    [280, 140, 70, 35]
    """
    return math.ceil(parameters * PRECISION_BITS[precision] / 8)


_EXPERT = re.compile(r"(\.experts\.)\d+(\.)")


def grouped(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Group each layer's experts into one entry: a large MoE has tens of thousands of tensors."""
    counts: Counter[Tensor] = Counter()
    for tensor in tensors:
        key = replace(tensor, name=_EXPERT.sub(r"\1*\2", tensor.name), count=1)
        counts[key] += tensor.count
    return [replace(tensor, count=count) for tensor, count in counts.items()]

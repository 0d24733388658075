"""A part of one GPU's memory, and the ``gpu_memory_utilization`` that it is to vLLM.

All that a replica's process takes of the GPU counts against its part: also its CUDA context, which
vLLM takes before it measures anything. vLLM wants its share of the GPU free at the start even where
it is told the size of its KV cache (vllm/v1/worker/utils.py:516).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve_app.planner.hardware import CONTEXT_BYTES, GIB, GPU, MIB

KEY = "part_of_gpu"
"""Beside a config's engine arguments, the :class:`Share` of a replica that has a part of a GPU. It
is no argument of vLLM's."""

SPARE_BYTES = 256 * MIB
"""What a part keeps free: about the planner's own error. On a GPU of its own an engine measures
what is left for its KV cache; beside others it is told, before it has loaded anything."""


@dataclass(frozen=True)
class Share:
    """``resources.gpu_share`` or ``resources.gpu_memory_gib``, as a config says it: one of both."""

    fraction: float | None = None
    gib: float | None = None

    def bytes_of(self, gpu: GPU) -> int:
        """All that the replica may take of ``gpu``, its CUDA context included."""
        if self.gib is not None:
            return int(self.gib * GIB)
        return int((self.fraction or 0) * gpu.memory_bytes)

    def utilization(self, gpu: GPU) -> float:
        """The ``gpu_memory_utilization``, in whole ten-thousandths of ``gpu``."""
        budget = max(0, self.bytes_of(gpu) - CONTEXT_BYTES)
        return max(1, math.floor(budget / gpu.memory_bytes * 10_000)) / 10_000

    def of_size(self, fraction: float, gpu: GPU, *, down: bool = False) -> Share:
        """The part of ``gpu`` of this fraction, in the unit of this one: tenths of a GiB, rounded
        up or ``down``."""
        if self.gib is None:
            return Share(fraction=fraction)
        rounded = math.floor if down else math.ceil
        return Share(gib=rounded(10 * fraction * gpu.memory_gib) / 10)

    def __str__(self) -> str:
        """The setting as it is written."""
        if self.gib is not None:
            return f"gpu_memory_gib {self.gib:g}"
        return f"gpu_share {self.fraction:g}"

"""The bytes that PyTorch's CUDA allocator hands out beyond those that tensors ask for.

The allocator takes segments from the driver and splits them. It does not split where next to
nothing would be left, and, while vLLM loads a model, no block of 20 MiB or more
(vllm/v1/worker/gpu_worker.py:493). The whole block then counts as allocated
(``c10/cuda/CUDACachingAllocator.cpp``: ``get_allocation_size``, ``get_free_block``,
``should_split``). The difference is a few percent of a 135M and nothing beside a 70B.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Iterable

from serve_app.planner.hardware import MIB

_UNIT = 512  # kMinBlockSize
_SMALL = 1 * MIB  # kSmallSize: tensors up to this size share small segments
_SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
_SEGMENT = 20 * MIB  # kLargeBuffer
_LARGE = 10 * MIB  # kMinLargeAlloc: tensors from this size on get a segment each
_ROUND = 2 * MIB  # kRoundLarge
_MAX_SPLIT = 20 * MIB  # vLLM's max_split_size_mb: blocks from this size on are not split


def unsplit_bytes(sizes: Iterable[int]) -> int:
    """Bytes that tensors of these sizes, allocated in this order, hold beyond their sizes."""
    free: tuple[list[int], list[int]] = ([], [])  # sorted; the small and the large pool
    unsplit = 0
    for asked in sizes:
        size = -(-asked // _UNIT) * _UNIT
        unsplit += size - asked
        large = size > _SMALL
        pool = free[large]
        best = bisect_left(pool, size)
        block = pool.pop(best) if best < len(pool) else _segment(size)
        rest = block - size
        if size < _MAX_SPLIT and (rest > _SMALL if large else rest >= _UNIT):
            insort(pool, rest)
        else:
            unsplit += rest
    return unsplit


def _segment(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    return _SEGMENT if size < _LARGE else -(-size // _ROUND) * _ROUND


_MERGED = (
    (re.compile(r"\.experts\.\d+\."), ".experts."),
    (re.compile(r"\.(q_a_proj|kv_a_proj_with_mqa)\."), ".qkv_a_proj."),
    (re.compile(r"\.[qkv]_proj\."), ".qkv_proj."),
    (re.compile(r"\.(gate_proj|up_proj|w1|w3)\."), ".gate_up_proj."),
)


def merged(name: str) -> str:
    """The vLLM parameter that a checkpoint's tensor is loaded into, under a name of ours.

    vLLM merges q, k and v into one parameter, likewise gate and up, and all experts of a layer.
    """
    for pattern, together in _MERGED:
        name = pattern.sub(together, name)
    return name

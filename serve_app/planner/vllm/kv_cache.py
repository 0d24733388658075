"""Blocks, tokens and concurrency of the KV cache, as vLLM computes them.

Every function mirrors one of ``vllm/v1/core/kv_cache_utils.py`` or
``vllm/v1/kv_cache_interface.py`` (0.29.0), named in its docstring. A *page* is the memory of one
layer for one block of tokens on one GPU. Layers of one kind form *groups*; a block id stands for
one page in each layer of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from serve_app.planner.model.shape import SSM, LayerKind, ModelShape
from serve_app.planner.model.tensors import DTYPE_BITS, TORCH_DTYPES
from serve_app.planner.vllm.sharding import local_kv_heads

if TYPE_CHECKING:
    from serve_app.planner.vllm.defaults import EngineArgs

MambaMode = Literal["none", "align", "all"]


@dataclass(frozen=True)
class LayerSpec:
    """One layer's KV cache. ``page_bytes`` is for ``block_size`` tokens, on one GPU."""

    kind: LayerKind
    block_size: int
    page_bytes: int
    window: int = 0
    """Tokens of the sliding window or the attention chunk."""
    mamba_mode: MambaMode = "none"

    def blocks_per_request(self, length: int, in_flight: int) -> int:
        """The most blocks that a request of ``length`` tokens holds at a time.

        ``max_memory_usage_bytes`` of the spec classes in kv_cache_interface.py, in pages.
        ``in_flight`` is ``VllmConfig.max_in_flight_tokens`` (config/vllm.py:571).
        """
        if self.kind == "sliding":
            tokens = min(self.window - 1 + in_flight, length)
            return math.ceil(tokens / self.block_size) + 1
        if self.kind == "chunked":
            return math.ceil(min(self.window + in_flight, length) / self.block_size)
        if self.kind == "ssm":
            if self.mamba_mode == "all":
                return math.ceil(length / self.block_size)
            return 2 if self.mamba_mode == "align" else 1
        return math.ceil(length / self.block_size)


@dataclass(frozen=True)
class Group:
    """Layers that share block ids. ``layers`` are their positions in the model."""

    spec: LayerSpec
    layers: tuple[int, ...]
    pages: tuple[int, ...]
    """Page bytes of each layer. They differ only if all layers keep all tokens."""


@dataclass(frozen=True)
class KVCache:
    """The block pool of one replica. The pipeline stage with the fewest blocks decides its size."""

    num_blocks: int
    blocks_per_request: int
    max_model_len: int
    bytes_per_block: int
    """On that stage, over all its layers."""

    @property
    def max_concurrency(self) -> float:
        """``get_max_concurrency_for_kv_cache_config`` (kv_cache_utils.py:1047)."""
        return self.num_blocks / self.blocks_per_request if self.blocks_per_request else 0.0

    @property
    def tokens(self) -> int:
        """``get_kv_cache_capacity`` (kv_cache_utils.py:2011): what vLLM logs at start-up."""
        return int(self.max_concurrency * self.max_model_len)


def layer_specs(shape: ModelShape, engine: EngineArgs) -> list[tuple[int, LayerSpec]]:
    """Each layer's position and KV cache. An encoder's layers have none."""
    if not shape.causal:
        return []
    tensor, block_size, mamba_mode = engine.parallel.tensor, engine.block_size, engine.mamba_mode
    token_bytes = attention_bytes_per_token(shape, tensor, engine.kv_dtype)
    state_bytes = ssm_state_bytes(shape.ssm, tensor, shape.dtype) if shape.ssm else 0
    page = token_bytes * block_size
    if shape.ssm and token_bytes and "full" in shape.layers:
        block_size, page = _align_hybrid(
            token_bytes, state_bytes, block_size, mamba_mode, shape.mla is not None
        )
        state_bytes = page
    mamba_block = block_size if mamba_mode != "none" else engine.max_model_len
    state = LayerSpec("ssm", mamba_block, state_bytes, mamba_mode=mamba_mode)
    windows = {"sliding": shape.sliding_window, "chunked": shape.attention_chunk_size}
    specs: list[tuple[int, LayerSpec]] = []
    for layer, kind in enumerate(shape.layers):
        if kind == "ssm" or shape.model_type == "falcon_h1":  # both kinds in every layer
            specs.append((layer, state))
        if kind not in ("ssm", "none"):
            specs.append((layer, LayerSpec(kind, block_size, page, windows.get(kind) or 0)))
        if shape.model_type == "deepseek_v32":  # the indexer's keys (models/deepseek_v2.py:719)
            size = int(shape.config["index_head_dim"])
            specs.append((layer, LayerSpec("full", block_size, block_size * (size + size // 32))))
    return specs


def attention_bytes_per_token(shape: ModelShape, tensor: int, kv_dtype: str) -> int:
    """Bytes of a token's KV in one attention layer on one GPU (AttentionSpec.page_size_bytes)."""
    if shape.mla:
        # One latent vector, whole on every rank (mla_attention.py:1207).
        if kv_dtype == "fp8_ds_mla":
            return 656
        width = shape.mla.kv_lora_rank + shape.mla.qk_rope_head_dim
        return width * kv_dtype_bits(kv_dtype) // 8
    if not shape.num_attention_heads:
        return 0
    heads, size = local_kv_heads(shape, tensor), shape.head_dim
    if kv_dtype in ("int8_per_token_head", "fp8_per_token_head"):
        return heads * (2 * size + 8)  # two float32 scales (triton_attn.py:276)
    if kv_dtype == "int4_per_token_head":
        return heads * (size + 8)
    if kv_dtype.startswith("nvfp4"):
        return 2 * heads * (size // 2 + size // 16)  # flashinfer.py:395
    return heads * 2 * size * kv_dtype_bits(kv_dtype) // 8


def kv_dtype_bits(kv_dtype: str) -> int:
    return 8 if kv_dtype.startswith("fp8") else DTYPE_BITS[TORCH_DTYPES[kv_dtype]]


def ssm_state_bytes(ssm: SSM, tensor: int, dtype: str) -> int:
    """Bytes of one layer's state for one request on one GPU (mamba/mamba_utils.py:152-280)."""
    element = DTYPE_BITS[TORCH_DTYPES[dtype]] // 8
    state_element = DTYPE_BITS[TORCH_DTYPES.get(ssm.state_dtype or dtype, "F32")] // 8
    groups = ssm.groups
    conv_dim = ssm.conv_dim
    if groups and groups % tensor:  # extra_groups_for_head_shards
        conv_dim += 2 * (tensor - groups) * ssm.state_size
    conv = math.ceil(conv_dim / tensor) * (ssm.conv_kernel - 1)
    state = math.ceil(ssm.heads / tensor) * ssm.head_dim * ssm.state_size
    return conv * element + state * state_element


def _align_hybrid(
    token_bytes: int, state_bytes: int, block_size: int, mode: MambaMode, mla: bool
) -> tuple[int, int]:
    """Block size and page of a hybrid: ``_align_hybrid_block_size`` (platforms/interface.py:767).

    The attention block grows until its page holds a whole state; states are padded to that page.
    """
    step = max(block_size, 128) if mla else block_size
    if mode == "all":
        chunk = math.lcm(_MAMBA_CHUNK, step)
        tokens = math.ceil(state_bytes / token_bytes)
        aligned = chunk * math.ceil(tokens / chunk)
    else:
        aligned = step * math.ceil(state_bytes / (step * token_bytes))
    block_size = max(block_size, aligned)
    return block_size, block_size * token_bytes


_MAMBA_CHUNK = 256  # ModelConfig.get_mamba_chunk_size(): the config's, 256 for most checkpoints


def groups_of(specs: list[tuple[int, LayerSpec]], *, hybrid_manager: bool = True) -> list[Group]:
    """``get_kv_cache_groups`` (kv_cache_utils.py:1906), without the block-outermost packing.

    ``hybrid_manager`` is False under ``--disable-hybrid-kv-cache-manager``: sliding-window layers
    then get room for all tokens.
    """
    kept = list(specs)
    if not kept:
        return []
    if not hybrid_manager and any(spec.kind == "full" for _, spec in kept):
        kept = [
            (i, replace(s, kind="full", window=0) if s.kind in ("sliding", "chunked") else s)
            for i, s in kept
        ]
    if _same_slots([spec for _, spec in kept]):
        # One group for all, whatever their page sizes: _get_kv_cache_groups_uniform_type.
        layers = tuple(i for i, _ in kept)
        return [Group(kept[0][1], layers, tuple(spec.page_bytes for _, spec in kept))]
    kept = _unify_pages(kept)
    buckets: dict[LayerSpec, list[int]] = {}
    for i, spec in kept:
        buckets.setdefault(spec, []).append(i)
    # kv_cache_utils.py:1288: the smallest bucket sets the group size, unless padding all
    # buckets to the largest one wastes less than half of it.
    sizes = [len(layers) for layers in buckets.values()]
    size = max(sizes) if max(sizes) < min(sizes) * 1.5 else min(sizes)
    groups = []
    for spec, members in buckets.items():
        count = math.ceil(len(members) / size)
        for i in range(count):
            part = tuple(members[i::count])
            groups.append(Group(spec, part, (spec.page_bytes,) * len(part)))
    return groups


def _same_slots(specs: list[LayerSpec]) -> bool:
    """Whether all layers need the same number of blocks (UniformTypeKVCacheSpecs)."""
    keys = {(s.kind, s.window, s.block_size, s.mamba_mode) for s in specs}
    if len(keys) > 1:
        return False
    return specs[0].kind != "ssm" or len({s.page_bytes for s in specs}) == 1


def _unify_pages(kept: list[tuple[int, LayerSpec]]) -> list[tuple[int, LayerSpec]]:
    """``unify_kv_cache_spec_page_size`` (kv_cache_utils.py:1142): longer blocks or padding."""
    largest = max(spec.page_bytes for _, spec in kept)
    unified = []
    for i, spec in kept:
        if spec.page_bytes == largest or spec.kind == "ssm" or largest % spec.page_bytes:
            unified.append((i, replace(spec, page_bytes=largest)))
        else:
            ratio = largest // spec.page_bytes
            unified.append(
                (i, replace(spec, page_bytes=largest, block_size=spec.block_size * ratio))
            )
    return unified


def bytes_per_block(groups: list[Group], stage: range) -> int:
    """``_get_kv_cache_bytes_per_block`` (kv_cache_utils.py:1358) on one pipeline stage."""
    return max(
        (
            sum(
                page
                for layer, page in zip(group.layers, group.pages, strict=True)
                if layer in stage
            )
            for group in groups
        ),
        default=0,
    )


def blocks_per_request(groups: Sequence[Group], length: int, in_flight: int) -> int:
    """``_max_memory_usage_bytes_from_groups`` (kv_cache_utils.py:2042), in blocks."""
    return sum(group.spec.blocks_per_request(length, in_flight) for group in groups)


def allocate(
    groups: list[Group],
    stages: list[range],
    available: list[int],
    *,
    max_model_len: int,
    in_flight: int,
    override: int | None = None,
) -> KVCache:
    """The blocks that fit the memory that each stage has left (``get_kv_cache_configs``, :2207).

    The stage with room for the fewest decides for all. ``override`` is
    ``--num-gpu-blocks-override``.
    """
    per_request = blocks_per_request(groups, max_model_len, in_flight)
    per_block = [bytes_per_block(groups, stage) for stage in stages]
    affordable = [
        (max(0, bytes_) // size, size)
        for bytes_, size in zip(available, per_block, strict=True)
        if size
    ]
    blocks, size = min(affordable, default=(0, 0))
    return KVCache(override or blocks, per_request, max_model_len, size)


def longest_model_len(
    groups: list[Group], stages: list[range], available: list[int], *, most: int, in_flight: int
) -> int:
    """The longest context that fits, 0 if none (``_estimate_max_model_len_from_groups``, :2072)."""

    per_block = [bytes_per_block(groups, stage) for stage in stages]

    def fits(length: int) -> bool:
        # One block is the null block that the pool keeps back (:2313).
        blocks = blocks_per_request(groups, length, in_flight) + 1
        return all(blocks * size <= free for size, free in zip(per_block, available, strict=True))

    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low

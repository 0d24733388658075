"""vLLM's defaults for the engine arguments that memory depends on.

vLLM 0.29 derives each argument that a user leaves out from the GPU and the model. This module does
the same; beside each default is the place in vLLM that it follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve_app.config.engine_args import MOST_GPUS, count, too_few_tokens
from serve_app.errors import ConfigError
from serve_app.planner.hardware import GIB, GPU
from serve_app.planner.model import quantization
from serve_app.planner.model.quantization import Quantization
from serve_app.planner.model.shape import ModelShape
from serve_app.planner.model.tensors import TORCH_DTYPES
from serve_app.planner.vllm import offload
from serve_app.planner.vllm.kv_cache import MambaMode
from serve_app.planner.vllm.offload import Offload
from serve_app.planner.vllm.sharding import Parallelism
from serve_app.planner.vllm.share import KEY, Share

DEFAULT_UTILIZATION = 0.92  # vllm/config/cache.py:111
DEFAULT_BLOCK_SIZE = 16  # vllm/config/cache.py: DEFAULT_BLOCK_SIZE


@dataclass(frozen=True)
class LoRA:
    """Room for adapters (vllm/config/lora.py)."""

    max_loras: int = 1
    max_lora_rank: int = 16


@dataclass(frozen=True)
class Draft:
    """Speculative decoding. ``model`` is None where the draft has no weights of its own."""

    method: str
    num_speculative_tokens: int
    model: str | None = None

    @property
    def in_checkpoint(self) -> bool:
        """Whether the draft is the MTP layers of a checkpoint: the model's own, or ``model``'s."""
        return self.method.endswith("mtp")


@dataclass(frozen=True)
class EngineArgs:
    """Engine arguments with every default resolved. Lengths and batches are in tokens."""

    parallel: Parallelism
    capability: int
    """The GPU's, times ten: it decides which kernels run."""
    gpu_memory_utilization: float
    max_model_len: int
    pooling: bool
    """Whether the engine embeds, scores or classifies; then the model's head is not loaded."""
    fit_max_model_len: bool
    """``max_model_len: -1``: the longest context that the KV cache allows."""
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str
    kv_dtype: str
    block_size: int
    mamba_mode: MambaMode
    hybrid_manager: bool
    cudagraph_sizes: tuple[int, ...]
    async_scheduling: bool
    quantization: Quantization | None
    lora: LoRA | None
    draft: Draft | None
    offload: Offload
    kv_cache_memory_bytes: int | None
    num_gpu_blocks_override: int | None
    part_bytes: int | None = None
    """What the replica may take of its GPU, where others share it."""

    @property
    def in_flight_tokens(self) -> int:
        """``VllmConfig.max_in_flight_tokens`` (config/vllm.py:559-580), V2 model runner."""
        batches = self.parallel.pipeline + (1 if self.async_scheduling else 0)
        return batches * self.max_num_batched_tokens


def resolve(
    arguments: dict[str, Any],
    shape: ModelShape,
    gpu: GPU,
    parallel: Parallelism | None = None,
) -> EngineArgs:
    """Resolve ``arguments`` (a config's ``engine``, checked already) as vLLM does on ``gpu``.

    ``parallel`` overrides the parallel sizes in the arguments.

    Raises:
        ConfigError: a value that vLLM would refuse, and what to change.
    """
    get = arguments.get
    parallel = parallel or parallelism(arguments)
    utilization = get("gpu_memory_utilization")
    part: Share | None = get(KEY)
    if utilization is None:
        utilization = part.utilization(gpu) if part else DEFAULT_UTILIZATION
    utilization = float(utilization)
    asked_len = count(get("max_model_len"), "max_model_len", least=-1)
    fit_len = asked_len == -1
    max_len = shape.max_position_embeddings if asked_len in (None, -1) else asked_len
    assert max_len is not None
    if max_len < 1:
        raise ConfigError(f"engine.max_model_len is {asked_len}, but must be at least 1 (or -1)")
    pooling = _pools(arguments, shape)
    tokens, seqs = _batch_limits(arguments, shape, gpu, max_len, pooling=pooling)
    dtype = _dtype(get("dtype"), shape, gpu, pooling=pooling)
    draft = draft_of(arguments)
    eager = bool(get("enforce_eager")) or get("optimization_level") in (0, "0")
    query_len = 1 + (draft.num_speculative_tokens if draft else 0)
    most = 1024 if shape.model_type == "gpt_oss" else None  # models/config.py:408
    graphs = () if eager else cudagraph_sizes(arguments, gpu, seqs, tokens, query_len, most)
    return EngineArgs(
        parallel=parallel,
        capability=gpu.capability,
        gpu_memory_utilization=utilization,
        max_model_len=max_len,
        pooling=pooling,
        fit_max_model_len=fit_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        dtype=dtype,
        kv_dtype=_kv_dtype(get("kv_cache_dtype"), shape, dtype),
        block_size=_block_size(get("block_size"), shape, gpu),
        mamba_mode=_mamba_mode(arguments, shape),
        hybrid_manager=not get("disable_hybrid_kv_cache_manager"),
        cudagraph_sizes=graphs,
        async_scheduling=get("async_scheduling") is not False,
        quantization=_quantization(get("quantization"), shape),
        lora=_lora(arguments),
        draft=draft,
        offload=offload.of(arguments),
        kv_cache_memory_bytes=count(get("kv_cache_memory_bytes"), "kv_cache_memory_bytes"),
        num_gpu_blocks_override=count(get("num_gpu_blocks_override"), "num_gpu_blocks_override"),
        part_bytes=part.bytes_of(gpu) if part else None,
    )


class TooFewTokens(ConfigError):
    """A ``max_num_seqs`` above the ``max_num_batched_tokens`` that the GPU gets by default."""


def parallelism(arguments: dict[str, Any]) -> Parallelism:
    """The parallel sizes that a config sets; 1 where it sets none."""

    def size(name: str) -> int:
        value = count(arguments.get(name), name) or 1
        if value > MOST_GPUS:
            raise ConfigError(f"engine.{name} is {value}; no cluster has that many GPUs")
        return value

    # Separate prefill ranks have other rules (config/parallel.py:553), left to vLLM.
    prefill = size("prefill_context_parallel_size")
    return Parallelism(
        size("tensor_parallel_size"),
        size("pipeline_parallel_size"),
        size("data_parallel_size"),
        bool(arguments.get("enable_expert_parallel")),
        size("decode_context_parallel_size") if prefill == 1 else 1,
    )


def _pools(arguments: dict[str, Any], shape: ModelShape) -> bool:
    """``ModelConfig._get_runner_type`` (config/model.py)."""
    runner = arguments.get("runner") or "auto"
    if runner != "auto":
        return bool(runner == "pooling")
    return shape.pooling or (arguments.get("convert") or "auto") not in ("auto", "none")


def _batch_limits(
    arguments: dict[str, Any], shape: ModelShape, gpu: GPU, max_len: int, *, pooling: bool
) -> tuple[int, int]:
    """``max_num_batched_tokens`` and ``max_num_seqs`` (engine/arg_utils.py:2669-2940)."""
    asked_tokens = count(arguments.get("max_num_batched_tokens"), "max_num_batched_tokens")
    asked_seqs = count(arguments.get("max_num_seqs"), "max_num_seqs")
    if gpu.memory_bytes >= 160 * GIB:
        tokens, seqs = 16384, 1024
    elif gpu.memory_bytes >= 70 * GIB and not gpu.name.startswith("A100"):
        tokens, seqs = 8192, 1024
    else:
        tokens, seqs = 2048, 256
    if arguments.get("performance_mode") == "throughput":
        tokens, seqs = 2 * tokens, 2 * seqs
    seqs = asked_seqs or seqs
    if asked_tokens is None:
        # Encoders, and decoders that pool by mean or first token, cannot chunk a prompt.
        chunked = arguments.get("enable_chunked_prefill")
        if chunked is None:
            chunked = shape.causal
        if not chunked:
            tokens = max(max_len, tokens)
        tokens = min(seqs * max_len, tokens)
    else:
        tokens = asked_tokens
    if asked_seqs is None:
        seqs = min(seqs, tokens)
    if seqs > tokens:
        raise TooFewTokens(too_few_tokens(tokens, seqs))
    return tokens, seqs


def _dtype(asked: Any, shape: ModelShape, gpu: GPU, *, pooling: bool) -> str:
    """``_get_and_verify_dtype`` (config/model.py:2268): float32 is halved, to bf16 if it runs."""
    name = str(asked or "auto")
    if name != "auto":
        return {"half": "float16", "float": "float32"}.get(name, name)
    no_fp16 = shape.model_type in ("gemma2", "gemma3", "gemma3_text", "glm4")
    preferred = "float16" if not gpu.supports_bf16 or (pooling and not no_fp16) else "bfloat16"
    if shape.dtype in ("float32", "float"):
        return preferred
    if shape.dtype == "bfloat16" and not gpu.supports_bf16:
        return "float16"
    return shape.dtype if shape.dtype in TORCH_DTYPES else preferred


_KV_DTYPES = (
    "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_ds_mla", "int4_per_token_head",
    "int8_per_token_head", "fp8_per_token_head", "nvfp4", "nvfp4_4over6",
)  # fmt: skip


def _kv_dtype(asked: Any, shape: ModelShape, dtype: str) -> str:
    name = str(asked or "auto")
    if name == "auto":
        scheme = shape.quantization
        return (scheme.kv_cache_dtype if scheme else None) or dtype
    if name not in _KV_DTYPES:
        raise ConfigError(f"engine.kv_cache_dtype '{name}' is not planned for; use one of "
                          f"auto, {', '.join(_KV_DTYPES)}")  # fmt: skip
    return name


def _block_size(asked: Any, shape: ModelShape, gpu: GPU) -> int:
    """Tokens per KV cache block: 16, unless the attention backend takes only larger blocks.

    MLA on Blackwell runs on FlashInfer, whose smallest block is 32
    (platforms/cuda.py:82, attention/backends/mla/flashinfer_mla.py:162).
    """
    if asked is not None:
        size = count(asked, "block_size") or DEFAULT_BLOCK_SIZE
        if gpu.name != "CPU" and size % 16:  # get_supported_kernel_block_sizes of every backend
            raise ConfigError(
                f"engine.block_size is {size}, but vLLM's attention takes multiples of 16"
            )
        return size
    return 32 if shape.mla and 100 <= gpu.capability < 120 else DEFAULT_BLOCK_SIZE


def _mamba_mode(arguments: dict[str, Any], shape: ModelShape) -> MambaMode:
    """``MambaModelConfig`` (models/config.py:614): prefix caching keeps states at block ends."""
    if shape.ssm is None:
        return "none"
    caching = arguments.get("enable_prefix_caching")
    if caching is None:
        caching = "full" in shape.layers  # off for attention-free models
    if not caching:
        return "none"
    return "all" if arguments.get("mamba_cache_mode") == "all" else "align"


def cudagraph_sizes(
    arguments: dict[str, Any],
    gpu: GPU,
    max_num_seqs: int,
    max_tokens: int,
    query_len: int = 1,
    of_model: int | None = None,
) -> tuple[int, ...]:
    """Batch sizes that graphs are captured for (config/vllm.py:1990-2130).

    ``of_model`` is the largest one that the model's class sets where the arguments do not.
    """
    compilation = arguments.get("compilation_config")
    compilation = compilation if isinstance(compilation, dict) else {}
    if str(compilation.get("cudagraph_mode", "")).upper() == "NONE":
        return ()
    listed = arguments.get("cudagraph_capture_sizes") or compilation.get("cudagraph_capture_sizes")
    if isinstance(listed, list) and listed:
        return tuple(sorted({int(size) for size in listed if int(size) <= max_tokens}))
    name = "max_cudagraph_capture_size"
    most = arguments.get(name) or compilation.get(name) or of_model
    limit = 1024 if 100 <= gpu.capability < 110 else 512
    most = int(most) if most is not None else min(2 * max_num_seqs * query_len, limit)
    most = min(most, max_tokens)
    sizes = {size for size in (1, 2, 4) if size <= most}
    sizes |= set(range(8, min(most + 1, 256), 8))
    sizes |= set(range(256, most + 1, 16))
    if max_tokens <= most:
        sizes.add(max_tokens)
    if query_len > 1:  # a decode step of speculation is query_len tokens per request
        requests = {n for n in (1, 2, 4, *range(8, 256, 8)) if n <= max_num_seqs}
        sizes |= {n * query_len for n in requests if n * query_len <= most}
    return tuple(sorted(sizes))


def _quantization(asked: Any, shape: ModelShape) -> Quantization | None:
    """The quantization in use: the checkpoint's own, or one applied while loading."""
    if shape.quantization is not None or asked in (None, "auto"):
        return shape.quantization
    return quantization.online(str(asked))


def _lora(arguments: dict[str, Any]) -> LoRA | None:
    if not arguments.get("enable_lora"):
        return None
    return LoRA(
        count(arguments.get("max_loras"), "max_loras") or 1,
        count(arguments.get("max_lora_rank"), "max_lora_rank") or 16,
    )


def draft_of(arguments: dict[str, Any]) -> Draft | None:
    """The speculative decoding that a config asks for, if any."""
    config = arguments.get("speculative_config")
    config = dict(config) if isinstance(config, dict) else {}
    for short, name in (("spec_method", "method"), ("spec_model", "model"),
                        ("spec_tokens", "num_speculative_tokens")):  # fmt: skip
        if arguments.get(short) is not None:
            config.setdefault(name, arguments[short])
    if not config:
        return None
    model = config.get("model")
    method = str(config.get("method") or ("draft_model" if model else "ngram"))
    tokens = count(config.get("num_speculative_tokens"), "speculative_config tokens") or 1
    if method in ("ngram", "ngram_gpu", "suffix"):
        model = None
    return Draft(method, tokens, str(model) if model else None)

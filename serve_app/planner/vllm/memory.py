"""The memory budget of one GPU, line by line as vLLM measures it at start-up.

vLLM's budget is ``ceil(total × gpu_memory_utilization)``. It loads the weights, runs one dummy
batch, captures (a sample of) its CUDA graphs, and gives the KV cache the rest of the budget
(``vllm/v1/worker/gpu_worker.py:513-673``)::

    KV cache = requested - weights - non-torch - buffers - activation peak - CUDA graphs

Weights, buffers and the KV cache follow exactly from shapes. The activation peak is the sum of the
tensors that are alive at once at the widest point of a layer. Non-torch memory and CUDA graphs
depend on the driver: they are the constants below, measured on an H200 (docs/planner-accuracy.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from serve_app.planner.hardware import CONTEXT_BYTES, GIB, GPU, MIB
from serve_app.planner.model import derive, names
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.model.quantization import Quantization
from serve_app.planner.model.shape import ModelShape
from serve_app.planner.model.tensors import DTYPE_BITS, TORCH_DTYPES, Tensor
from serve_app.planner.vllm import allocator, kernels, kv_cache, offload, sharding
from serve_app.planner.vllm.defaults import EngineArgs, LoRA
from serve_app.planner.vllm.kv_cache import Group, KVCache
from serve_app.planner.vllm.sharding import Parallelism
from serve_app.planner.vllm.share import SPARE_BYTES

# --- Measured on one H200 (benchmarks/results/planner_h200.json), unless said otherwise. --------

NON_TORCH_BYTES = 230 * MIB
"""Growth outside PyTorch's allocator from vLLM's first snapshot to after the dummy batch: kernel
modules and library workspaces. The same for all models."""

ALLOCATOR_SLACK_BYTES = 64 * MIB
"""Memory that PyTorch's allocator then has reserved but not handed out: 6 to 123 MiB, mean 49."""

WARM_UP_BYTES = 120 * MIB
"""The same for what vLLM loads when it warms up, after it has measured what is left: of interest
where it is told its KV cache's size. 123 MiB for an 8B on an H100, where nothing else came on top
(benchmarks/results/shares-h100.json)."""

COMMUNICATION_BYTES = int(0.1 * GIB)
"""Buffers of the custom all-reduce where TP or PP exceeds 1, as TP 4 on H100s had them; NCCL's own
are there before vLLM's first snapshot."""

TORCH_STATE_BYTES = 32 * MIB
"""Small persistent tensors that are not modelled one by one (cuBLAS workspaces, sampler state)."""

CUDAGRAPH_BASE_BYTES = 150 * MIB
"""Memory pool of the first graph: activations of the largest captured batch."""

CUDAGRAPH_BYTES_PER_GRAPH = int(1.0 * MIB)
"""For each graph of a decode step; vLLM counts at least 1 MiB (cudagraph_utils.py:714)."""

CUDAGRAPH_BYTES_PER_LAYER = int(0.47 * MIB)
"""For each layer and graph of a decode step: a line through models of 32, 48 and 64 layers."""

FRONT_END_BYTES = int(1.1 * GIB)
"""Host memory of one more front end: 1.06 GiB in vLLM's API servers, mostly imports."""

# ------------------------------------------------------------------------------------------------

TIGHT_SHARE = 0.03
"""A plan is tight if its KV cache exceeds the need of one request by less than this share of the
GPU, or of its part of one: that is within the planner's own error (docs/planner-accuracy.md)."""

MLA_WORKSPACE_TOKENS = 64 * 1024  # mla_attention.py:2176


@dataclass(frozen=True)
class GPUMemory:
    """The memory budget of one GPU of a pipeline stage, in bytes."""

    total: int
    requested: int
    weights: int
    non_torch: int
    buffers: int
    """Request state, sampler state and MoE workspaces that vLLM allocates once."""
    activation: int
    cudagraph: int
    kv_cache: int
    """The rest of the budget; below zero where the other parts exceed it."""

    @property
    def without_kv(self) -> int:
        return self.weights + self.non_torch + self.buffers + self.activation + self.cudagraph

    @property
    def taken(self) -> int:
        """What vLLM takes beside the CUDA context: its budget, or more where the config sets the
        size of the KV cache."""
        return max(self.requested, self.without_kv + max(0, self.kv_cache))


@dataclass(frozen=True)
class Plan:
    """A model's layout on GPUs of one type: parallelism, memory budgets, KV cache."""

    model: Model
    engine: EngineArgs
    gpu: GPU
    stages: tuple[GPUMemory, ...]
    """The budget of one GPU of each pipeline stage, first to last."""
    cache: KVCache
    groups: tuple[Group, ...]
    kv_bytes_per_token: int
    """On one GPU of the tightest stage, over its layers that keep every token."""
    fits: bool
    reasons: tuple[str, ...]
    host_bytes: int = 0
    """Pinned host memory of the whole replica: what is offloaded to it."""

    @property
    def parallel(self) -> Parallelism:
        return self.engine.parallel

    @property
    def tightest(self) -> GPUMemory:
        """The stage whose GPUs have the least memory left for the KV cache."""
        return min(self.stages, key=lambda stage: stage.kv_cache)

    @property
    def tight(self) -> bool:
        """Whether it fits, but could fail by the planner's own error."""
        if not self.fits or not self.groups or self.gpu.name == "CPU":
            return False
        needed = self.cache.bytes_per_block * self.cache.blocks_per_request
        total = self.engine.part_bytes or self.tightest.total
        return self.tightest.kv_cache - needed < TIGHT_SHARE * total

    @property
    def draft_weights(self) -> int:
        """Bytes of weights on one GPU that only speculative decoding needs."""
        return draft_weight_bytes(self.model, self.engine)

    @property
    def weights_on_all_gpus(self) -> int:
        """Bytes of weights over the replica's GPUs; each data-parallel rank has its own."""
        ranks = self.parallel.tensor * self.parallel.data
        return ranks * sum(stage.weights for stage in self.stages)

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens that the replica's KV cache holds, over all its data-parallel ranks."""
        return self.cache.tokens * self.parallel.data if self.fits else 0

    def concurrency(self, length: int | None = None) -> float:
        """Requests of ``length`` tokens (None: ``max_model_len``) that run at once.

        ``max_num_seqs`` is the scheduler's own limit, which vLLM's log leaves out.
        """
        if not self.fits:
            return 0.0
        return min(self.room(length), float(self.engine.max_num_seqs * self.parallel.data))

    def room(self, length: int | None = None) -> float:
        """Requests of ``length`` tokens that the KV cache holds; without one, any number."""
        if not self.groups:
            return math.inf
        if length is None:
            return self.cache.max_concurrency * self.parallel.data
        blocks = kv_cache.blocks_per_request(self.groups, length, self.engine.in_flight_tokens)
        return self.cache.num_blocks / blocks * self.parallel.data


def plan(model: Model, engine: EngineArgs, gpu: GPU) -> Plan:
    """Lay ``model`` out on GPUs of one type as ``engine`` says.

    Raises:
        ConfigError: the model cannot use this dtype or block size of the KV cache.
    """
    shape, parallel = model.shape, engine.parallel
    parts = sharding.stages(shape.num_hidden_layers, parallel.pipeline)
    requested = math.ceil(gpu.memory_bytes * engine.gpu_memory_utilization)
    weights = weight_bytes(model, engine)
    graphs = cudagraph_bytes(shape, engine)
    alone = parallel.gpus == 1
    in_part = bool(engine.part_bytes)
    spare = SPARE_BYTES if in_part else 0
    stages = []
    for index in range(parallel.pipeline):
        first, last = index == 0, index == parallel.pipeline - 1
        memory = GPUMemory(
            total=gpu.memory_bytes,
            requested=requested,
            weights=weights[index],
            non_torch=NON_TORCH_BYTES
            + ALLOCATOR_SLACK_BYTES
            + (0 if alone else COMMUNICATION_BYTES)
            + (WARM_UP_BYTES if in_part else 0),
            buffers=buffer_bytes(shape, engine, first=first, last=last),
            activation=activation_bytes(shape, engine, last=last, sampling=in_part),
            cudagraph=graphs,
            kv_cache=0,
        )
        left = engine.kv_cache_memory_bytes or requested - memory.without_kv - spare
        stages.append(replace(memory, kv_cache=left))
    specs = kv_cache.layer_specs(shape, engine)
    specs += _draft_specs(model, engine, specs)
    groups = kv_cache.groups_of(specs, hybrid_manager=engine.hybrid_manager)
    if not groups:  # an encoder: what is left over stays free
        stages = [replace(stage, kv_cache=min(0, stage.kv_cache)) for stage in stages]
    # Draft layers come after the model's own and run on the last stage.
    parts[-1] = range(parts[-1].start, shape.num_hidden_layers + len(specs))
    free = [stage.kv_cache for stage in stages]
    in_flight = engine.in_flight_tokens
    longest = kv_cache.longest_model_len(
        groups, parts, free, most=engine.max_model_len, in_flight=in_flight
    )
    if engine.fit_max_model_len and longest:
        engine = replace(engine, max_model_len=longest)
    cache = kv_cache.allocate(
        groups,
        parts,
        free,
        max_model_len=engine.max_model_len,
        in_flight=in_flight,
        override=engine.num_gpu_blocks_override,
    )
    reasons = _why_not(stages, groups, engine, longest, gpu)
    token_bytes = max(
        sum(
            page // group.spec.block_size
            for group in groups
            if group.spec.kind == "full"
            for layer, page in zip(group.layers, group.pages, strict=True)
            if layer in part
        )
        for part in parts
    )
    return Plan(
        model,
        engine,
        gpu,
        tuple(stages),
        cache,
        tuple(groups),
        token_bytes,
        not reasons,
        reasons,
        host_bytes(model, engine),
    )


def _why_not(
    stages: Sequence[GPUMemory], groups: list[Group], engine: EngineArgs, longest: int, gpu: GPU
) -> tuple[str, ...]:
    reasons = []
    budget = engine.part_bytes
    part = f"its part of {gpu.name} ({budget / GIB:.1f} GiB)" if budget else ""
    worst = min(stages, key=lambda stage: stage.kv_cache)
    if worst.kv_cache <= 0 and (groups or worst.kv_cache < 0):
        reasons.append(
            f"weights, activations and CUDA graphs take {worst.without_kv / GIB:.1f} GiB, but "
            f"{part} leaves {worst.requested / GIB:.1f} beside the CUDA context"
            if part
            else f"weights, activations and CUDA graphs take {worst.without_kv / GIB:.1f} GiB per "
            f"GPU, but {worst.requested / GIB:.1f} GiB of {gpu.name}'s {gpu.memory_gib:.1f} are "
            f"vLLM's (gpu_memory_utilization {engine.gpu_memory_utilization:g})"
        )
    elif groups and longest < (1 if engine.fit_max_model_len else engine.max_model_len):
        reasons.append(
            f"the KV cache has {worst.kv_cache / GIB:.1f} GiB per GPU, which holds {longest} "
            f"tokens of one request, but max_model_len is {engine.max_model_len}"
        )
    taken = CONTEXT_BYTES + worst.taken
    if budget and not reasons and taken > budget:
        reasons.append(
            f"engine.gpu_memory_utilization or kv_cache_memory_bytes takes {taken / GIB:.1f} GiB "
            f"with the CUDA context, more than {part}"
        )
    elif not reasons and engine.kv_cache_memory_bytes and taken > gpu.memory_bytes:
        reasons.append(
            f"engine.kv_cache_memory_bytes {engine.kv_cache_memory_bytes / GIB:.1f} GiB beside "
            f"weights, activations and CUDA graphs takes {taken / GIB:.1f} GiB of {gpu.name}, "
            f"which has {gpu.memory_gib:.1f}"
        )
    if budget and budget > gpu.memory_bytes:
        reasons.append(
            f"a part of {budget / GIB:.1f} GiB is more than {gpu.name} has ({gpu.memory_gib:.1f})"
        )
    elif gpu.memory_bytes - CONTEXT_BYTES < worst.requested:
        reasons.append(
            f"gpu_memory_utilization {engine.gpu_memory_utilization:g} leaves no room for the "
            f"CUDA context; at most {(gpu.memory_bytes - CONTEXT_BYTES) / gpu.memory_bytes:.2f}"
        )
    return tuple(reasons)


def element_bytes(engine: EngineArgs) -> int:
    """Bytes of one activation."""
    return DTYPE_BITS[TORCH_DTYPES[engine.dtype]] // 8


# --- weights -----------------------------------------------------------------------------------


def weight_bytes(model: Model, engine: EngineArgs) -> list[int]:
    """The bytes that vLLM logs as "Model loading took", for one GPU of each pipeline stage."""
    unsplit = [
        allocator.unsplit_bytes(parameters.values())
        for parameters in _parameters(
            _held(model, engine), model.shape, engine.parallel, engine.dtype
        )
    ]
    return [sum(both) for both in zip(tensor_bytes(model, engine), unsplit, strict=True)]


def tensor_bytes(model: Model, engine: EngineArgs) -> list[int]:
    """The same without the CUDA allocator's rounding: parameters and permanent tables."""
    shape, parallel = model.shape, engine.parallel
    stages = _parameters(_held(model, engine), shape, parallel, engine.dtype)
    totals = [
        sum(parameters.values()) - offload.moved(parameters, engine.offload)[1]
        for parameters in stages
    ]
    for index, part in enumerate(sharding.stages(shape.num_hidden_layers, parallel.pipeline)):
        totals[index] += rope_bytes(shape, engine.dtype)
        totals[index] += len(part) * mla_copy_bytes(shape, engine)
    if engine.lora:
        for index, extra in enumerate(_lora_bytes(shape, engine, engine.lora)):
            totals[index] += extra
    totals[-1] += draft_weight_bytes(model, engine)
    return totals


def host_bytes(model: Model, engine: EngineArgs) -> int:
    """Pinned host memory of one replica: weights and KV cache that its GPUs do not hold."""
    parallel = engine.parallel
    stages = _parameters(_held(model, engine), model.shape, parallel, engine.dtype)
    weights = sum(offload.moved(parameters, engine.offload)[0] for parameters in stages)
    return parallel.data * (parallel.tensor * weights + engine.offload.kv_cache)


_parameters = lru_cache(maxsize=64)(sharding.stage_parameters)


def _held(model: Model, engine: EngineArgs) -> tuple[Tensor, ...]:
    scheme = engine.quantization
    tensors = tensors_in_use(model, scheme)
    if engine.pooling:  # models/adapters.py: _create_pooling_model_cls
        tensors = tuple(one for one in tensors if "lm_head" not in one.name.split("."))
    return kernels.held(tensors, model.shape, scheme, engine.parallel, engine.capability)


def tensors_in_use(model: Model, scheme: Quantization | None) -> tuple[Tensor, ...]:
    """The checkpoint's tensors, quantized if the engine arguments ask for it."""
    if scheme is None or not scheme.online or model.shape.quantization is not None:
        return model.tensors
    return _quantized(model.tensors, scheme)


@lru_cache(maxsize=64)
def _quantized(tensors: tuple[Tensor, ...], scheme: Quantization) -> tuple[Tensor, ...]:
    return tuple(derive.quantized(list(tensors), scheme))


def rope_bytes(shape: ModelShape, dtype: str) -> int:
    """The table of cosines and sines, shared by all layers (rotary_embedding/base.py:76)."""
    rotary = shape.causal or shape.model_type in ("modernbert", "nomic_bert")
    if not rotary or not shape.num_attention_heads:
        return 0
    width = shape.mla.qk_rope_head_dim if shape.mla else shape.head_dim
    width = int(width * float(shape.config.get("partial_rotary_factor") or 1))
    width = int(shape.config.get("rotary_dim") or width)
    if shape.model_type == "gpt_oss":
        dtype = "float32"  # models/gpt_oss.py:111
    return _rope_rows(shape) * width * DTYPE_BITS[TORCH_DTYPES[dtype]] // 8


def _rope_rows(shape: ModelShape) -> int:
    """Positions that the tables have, by the kind of scaling (rotary_embedding/__init__.py:85)."""
    rope = shape.config.get("rope_parameters") or shape.config.get("rope_scaling") or {}
    of_windows = "gemma3" in shape.model_type or "sliding_attention" in rope
    of_windows = of_windows or shape.model_type == "modernbert"
    rope = rope.get("full_attention", rope)
    kind, factor = rope.get("rope_type") or rope.get("type"), float(rope.get("factor") or 1)
    own = int(shape.config.get("max_position_embeddings") or shape.max_position_embeddings)
    original = int(rope.get("original_max_position_embeddings") or own)
    rows = own
    if "yarn" in str(kind):
        rows = int(original * factor)
    elif kind == "linear":
        rows = int(own * factor)
    elif kind in ("longrope", "su"):  # a table for short contexts, and one for long ones
        rows = own + int(shape.config.get("original_max_position_embeddings") or original)
    if "mrope_section" in rope:
        rows *= 4  # mrope.py: positions of a video
    if shape.model_type == "deepseek_v32":
        rows *= 2  # the indexer's has another order (deepseek_v2.py:1163)
    # The layers with windows of some models have a table without scaling.
    return rows + (own if of_windows else 0)


def mla_copy_bytes(shape: ModelShape, engine: EngineArgs) -> int:
    """Per layer: the 16-bit halves of a quantized ``kv_b_proj`` (mla_attention.py:1086-1188).

    Without quantization they are views of the weight itself.
    """
    if shape.mla is None or engine.quantization is None:
        return 0
    heads = shape.num_attention_heads // engine.parallel.tensor
    width = shape.mla.qk_nope_head_dim + shape.mla.v_head_dim
    return shape.mla.kv_lora_rank * heads * width * 2


def _lora_bytes(shape: ModelShape, engine: EngineArgs, lora: LoRA) -> list[int]:
    """Slots for LoRA adapters beside every linear layer (vllm/lora/layers/base_linear.py:100).

    A rank keeps A whole and its share of B for a column-parallel layer; the reverse for a
    row-parallel one.
    """
    parallel = engine.parallel
    parts = sharding.stages(shape.num_hidden_layers, parallel.pipeline)
    totals = [0] * parallel.pipeline
    for tensor in derive.unquantized(shape) if shape.known else ():
        layer = names.layer_of(tensor.name)
        if layer is None or layer >= shape.num_hidden_layers or not names.is_linear(tensor):
            continue
        out, inputs = tensor.shape
        split = names.role(tensor.name)
        tp = parallel.expert if split == "expert" else parallel.tensor
        if split == "row":
            inputs = math.ceil(inputs / tp)
        elif split != "linear":
            out = math.ceil(out / tp)
        size = lora.max_loras * lora.max_lora_rank * (out + inputs) * tensor.count
        stage = next(i for i, part in enumerate(parts) if layer in part)
        totals[stage] += size * element_bytes(engine)
    return totals


def draft_weight_bytes(model: Model, engine: EngineArgs) -> int:
    """Weights that only speculative decoding needs, on one GPU of the last stage."""
    draft = engine.draft
    if draft is None:
        return 0
    if draft.in_checkpoint:
        of = model.draft or model
        return sum(
            sharding.rank_bytes(tensor, of.shape, engine.parallel, engine.dtype)
            for tensor in of.tensors
            if names.is_loaded(tensor, of.shape, draft=True)
            and not names.is_loaded(tensor, of.shape)
        )
    if model.draft is None:
        return 0
    alone = replace(engine.parallel, pipeline=1)
    return sum(
        sharding.stage_weights(model.draft.tensors, model.draft.shape, alone, engine.dtype)
    ) + rope_bytes(model.draft.shape, engine.dtype)


def _draft_specs(
    model: Model, engine: EngineArgs, own: Sequence[tuple[int, kv_cache.LayerSpec]]
) -> list[tuple[int, kv_cache.LayerSpec]]:
    """The KV cache of the draft's layers, which come after the model's ``own``."""
    if engine.draft is None:
        return []
    first = model.shape.num_hidden_layers
    if engine.draft.in_checkpoint:
        shape = (model.draft or model).shape
        layers = max(1, shape.draft_layers)
    elif model.draft is not None:
        shape, layers = model.draft.shape, model.draft.shape.num_hidden_layers
    else:
        return []
    full = [spec.block_size for _, spec in own if spec.kind == "full"]  # longer in a hybrid
    block_size = max(full, default=engine.block_size)
    page = block_size * kv_cache.attention_bytes_per_token(
        shape, engine.parallel.tensor, engine.kv_dtype
    )
    spec = kv_cache.LayerSpec("full", block_size, page)
    return [(first + i, spec) for i in range(layers)]


# --- buffers, activations, graphs --------------------------------------------------------------


def buffer_bytes(shape: ModelShape, engine: EngineArgs, *, first: bool, last: bool) -> int:
    """Tensors that vLLM's model runner allocates once (vllm/v1/worker/gpu/, V2 runner)."""
    seqs, tokens = engine.max_num_seqs, engine.max_num_batched_tokens
    element = element_bytes(engine)
    total = TORCH_STATE_BYTES
    total += tokens * (4 + 8 + 1)  # input ids, positions, padding: input_batch.py:28
    if last and not engine.pooling:
        words = math.ceil(shape.vocab_size / 32)
        total += seqs * (
            4 * words  # tokens of the prompt, for penalties: sample/penalties.py:35
            + 4 * shape.vocab_size  # counts of output tokens: sample/penalties.py:43
            + 4 * words  # grammar bit mask: structured_outputs.py:55
            + 4 * (3 * 1024 + 128)  # allowed ids, biases, stop ids: sample/logit_bias.py:10
            + 4 * (1024 + 129)  # bad words: envs.py:1134-1140
        )
    if not first:
        total += 2 * tokens * shape.hidden_size * element  # intermediate tensors of a PP stage
    if shape.vision is not None and first:
        total += tokens * shape.hidden_size * element  # input embeddings
    return total + moe_workspace_bytes(shape, engine)


def moe_workspace_bytes(shape: ModelShape, engine: EngineArgs) -> int:
    """The two workspaces of the fused experts (fused_moe/experts/triton_moe.py:218).

    vLLM keeps them after the dummy batch (vllm/v1/worker/workspace.py). With data parallelism a
    rank sees the tokens of all ranks.
    """
    if shape.moe is None:
        return 0
    parallel = engine.parallel
    share = 1 if parallel.expert_parallel else parallel.expert
    inner = math.ceil(shape.moe.intermediate_size / share)
    rows = engine.max_num_batched_tokens * parallel.data * shape.moe.top_k
    hidden = shape.hidden_size
    return rows * (max(inner, hidden) + max(2 * inner, hidden)) * element_bytes(engine)


def activation_bytes(
    shape: ModelShape, engine: EngineArgs, *, last: bool, sampling: bool = False
) -> int:
    """Peak of the dummy batch (``profile_run``, v1/worker/gpu/model_runner.py:851).

    That batch samples greedily. With ``sampling`` it is the peak of the warm-up's, which have three
    float32 copies of their logits (v1/worker/gpu/sample/sampler.py:227, those that pass top-k, and
    their probabilities).

    The largest of the MLP, attention, the experts and, on the last stage, the logits. The residual
    and the layer's input are alive in each of them.
    """
    tokens, tp = engine.max_num_batched_tokens, engine.parallel.tensor
    element = element_bytes(engine)
    hidden = shape.hidden_size
    stream = 2 * tokens * hidden
    places = [stream + tokens * (3 * math.ceil(shape.intermediate_size / tp) + hidden)]
    heads = math.ceil(shape.num_attention_heads / tp)
    if shape.mla:
        mla = shape.mla
        width = mla.qk_nope_head_dim + mla.v_head_dim
        query = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        latent = mla.kv_lora_rank + mla.qk_rope_head_dim + (mla.q_lora_rank or 0)
        # The dummy batch reserves the up-projected context of chunked prefill
        # (mla_attention.py:779, size by :2158).
        context = min(
            max(8 * engine.max_model_len, 4 * engine.max_num_seqs * engine.block_size),
            MLA_WORKSPACE_TOKENS,
        )
        places.append(
            stream + tokens * (query + latent + heads * mla.v_head_dim) + context * heads * width
        )
    elif heads:
        kv = sharding.local_kv_heads(shape, tp)
        places.append(stream + tokens * (shape.head_dim * (2 * heads + 2 * kv) + hidden))
    if shape.moe:
        shared = math.ceil(shape.moe.shared_intermediate_size / tp)
        # Router logits are float32.
        router = math.ceil(tokens * shape.moe.num_experts * 4 / element)
        places.append(stream + tokens * (2 * hidden + 3 * shared) + router)
    if shape.ssm:
        inner = math.ceil((shape.ssm.conv_dim + 2 * shape.ssm.inner_size) / tp)
        places.append(stream + tokens * 2 * inner)
    if last and not engine.pooling:
        requests = min(engine.max_num_seqs, tokens)
        # All-gathered logits are a second copy (layers/logits_processor.py: _gather_logits).
        copies = 1 if tp == 1 else 1 + 1 / tp
        logits = math.ceil(requests * shape.vocab_size * copies)
        if sampling:
            logits += math.ceil(requests * shape.vocab_size * 3 * 4 / element)
        places.append(tokens * hidden + requests * hidden + logits)
    return math.ceil(max(places) * element)


def cudagraph_bytes(shape: ModelShape, engine: EngineArgs) -> int:
    """vLLM's own estimate before capture (v1/worker/gpu/cudagraph_utils.py:718).

    What grows with their number are graphs of whole decode steps, whose batches are of at most
    ``max_num_seqs`` requests (:195). Graphs of pieces share one pool.
    """
    if not engine.cudagraph_sizes:
        return 0
    query_len = 1 + (engine.draft.num_speculative_tokens if engine.draft else 0)
    graphs = sum(size <= engine.max_num_seqs * query_len for size in engine.cudagraph_sizes)
    layers = math.ceil(shape.num_hidden_layers / engine.parallel.pipeline)
    per_size = CUDAGRAPH_BYTES_PER_GRAPH + layers * CUDAGRAPH_BYTES_PER_LAYER
    return CUDAGRAPH_BASE_BYTES + graphs * per_size


def shm_bytes(workers: int) -> int:
    """Bytes of /dev/shm that vLLM's message queues can fill on a node with that many workers.

    There is one queue to all workers (10 × 16 MiB: envs.VLLM_MQ_MAX_CHUNK_BYTES_MB) and one from
    each (10 × 24 MiB: shm_broadcast.py:472). NCCL's own segments come on top.
    """
    return 0 if workers == 1 else (160 + 240 * workers) * MIB


# --- the CPU engine ----------------------------------------------------------------------------

CPU_BLOCK_SIZE = 128  # vllm/platforms/cpu.py
DEFAULT_CPU_KV_GIB = 1
"""VLLM_CPU_KVCACHE_SPACE that serve_app/config/environment.py sets where a config does not."""


def plan_on_cpu(
    model: Model,
    engine: EngineArgs,
    kv_gib: float,
    memory_gib: float | None,
    front_ends: int = 1,
) -> Plan:
    """The plan on vLLM's CPU engine, whose KV cache has ``kv_gib`` of host memory.

    ``memory_gib`` is the host memory reserved for the replica; None leaves that check out.
    """
    engine = replace(engine, block_size=CPU_BLOCK_SIZE, cudagraph_sizes=())
    specs = kv_cache.layer_specs(model.shape, engine)
    groups = kv_cache.groups_of(specs, hybrid_manager=engine.hybrid_manager)
    space = int(kv_gib * GIB) if groups else 0
    part = [range(model.shape.num_hidden_layers)]
    longest = kv_cache.longest_model_len(
        groups, part, [space], most=engine.max_model_len, in_flight=engine.in_flight_tokens
    )
    if engine.fit_max_model_len and longest:
        engine = replace(engine, max_model_len=longest)
    stage = GPUMemory(
        total=int((memory_gib or 0) * GIB),
        requested=0,
        weights=sum(tensor_bytes(model, engine)),
        non_torch=(front_ends - 1) * FRONT_END_BYTES,
        buffers=0,
        activation=activation_bytes(model.shape, engine, last=True),
        cudagraph=0,
        kv_cache=space,
    )
    stage = replace(stage, requested=stage.without_kv + space)
    reasons = []
    if groups and longest < engine.max_model_len:
        reasons.append(
            f"the KV cache has {kv_gib:g} GiB (env.VLLM_CPU_KVCACHE_SPACE), which holds {longest} "
            f"tokens of one request, but max_model_len is {engine.max_model_len}"
        )
    if memory_gib and stage.requested > stage.total:
        reasons.append(
            f"the replica needs about {stage.requested / GIB:.1f} GiB of host memory, but "
            f"resources.memory_gib is {memory_gib:g}"
        )
    cache = kv_cache.allocate(
        groups, part, [space], max_model_len=engine.max_model_len,
        in_flight=engine.in_flight_tokens,
    )  # fmt: skip
    per_token = sum(
        page // group.spec.block_size
        for group in groups
        for page in group.pages
        if group.spec.kind == "full"
    )
    cpu = GPU("CPU", None, 0, stage.total, 0, None)
    return Plan(
        model, engine, cpu, (stage,), cache, tuple(groups), per_token, not reasons, tuple(reasons)
    )

"""The smallest TP×PP that fits per GPU type, and the EC2 instances for it.

"Smallest" means the fewest GPUs. Among equals, tensor parallelism within one machine comes before
pipeline stages across machines, as vLLM advises (TP = GPUs per node, PP = nodes).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from serve_app.cluster.placement import SWAP_GROUP_UTILIZATION
from serve_app.config.settings import ModelConfig
from serve_app.planner import hardware
from serve_app.planner.hardware import GPU
from serve_app.planner.model import quantization
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.model.quantization import FP8_HARDWARE_CAPABILITY, Quantization
from serve_app.planner.vllm import defaults, memory, parallelism, share
from serve_app.planner.vllm.memory import Plan
from serve_app.planner.vllm.sharding import Parallelism

MAX_NODES = 4
"""Machines that one replica may span in this search; a config may ask for more."""


@dataclass(frozen=True)
class Choice:
    """One GPU type: the smallest plan that fits, or why none does."""

    gpu: GPU
    plan: Plan | None
    refused: str | None = None

    @property
    def total_memory_bytes(self) -> int:
        return self.plan.parallel.gpus * self.gpu.memory_bytes if self.plan else 0


def arguments_of(config: ModelConfig) -> dict[str, Any]:
    """A config's engine arguments, with LoRA on if it has adapters (replica/engine.py), and with
    the part of a GPU that it asks for."""
    arguments = dict(config.engine)
    if config.resources.part_of_gpu:
        resources = config.resources
        arguments[share.KEY] = share.Share(resources.gpu_share, resources.gpu_memory_gib)
    if config.adapters:
        arguments.setdefault("enable_lora", True)
    if config.resources.swap_group and config.resources.device == "gpu":
        arguments.setdefault("gpu_memory_utilization", SWAP_GROUP_UTILIZATION)
    return arguments


def plan_on(
    model: Model, arguments: dict[str, Any], gpu: GPU, parallel: Parallelism | None = None
) -> Plan:
    """One plan, split as the arguments say or as ``parallel``. It never fits if vLLM cannot start.

    Raises:
        ConfigError: arguments that vLLM would refuse on any GPU.
    """
    engine = defaults.resolve(arguments, model.shape, gpu, parallel)
    refused = refusal(engine.quantization, engine, gpu)
    wrong = parallelism.problems(model.shape, engine.parallel, engine.quantization)
    if wrong:
        # The sizes would not be whole numbers; show the undivided model instead.
        alone = replace(engine, parallel=Parallelism())
        found = memory.plan(model, alone, gpu)
        found = replace(found, engine=engine)
    else:
        found = memory.plan(model, engine, gpu)
    reasons = (*wrong, *([refused] if refused else []), *(() if wrong else found.reasons))
    if found.reasons and not wrong and not refused and share.KEY in arguments:
        reasons += (_enough(model, arguments, gpu),)
    return replace(found, fits=not reasons, reasons=reasons)


def _enough(model: Model, arguments: dict[str, Any], gpu: GPU) -> str:
    """The smallest part of ``gpu`` that would do, in a sentence."""
    part: share.Share = arguments[share.KEY]

    def fits(percent: int) -> bool:
        larger = arguments | {share.KEY: part.of_size(percent / 100, gpu)}
        return memory.plan(model, defaults.resolve(larger, model.shape, gpu), gpu).fits

    percent = bisect.bisect_left(range(100), True, key=fits)
    if percent < 100:
        return f"{part.of_size(percent / 100, gpu)} would fit"
    return f"no part of {gpu.name} is enough; remove {str(part).split()[0]}"


def refusal(scheme: Quantization | None, engine: defaults.EngineArgs, gpu: GPU) -> str | None:
    """Why vLLM cannot run this precision on ``gpu``; None where it can."""
    if gpu.capability < 75:
        # Prebuilt vLLM has kernels from compute capability 7.5 on (CMakeLists.txt).
        return f"{gpu.name} (compute capability {gpu.capability / 10}) is too old for vLLM's wheels"
    if scheme is not None and gpu.capability < scheme.min_capability:
        return (
            f"{scheme.label} needs compute capability {scheme.min_capability / 10}, "
            f"{gpu.name} has {gpu.capability / 10}"
        )
    if engine.dtype == "bfloat16" and not gpu.supports_bf16:
        return f"{gpu.name} has no bfloat16; set engine.dtype: float16"
    if engine.kv_dtype.startswith("fp8") and gpu.capability < FP8_HARDWARE_CAPABILITY:
        return f"an fp8 KV cache needs compute capability 8.9, {gpu.name} has {gpu.capability / 10}"
    return None


def smallest(model: Model, arguments: dict[str, Any], gpu: GPU) -> Choice:
    """The smallest layout on one GPU type. Data parallelism stays as the arguments say.

    One that is tight is taken only if no other fits.
    """
    asked = defaults.parallelism(arguments)
    closest: Plan | None = None
    tight: Plan | None = None
    for parallel in layouts(model, arguments, gpu):
        found = plan_on(model, arguments, gpu, parallel)
        if found.fits and not found.tight:
            return Choice(gpu, found)
        if found.fits:
            tight = tight or found
            continue
        refused = refusal(found.engine.quantization, found.engine, gpu)
        if refused:
            return Choice(gpu, None, refused)
        closest = found
    if tight is not None:
        return Choice(gpu, tight)
    if closest is None:
        alone = replace(asked, tensor=1, pipeline=1)
        return Choice(gpu, None, "; ".join(parallelism.problems(model.shape, alone)))
    reasons = "; ".join(closest.reasons)
    if share.KEY in arguments:
        return Choice(gpu, None, reasons)
    return Choice(gpu, None, f"not even {closest.parallel}: {reasons}")


def layouts(
    model: Model, arguments: dict[str, Any], gpu: GPU, gpus: int | None = None
) -> Iterator[Parallelism]:
    """Layouts by number of GPUs, within a machine before across machines.

    ``gpus`` is the number of GPUs of the one machine that there is; None searches all machines.
    """
    asked = defaults.parallelism(arguments)
    scheme = defaults.resolve(arguments, model.shape, gpu).quantization
    if share.KEY in arguments:  # of one GPU
        gpus = 1
    sizes = [
        tp
        for tp in range(1, (gpus or hardware.max_gpus_per_node(gpu)) + 1)
        if not parallelism.problems(model.shape, replace(asked, tensor=tp, pipeline=1), scheme)
    ]
    stages = range(1, MAX_NODES + 1) if model.shape.causal and gpus is None else range(1, 2)
    found = [(tp, pp) for tp in sizes for pp in stages if pp == 1 or tp == max(sizes)]
    for tp, pp in sorted(found, key=lambda layout: (layout[0] * layout[1], layout[1])):
        yield replace(asked, tensor=tp, pipeline=pp)


def per_gpu_type(model: Model, arguments: dict[str, Any]) -> list[Choice]:
    """A choice for every GPU type: those that fit by total GPU memory (a proxy for price) first."""
    choices = [_choice(model, arguments, gpu) for gpu in hardware.gpus().values()]
    return sorted(choices, key=lambda choice: (choice.plan is None, choice.total_memory_bytes))


def _choice(model: Model, arguments: dict[str, Any], gpu: GPU) -> Choice:
    """One type's default of ``max_num_batched_tokens`` may be too small, another's not."""
    try:
        return smallest(model, arguments, gpu)
    except defaults.TooFewTokens as error:
        return Choice(gpu, None, str(error))


def least(choices: list[Choice]) -> Choice | None:
    """Of those of :func:`per_gpu_type`, the one with the least GPU memory; None where none fits."""
    return choices[0] if choices and choices[0].plan else None


@dataclass(frozen=True)
class Lighter:
    """A precision that would make the model fit on fewer GPUs."""

    name: str
    gpus: int
    weights_bytes: int
    """Over all GPUs of the replica."""
    how: str


def lighter(model: Model, arguments: dict[str, Any], gpu: GPU, gpus: int) -> list[Lighter]:
    """The quantizations of a 16-bit checkpoint that need fewer GPUs than ``gpus``."""
    if model.shape.quantization is not None or arguments.get("quantization"):
        return []
    options = [
        (quantization.ONLINE["fp8"], "engine.quantization: fp8 (made while loading)"),
        (
            Quantization("awq", bits=4, group_size=128, zero_points=True),
            "an AWQ or GPTQ int4 checkpoint of the model",
        ),
    ]
    found = []
    for scheme, how in options:
        packed = tuple(_repacked(model, scheme))
        shape = replace(model.shape, quantization=scheme)
        lighter_model = replace(model, shape=shape, tensors=packed)
        choice = smallest(lighter_model, arguments, gpu)
        if choice.plan and choice.plan.parallel.gpus < gpus:
            fewer, weights = choice.plan.parallel.gpus, choice.plan.weights_on_all_gpus
            found.append(Lighter(scheme.label, fewer, weights, how))
    return found


def _repacked(model: Model, scheme: Quantization) -> tuple[Any, ...]:
    return memory.tensors_in_use(model, replace(scheme, online=True))

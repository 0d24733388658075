"""The smallest TP×PP that fits per GPU type, and the EC2 instances for it.

"Smallest" means the fewest GPUs. Among equals, tensor parallelism within one machine comes before
pipeline stages across machines, as vLLM advises (TP = GPUs per node, PP = nodes).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve_app.cluster.placement import SWAP_GROUP_UTILIZATION
from serve_app.config import yaml_files
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.planner import hardware
from serve_app.planner.hardware import GPU, MIB, Instance
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


@dataclass(frozen=True)
class Machines:
    """EC2 machines for one replica. ``price`` is USD per hour for all of them, if known."""

    instance: Instance
    count: int
    stranded_gpus: int
    """GPUs of these machines that the replica leaves idle."""
    price: float | None


@dataclass(frozen=True)
class RefusedInstance:
    name: str
    reason: str


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


# --- machines ----------------------------------------------------------------------------------


def machines(
    found: Plan, config: ModelConfig | None, prices: dict[str, float] | None = None
) -> tuple[list[Machines], list[RefusedInstance]]:
    """The EC2 machines that a replica runs on, best first, and why others do not.

    Best is cheapest where prices are given, else fewest idle GPUs, then fewest machines.
    """
    parallel = found.parallel
    cpu_m = 1000 * (own_cpus(config) if config else 1)
    reserved_mib = 1024 * ((config.resources.memory_gib if config else None) or 0)
    good: list[Machines] = []
    refused: list[RefusedInstance] = []
    for instance in hardware.instances().values():
        if instance.gpu is not found.gpu:
            continue
        if instance.gpus < parallel.tensor:
            refused.append(
                RefusedInstance(
                    instance.name,
                    f"{instance.gpus} GPU{'s' * (instance.gpus > 1)}: a tensor-parallel group of "
                    f"{parallel.tensor} would span machines",
                )
            )
            continue
        # A machine holds whole tensor-parallel groups.
        groups_per_node = instance.gpus // parallel.tensor
        groups = parallel.pipeline * parallel.data
        nodes = math.ceil(groups / groups_per_node)
        if nodes > 1 and not instance.efa and parallel.pipeline > 1:
            refused.append(
                RefusedInstance(instance.name, "spans machines, but the type has no EFA")
            )
            continue
        pinned_mib = found.host_bytes / MIB * min(1, groups_per_node / groups)
        host_mib = max(reserved_mib, pinned_mib)
        if cpu_m > instance.allocatable_cpu_m or host_mib > instance.allocatable_memory_mib:
            refused.append(
                RefusedInstance(
                    instance.name,
                    f"the replica asks for {cpu_m / 1000:g} CPUs and {host_mib / 1024:g} GiB, of "
                    f"which {instance.allocatable_cpu_m / 1000:g} and "
                    f"{instance.allocatable_memory_mib / 1024:.0f} are allocatable",
                )
            )
            continue
        price = prices.get(instance.name) if prices else None
        stranded = nodes * instance.gpus - parallel.gpus
        good.append(Machines(instance, nodes, stranded, price * nodes if price else None))
    good.sort(
        key=lambda m: (
            m.price if m.price is not None else math.inf,
            m.stranded_gpus,
            m.count,
            m.instance.allocatable_memory_mib,
        )
    )
    return good, refused


def own_cpus(config: ModelConfig) -> float:
    """The cores that a replica asks for; ``frontends: auto`` asks for none."""
    asked = config.resources.num_cpus
    return asked if config.frontends == "auto" else max(asked, config.frontends)


def read_prices(path: Path) -> dict[str, float]:
    """USD per hour by instance type, from a YAML or JSON mapping.

    Raises:
        UserError: unreadable, or a price that is not a positive number.
    """
    value = yaml_files.read(path)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: must be a mapping of instance type to USD per hour")
    for name, price in value.items():
        if isinstance(price, bool) or not isinstance(price, (int, float)) or price <= 0:
            raise UserError(f"{path}: the price of '{name}' is {price!r}, not a positive number")
    return {str(name): float(price) for name, price in value.items()}


def default_choice(
    choices: list[Choice], prices: dict[str, float] | None, config: ModelConfig | None
) -> Choice | None:
    """The GPU type to show first: cheapest with prices, else least total GPU memory."""
    fitting = [choice for choice in choices if choice.plan is not None]
    if not prices:
        return fitting[0] if fitting else None

    def cheapest(choice: Choice) -> float:
        assert choice.plan is not None
        good, _ = machines(choice.plan, config, prices)
        return min((m.price for m in good if m.price is not None), default=math.inf)

    return min(fitting, key=cheapest, default=None)

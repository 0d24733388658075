"""Whether a model can start as its config says, and on which machines.

The one place that says so: ``serve-app plan`` shows the verdict, and ``serve-app check`` makes a
line of each reason.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from serve_app.config.settings import ModelConfig
from serve_app.planner import ec2, hardware
from serve_app.planner.ec2 import Machines, RefusedInstance
from serve_app.planner.hardware import GIB, Instance
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.vllm.memory import Plan


@dataclass(frozen=True)
class Verdict:
    """A plan whose ``reasons`` are all that speaks against it, and the EC2 machines for it."""

    plan: Plan
    machines: list[Machines]
    refused: list[RefusedInstance]
    of_layout: bool
    """Whether GPUs, or how the model is split over them, are what speaks against it."""


def of(
    plan: Plan,
    config: ModelConfig,
    *,
    instance: Instance | None = None,
    prices: dict[str, float] | None = None,
) -> Verdict:
    """The verdict on a plan of :func:`choose.plan_on` or :func:`loading.cpu_plan`.

    ``instance`` is the only EC2 type that counts, if it is given.
    """
    on_gpus = plan.gpu.name != "CPU"
    machines, refused = ec2.machines(plan, config, prices) if on_gpus else ([], [])
    if instance is not None:
        refused = [one for one in refused if one.name == instance.name]
        machines = [one for one in machines if one.instance.name == instance.name]
    reasons = [*plan.reasons]
    if why := too_long(plan.model, plan.engine.max_model_len, config):
        reasons.append(why[0])
    if on_gpus and plan.fits:
        if why := beyond_machines(plan):
            reasons.append(why[0])
        elif not machines:
            reasons.append(_without_machine(refused, instance))
    if why := short_of_host_memory(plan, config):
        reasons.append(why[0])
    found = replace(plan, fits=not reasons, reasons=tuple(reasons))
    return Verdict(found, machines, refused, not plan.fits)


def too_long(model: Model, asked: int, config: ModelConfig) -> tuple[str, str] | None:
    """Why vLLM refuses a ``max_model_len`` beyond the model's own, and what to do."""
    longest = model.shape.max_position_embeddings
    if asked <= longest or allows_longer(config):
        return None
    return beyond_own(model, asked)


def beyond_own(model: Model, asked: int) -> tuple[str, str]:
    longest = model.shape.max_position_embeddings
    return f"max_model_len {asked} is above the model's {longest}", f"set it to {longest} or less"


def allows_longer(config: ModelConfig) -> bool:
    return (os.environ | config.env).get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") in ("1", "true")


def beyond_machines(plan: Plan) -> tuple[str, str] | None:
    """Why no machine has the GPUs of one tensor-parallel group, and what to do."""
    limit = hardware.max_gpus_per_node(plan.gpu)
    if plan.parallel.tensor <= limit:
        return None
    return (
        f"tensor_parallel_size {plan.parallel.tensor} is more than the {limit} GPUs of the largest "
        f"machine with {plan.gpu.name}",
        "use pipeline_parallel_size across machines",
    )


def _without_machine(refused: list[RefusedInstance], instance: Instance | None) -> str:
    if instance is not None:
        return f"{instance.name}: {refused[0].reason if refused else 'it has other GPUs'}"
    why = f" ({refused[0].name}: {refused[0].reason})" if refused else ""
    return f"no EC2 machine takes a replica{why}"


def short_of_host_memory(plan: Plan, config: ModelConfig) -> tuple[str, str] | None:
    """Why ``resources.memory_gib`` is too small for what is offloaded, and what to do."""
    reserved = config.resources.memory_gib
    if not reserved or plan.host_bytes <= reserved * GIB:
        return None
    pinned = plan.host_bytes / GIB
    return (
        f"what is offloaded pins {pinned:.1f} GiB of host memory, but resources.memory_gib is "
        f"{reserved:g}",
        "raise resources.memory_gib, or offload less",
    )

"""Checks of one model: its memory, precision, context length and parallelism.

:func:`refuse` has the checks that `serve-app run` waits for: models that certainly cannot start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from serve_app.cluster import autoscaling, placement
from serve_app.config.document import Fleet
from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError, UserError
from serve_app.planner import choose, front_ends, hardware, report
from serve_app.planner.finding import Finding
from serve_app.planner.hardware import GIB
from serve_app.planner.loading import cpu_plan, load_model
from serve_app.planner.model import metadata
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.model.quantization import FP8_HARDWARE_CAPABILITY
from serve_app.planner.vllm import defaults, parallelism
from serve_app.planner.vllm.memory import Plan


def refuse(fleet: Fleet) -> None:
    """Refuse a config that certainly cannot work, before ``serve-app run`` starts anything.

    Needs no network: a model whose metadata is not on this machine passes.

    Raises:
        ConfigError: the first model that cannot start, and what to change.
    """
    for name, config in fleet.models.items():
        if why := undeployable(config):
            raise ConfigError(f"{fleet.path}: application '{name}': {why}")
        if config.engine.keys() & metadata.OTHER_CONFIG:
            continue
        try:
            known = load_model(config, offline=True)
        except UserError:
            continue
        if why := impossible(config, known):
            raise ConfigError(f"{fleet.path}: application '{name}': {why} (--no-check skips this)")


def undeployable(config: ModelConfig) -> str | None:
    """Why the model's application would refuse to be built, or wait for GPUs in vain."""
    try:
        placement.of(config)
        autoscaling.deployment_options(config)
        hardware.refuse_misnamed(config.resources.accelerator_type)
    except ConfigError as error:
        return str(error)
    return None


def cores(name: str, config: ModelConfig) -> Iterator[Finding]:
    """Whether the config and EC2's machines have cores for the ``frontends`` that it sets."""
    if config.frontends == "auto":
        return
    resources = config.resources
    if "num_cpus" in resources.model_fields_set and resources.num_cpus < config.frontends:
        yield Finding(
            "front ends",
            "warn",
            name,
            f"frontends is {config.frontends}, but resources.num_cpus reserves "
            f"{resources.num_cpus:g}: each front end can keep a core busy",
            f"set resources.num_cpus to {config.frontends}, or lower frontends",
        )
    if resources.device == "cpu" or resources.accelerator_type is None:
        return
    try:
        known = hardware.with_accelerator(resources.accelerator_type, name)
    except ConfigError:
        return  # for which there is another finding
    machines = [i for i in known if i.gpus >= config.tensor_parallel_size]
    yield from too_few_cores(name, config, {i.name: front_ends.on_machine(i) for i in machines})


def too_few_cores(
    name: str, config: ModelConfig, places: Mapping[str, front_ends.Node]
) -> Iterator[Finding]:
    """A finding if none of the ``places`` has cores for the ``frontends`` that a config sets."""
    if config.frontends == "auto" or not places:
        return
    left = {place: front_ends.cores_left(config, node) for place, node in places.items()}
    place = max(left, key=left.__getitem__)
    if left[place] < config.frontends:
        yield Finding(
            "front ends",
            "warn",
            name,
            f"frontends is {config.frontends}, but a replica on {place} ({places[place]}) has "
            f"{max(0, math.floor(left[place]))} cores for them beside its engine and Ray",
            "lower frontends, or use machines with more cores per GPU",
        )


def model(name: str, config: ModelConfig) -> Iterator[Finding]:
    try:
        model = load_model(config)
    except UserError as error:
        yield Finding(
            "memory",
            "warn",
            name,
            f"not checked: {error}",
            "run the check where the model's metadata can be read",
        )
        return
    yield from checked(name, config, model)


def checked(name: str, config: ModelConfig, model: Model) -> Iterator[Finding]:
    """Memory, quantization, context and parallelism of one model."""
    if config.resources.device == "cpu":
        plan = cpu_plan(model, config)
        yield _memory_finding(name, config, plan, None)
        yield from _context(name, config, plan)
        return
    arguments = choose.arguments_of(config)
    asked = config.resources.accelerator_type
    try:
        if asked:
            gpu, _ = hardware.find(asked)
        else:
            best = choose.default_choice(choose.per_gpu_type(model, arguments), None, config)
            gpu = best.gpu if best else hardware.gpus()["H200"]
        plan = choose.plan_on(model, arguments, gpu)
    except UserError as error:
        yield Finding("memory", "fail", name, str(error), None)
        return
    yield from _parallelism(name, model, plan)
    if parallelism.problems(model.shape, plan.parallel, plan.engine.quantization):
        return
    yield from _quantization(name, plan)
    if asked is None:
        yield Finding(
            "memory",
            "warn",
            name,
            "resources.accelerator_type is not set, so the replica may start on any GPU",
            f"set it, for example to {gpu.ray_name or gpu.name}",
        )
    yield _memory_finding(name, config, plan, choose.smallest(model, arguments, gpu))
    yield from _context(name, config, plan)


_OFFLOADS = ("cpu_offload_gb", "cpu_offload_params", "offload_group_size", "offload_params")


def impossible(config: ModelConfig, model: Model) -> str | None:
    """Why the model could not start on any machine; None where it might.

    Unlike :func:`checked`, this uses no estimates. Weights that exceed the GPU are a reason;
    estimated activations, the KV cache and EC2's offers are not.
    """
    arguments = choose.arguments_of(config)
    for why, remedy in parallelism.remedies(model.shape, defaults.parallelism(arguments)):
        return f"engine.{why}; {remedy}"
    asked = config.resources.accelerator_type
    if asked is None or config.resources.device == "cpu":
        return None
    try:
        gpu, _ = hardware.find(asked)
        plan = choose.plan_on(model, arguments, gpu)
    except UserError:
        return None  # a GPU that the planner's tables lack may still be enough
    refused = choose.refusal(plan.engine.quantization, plan.engine, gpu)
    if refused or any(map(arguments.get, _OFFLOADS)):
        return refused
    if max(stage.weights for stage in plan.stages) < gpu.memory_bytes:
        return None
    found = _memory_finding("", config, plan, choose.smallest(model, arguments, gpu))
    return f"{found.message}; {found.fix}"


def _parallelism(name: str, model: Model, plan: Plan) -> Iterator[Finding]:
    limit = hardware.max_gpus_per_node(plan.gpu)
    wrong = [
        Finding("parallelism", "fail", name, problem, remedy)
        for problem, remedy in parallelism.remedies(
            model.shape, plan.parallel, plan.engine.quantization, largest_group=limit
        )
    ]
    if wrong:
        yield from wrong
        return
    if plan.parallel.tensor > limit:
        yield Finding(
            "parallelism",
            "fail",
            name,
            f"tensor_parallel_size {plan.parallel.tensor} is more than the {limit} GPUs of the "
            f"largest machine with {plan.gpu.name}",
            "use pipeline_parallel_size across machines",
        )
        return
    kv = model.shape.num_key_value_heads
    if not model.shape.mla and model.shape.causal and kv and plan.parallel.tensor > kv:
        yield Finding(
            "parallelism",
            "warn",
            name,
            f"TP {plan.parallel.tensor} is above the {kv} KV heads, which are then replicated: "
            "the KV cache does not shrink further",
            None,
        )
        return
    yield Finding("parallelism", "ok", name, f"{plan.parallel} divides what it must")


def _quantization(name: str, plan: Plan) -> Iterator[Finding]:
    scheme, gpu = plan.engine.quantization, plan.gpu
    refused = choose.refusal(scheme, plan.engine, gpu)
    if refused:
        yield Finding(
            "quantization", "fail", name, refused, "choose another GPU or another precision"
        )
    elif scheme and scheme.bits == 8 and "int8" not in scheme.method:
        if gpu.capability < FP8_HARDWARE_CAPABILITY:
            yield Finding(
                "quantization",
                "warn",
                name,
                f"{gpu.name} has no fp8 arithmetic: vLLM keeps the weights in fp8 but multiplies "
                "in 16 bits, which saves memory and no time",
                "L4, L40S, H100 and later multiply in fp8",
            )
        else:
            yield Finding("quantization", "ok", name, f"{scheme.label} runs on {gpu.name}")
    else:
        kind = scheme.label if scheme else plan.engine.dtype
        yield Finding("quantization", "ok", name, f"{kind} runs on {gpu.name}")


def _memory_finding(
    name: str, config: ModelConfig, plan: Plan, smallest: choose.Choice | None
) -> Finding:
    stage = plan.tightest
    if not plan.fits:
        fix = None
        if smallest and smallest.plan:
            fix = f"the smallest that fits on {plan.gpu.name} is {smallest.plan.parallel}"
        elif smallest:
            fix = f"no layout fits on {plan.gpu.name}: {smallest.refused}"
        return Finding("memory", "fail", name, "; ".join(plan.reasons), fix)
    if plan.gpu.name == "CPU":
        return Finding(
            "memory", "ok", name, f"about {stage.requested / GIB:.1f} GiB of host memory"
        )
    machines, refused = choose.machines(plan, config)
    takes = (
        f"{stage.without_kv / GIB:.1f} GiB and {max(0, stage.kv_cache) / GIB:.1f} GiB of KV cache "
        f"per {plan.gpu.name}"
    )
    if not machines and refused:
        return Finding(
            "memory",
            "fail",
            name,
            f"{takes}, but no EC2 machine takes a replica",
            f"{refused[0].name}: {refused[0].reason}",
        )
    where = ""
    if machines:
        best = machines[0]
        where = f", on {best.count} × {best.instance.name}"
        if best.stranded_gpus:
            where += f" ({best.stranded_gpus} GPUs idle)"
    tight = any("tight fit" in note for note in report.notes_on(plan))
    if tight:
        return Finding(
            "memory",
            "warn",
            name,
            f"{takes}{where}; less than 3 % to spare",
            "lower max_model_len or max_num_seqs, or add GPUs",
        )
    return Finding("memory", "ok", name, f"{takes}{where}")


def _context(name: str, config: ModelConfig, plan: Plan) -> Iterator[Finding]:
    longest, asked = plan.model.shape.max_position_embeddings, plan.engine.max_model_len
    if asked > longest:
        allowed = config.env.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") in ("1", "true")
        yield Finding(
            "context length",
            "warn" if allowed else "fail",
            name,
            f"max_model_len {asked} is above the model's {longest}",
            f"set it to {longest} or less",
        )
    elif not plan.fits:
        return  # _memory_finding reports it
    elif not plan.groups:
        yield Finding("context length", "ok", name, f"{asked} tokens, no KV cache needed")
    elif plan.concurrency() < 2:
        yield Finding(
            "context length",
            "warn",
            name,
            f"the KV cache holds {plan.concurrency():.1f} requests of {asked} tokens",
            "lower max_model_len, or add GPUs, so that several long requests can run at once",
        )
    else:
        yield Finding(
            "context length",
            "ok",
            name,
            f"{plan.concurrency():.1f} requests of {asked} tokens at once "
            f"({plan.kv_cache_tokens} tokens of KV cache)",
        )

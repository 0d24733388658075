"""Checks of one model: its memory, precision, context length and parallelism.

:func:`refuse` has the checks that `serve-app run` waits for: models that certainly cannot start.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from serve_app.cluster import autoscaling, placement
from serve_app.config import caches
from serve_app.config.document import Fleet, answering
from serve_app.config.engine_args import count
from serve_app.config.settings import NO_FALLBACK, ModelConfig, ids_of
from serve_app.errors import ConfigError, UserError
from serve_app.planner import (
    check_machine,
    choose,
    ec2,
    front_ends,
    hardware,
    swap,
    together,
    verdict,
)
from serve_app.planner.check_machine import Limits
from serve_app.planner.finding import Finding, Status
from serve_app.planner.hardware import GIB, GPU
from serve_app.planner.loading import cpu_plan, load_known, load_model
from serve_app.planner.model import runner
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.model.quantization import FP8_HARDWARE_CAPABILITY
from serve_app.planner.vllm import defaults, parallelism
from serve_app.planner.vllm.memory import TIGHT_SHARE, Plan

_SKIP = "(--no-check skips this)"


def refuse(fleet: Fleet, here: Limits | None = None) -> None:
    """Refuse a config that cannot work, before ``serve-app run`` starts or changes anything.

    ``here`` is what the machine has that it is to run on; None where it may be any machine. Needs
    no network: a model whose metadata is not on this machine passes.

    Raises:
        ConfigError: the first model that cannot start, and what to change.
    """
    for name, config in fleet.models.items():
        if why := undeployable(config):
            raise ConfigError(f"{fleet.path}: application '{name}': {why}")
    for about, why in _reasons(fleet, here):
        whose = f"application '{about}': " if about != str(fleet.path) else ""
        raise ConfigError(f"{fleet.path}: {whose}{why} {_SKIP}")


def _reasons(fleet: Fleet, here: Limits | None) -> Iterator[tuple[str, str]]:
    """Applications that cannot run, and why: what only the config can mend comes first."""
    known = {name: load_known(config) for name, config in fleet.models.items()}
    models = [(name, fleet.models[name], model) for name, model in known.items() if model]
    for name, config, model in models:
        if why := malformed(config, model):
            yield name, why
    for finding in fallbacks(fleet):
        yield finding.about, finding.text
    for finding in check_machine.lacks(fleet, here) if here else ():
        yield finding.about, finding.text
    gpu = max(here.gpus, key=lambda one: one.memory_bytes) if here and here.gpus else None
    anywhere = () if here else together.problems(fleet)
    for finding in (*swap.problems(fleet, gpu, anywhere=here is None), *anywhere):
        if finding.status == "fail":
            yield finding.about, finding.text
    for name, config, model in models:
        if why := impossible(config, model, gpu):
            yield name, why


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
    """Routing, memory, quantization, context and parallelism of one model."""
    yield from _routing(name, config)
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
            best = choose.least(choose.per_gpu_type(model, arguments))
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
    if either := hardware.either_size(asked):
        yield Finding("memory", "warn", name, *either)
    part = config.resources.part_of_gpu  # whose reasons say which part would do
    smallest = None if part else choose.smallest(model, arguments, gpu)
    yield _memory_finding(name, config, plan, smallest)
    yield from _context(name, config, plan)


def fallbacks(fleet: Fleet) -> Iterator[Finding]:
    """Fallbacks of models that give vectors or scores, and such models as fallbacks."""
    pooling = {
        name
        for name, config in fleet.models.items()
        if runner.pools(config.model, config.engine, environment(config))
    }
    models = answering(fleet)
    owners = {id: name for name, it in models.items() for id in ids_of(name, it)}
    for name, config in models.items():
        if config.fallback and name in pooling:
            yield Finding("fallback", "fail", name, NO_FALLBACK)
        elif useless := [id for id in config.fallback if owners.get(id) in pooling]:
            said = f"fallback has '{useless[0]}', which generates no text; remove it"
            yield Finding("fallback", "fail", name, said)


def _routing(name: str, config: ModelConfig) -> Iterator[Finding]:
    """A policy that looks for what is cached, where nothing is."""
    if not config.routing or config.routing.policy != "cache_aware":
        return
    if runner.pools(config.model, config.engine, environment(config)):
        why = "the model generates no text"
    elif config.engine.get("enable_prefix_caching") is False:
        why = "enable_prefix_caching is false"
    else:
        return
    said = f"routing.policy cache_aware finds nothing cached, since {why}"
    yield Finding("routing", "warn", name, said, "remove routing: least_loaded decides then")


def environment(config: ModelConfig) -> dict[str, str]:
    """The environment of a model's replica, as far as it is known here."""
    return os.environ | caches.downloads(config.cache_dir) | config.env


def malformed(config: ModelConfig, model: Model) -> str | None:
    """What no machine can do with the model: sizes that do not divide it, too long a context."""
    for why, remedy in parallelism.remedies(model.shape, defaults.parallelism(config.engine)):
        return f"engine.{why}; {remedy}"
    asked = count(config.engine.get("max_model_len"), "max_model_len", least=-1) or -1
    if too_long := verdict.too_long(model, asked, config):
        return "; ".join(too_long)
    return None


def impossible(config: ModelConfig, model: Model, gpu: GPU | None = None) -> str | None:
    """Why the model could not start; None where it might.

    These are the failures of :func:`checked`, without those by EC2's offers, and without memory
    that is missing by less than the planner's own error. ``gpu`` is what the model gets where it
    asks for no type; None if that is not known.
    """
    if why := malformed(config, model):
        return why
    if config.resources.device == "cpu":
        plan = cpu_plan(model, config)
        return None if plan.fits else _memory_finding("", config, plan, None).text
    asked, arguments = config.resources.accelerator_type, choose.arguments_of(config)
    try:
        gpu = hardware.find(asked)[0] if asked else gpu
        if gpu is None:
            return None
        plan = choose.plan_on(model, arguments, gpu)
        larger = replace(gpu, memory_bytes=int(gpu.memory_bytes * (1 + TIGHT_SHARE)))
        might = choose.plan_on(model, arguments, larger).fits
        if not model.shape.known:  # then only the weights are not guessed
            might = max(stage.weights for stage in plan.stages) < gpu.memory_bytes
    except defaults.TooFewTokens as error:
        return str(error)
    except UserError:
        return None  # a GPU that the planner's tables lack may still be enough
    refused = choose.refusal(plan.engine.quantization, plan.engine, gpu)
    if refused or might:
        return refused
    smallest = None if config.resources.part_of_gpu else choose.smallest(model, arguments, gpu)
    return _memory_finding("", config, plan, smallest).text


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
    if why := verdict.beyond_machines(plan):
        yield Finding("parallelism", "fail", name, *why)
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
        if plan.gpu.name == "CPU":
            short = "VLLM_CPU_KVCACHE_SPACE" in plan.reasons[0]
            lower = "lower engine.max_model_len, or raise env.VLLM_CPU_KVCACHE_SPACE"
            fix = lower if short else "raise resources.memory_gib"
        elif smallest and smallest.plan:
            fix = f"the smallest that fits on {plan.gpu.name} is {smallest.plan.parallel}"
        elif smallest:
            fix = f"no layout fits on {plan.gpu.name}: {smallest.refused}"
        return Finding("memory", "fail", name, "; ".join(plan.reasons), fix)
    if plan.gpu.name == "CPU":
        return Finding(
            "memory", "ok", name, f"about {stage.requested / GIB:.1f} GiB of host memory"
        )
    machines, refused = ec2.machines(plan, config)
    takes = (
        f"{stage.without_kv / GIB:.1f} GiB and {max(0, stage.kv_cache) / GIB:.1f} GiB of KV cache "
        f"per {plan.gpu.name}"
    )
    if not machines:
        why = f"{refused[0].name}: {refused[0].reason}" if refused else None
        said = f"{takes}, but no EC2 machine takes a replica"
        return Finding("memory", "fail", name, said, why)
    if missing := verdict.short_of_host_memory(plan, config):
        return Finding("memory", "fail", name, *missing)
    best = machines[0]
    where = f", on {best.count} × {best.instance.name}"
    if best.stranded_gpus:
        where += f" ({best.stranded_gpus} GPUs idle)"
    if plan.tight:
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
        status: Status = "warn" if verdict.allows_longer(config) else "fail"
        yield Finding("context length", status, name, *verdict.beyond_own(plan.model, asked))
    elif not plan.fits:
        return  # _memory_finding reports it
    elif not plan.groups:
        yield Finding("context length", "ok", name, f"{asked} tokens, no KV cache needed")
    elif plan.room() < 2:
        yield Finding(
            "context length",
            "warn",
            name,
            f"the KV cache holds {plan.room():.1f} requests of {asked} tokens",
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

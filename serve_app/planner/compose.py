"""A config for models that were only named: the planner's choice for the machine at hand.

Each chosen value carries the reason for it, which becomes a comment in the YAML
(:mod:`serve_app.config.yaml_files`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.config import names
from serve_app.config.document import GATEWAY_IMPORT_PATH, MODEL_IMPORT_PATH
from serve_app.config.engine_args import count
from serve_app.config.settings import ModelConfig, Resources
from serve_app.config.yaml_files import note
from serve_app.errors import ConfigError, UserError
from serve_app.planner import choose
from serve_app.planner.hardware import GIB, GPU, MIB, Machine
from serve_app.planner.loading import cpu_bytes, cpu_plan, load_model
from serve_app.planner.model import metadata, runner
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.vllm import defaults, parallelism
from serve_app.planner.vllm.memory import DEFAULT_CPU_KV_GIB, TIGHT_SHARE, Plan
from serve_app.planner.vllm.sharding import Parallelism

_GATEWAY = "gateway"
_USEFUL_LENGTH = 8192
"""Tokens of one request that a shortened ``max_model_len`` should still hold: fewer are of little
use for a chat."""

_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")


@dataclass(frozen=True)
class _Named:
    """A model of the command line: as it was named, its application's name, its metadata."""

    model: str
    name: str
    loaded: Model
    arguments: dict[str, Any]
    """The engine arguments that do not depend on the machine."""


def compose(
    models: Sequence[str], given: Mapping[str, Any], machine: Machine, *, port: int | None = None
) -> dict[str, Any]:
    """The Serve config of ``models`` and a gateway on ``machine``, with notes.

    ``given`` are engine arguments for every model, checked already
    (:func:`serve_app.planner.targets.engine_arguments`). GPUs are planned as if all were of the
    type with the least memory.

    Raises:
        UserError: a model's metadata cannot be had, or the models do not fit on the machine.
    """
    models = [one if "://" not in one else one.rstrip("/") for one in models]
    if twice := next((one for one in models if models.count(one) > 1), None):
        raise UserError(f"{twice} is named twice; name it once, and set replicas in a config file")
    short = names.short_names(models, reserved=[_GATEWAY])
    named = [_load(*pair, given) for pair in zip(models, short, strict=True)]
    args = _on_gpus(named, given, machine) if machine.gpus else _on_cpu(named, given, machine)
    cpus = _cpus(machine, len(named))
    applications: list[dict[str, Any]] = [
        {
            "name": of.name,
            "route_prefix": None,
            "import_path": MODEL_IMPORT_PATH,
            "args": _in_order(one | {"resources": one.get("resources", {}) | cpus}),
        }
        for of, one in zip(named, args, strict=True)
    ]
    applications.append(
        {"name": _GATEWAY, "route_prefix": "/", "import_path": GATEWAY_IMPORT_PATH}
        | ({"args": cpus} if cpus else {})
    )
    return {
        "http_options": {
            "host": note("127.0.0.1", "For programs on this machine only; 0.0.0.0 lets others in."),
            "port": port or 8000,
        },
        "applications": applications,
    }


def described(machine: Machine) -> str:
    """The machine in a few words: its GPUs, else its CPU and memory."""
    if not machine.gpus:
        return (
            f"no GPU, {machine.cores} CPU cores, {machine.free_memory_bytes / GIB:.1f} GiB of free "
            "memory"
        )
    counts = {gpu: machine.gpus.count(gpu) for gpu in machine.gpus}
    return ", ".join(f"{n} × {gpu.name} ({gpu.memory_gib:.1f} GiB)" for gpu, n in counts.items())


def _load(model: str, name: str, given: Mapping[str, Any]) -> _Named:
    loaded = load_model(ModelConfig(model=model, engine=dict(given)))
    environment = dict(os.environ)
    own, asked = loaded.shape.max_position_embeddings, _asked_length(given)
    if asked is not None and asked > own:
        raise UserError(f"{model}: max_model_len {asked} is above the model's {own}; lower it")
    pools = runner.pools(model, given, environment)
    if not pools and given.get("runner") in (None, "auto"):
        pools = loaded.shape.pooling
    chosen = {"runner": "pooling"} if pools else {}
    return _Named(model, name, loaded, chosen | dict(given))


def _args(of: _Named, engine: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The ``args`` of a model's application; ``engine`` holds the choices, with notes."""
    args: dict[str, Any] = {"model": of.model}
    folder = metadata.as_folder(of.model)
    hub_id = names.repo_of(folder) if folder.is_dir() or "://" in of.model else of.model
    if hub_id and hub_id != of.name:
        args["served_as"] = note([hub_id], "Clients may also send the hub's id.")
    if of.arguments.get("runner") == "pooling" and "runner" not in given:
        runs = note("pooling", "It embeds, scores or classifies, and does not write text.")
        engine = {"runner": runs, **engine}
    said = {key: note(value, "As the command line says.") for key, value in given.items()}
    args["engine"] = engine | said
    return args


def _in_order(args: dict[str, Any]) -> dict[str, Any]:
    """Settings in the order in which people read them; empty ones are left out."""
    return {
        key: args[key]
        for key in ("model", "served_as", "resources", "env", "engine")
        if args.get(key)
    }


def _asked_length(given: Mapping[str, Any]) -> int | None:
    """The ``max_model_len`` that the command line sets; None where the planner may choose."""
    asked = count(given.get("max_model_len"), "max_model_len", least=-1)
    return None if asked == -1 else asked


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / MIB:.0f} MiB"


def _cpus(machine: Machine, models: int) -> dict[str, Any]:
    """``num_cpus`` where the usual reservation of one core would leave a replica waiting."""
    usual = 1.0 if machine.gpus else 0.5
    share = math.floor(10 * machine.cores / (models + 1)) / 10
    if machine.gpus and share >= usual:
        return {}
    why = "A reservation, not a limit: all of them fit on this machine's cores."
    return {"num_cpus": note(min(usual, share), why)}


def _rounded(tokens: int) -> int:
    step = 1024 if tokens >= 2048 else 128
    return tokens // step * step or tokens


# --- GPUs --------------------------------------------------------------------------------------


def _on_gpus(
    named: list[_Named], given: Mapping[str, Any], machine: Machine
) -> list[dict[str, Any]]:
    gpu = min(machine.gpus, key=lambda one: one.memory_bytes)
    there = len(machine.gpus)
    # As few GPUs as hold the model's own context; where they are too few, a shorter context.
    plans = [_layout(of, given, gpu, there) or _shorter(of, given, gpu, there) for of in named]
    if sum(plan.parallel.gpus for plan in plans) > there:
        plans = [
            plan if plan.parallel.gpus == 1 else _shorter(of, given, gpu, there)
            for of, plan in zip(named, plans, strict=True)
        ]
    needed = sum(plan.parallel.gpus for plan in plans)
    if needed > there and len(named) == 1:
        raise UserError(
            f"{named[0].model} split as {plans[0].parallel} needs {needed} GPUs, and this machine "
            f"has {there}"
        )
    if needed > there:
        each = ", ".join(
            f"{of.name}: {plan.parallel.gpus}" for of, plan in zip(named, plans, strict=True)
        )
        raise UserError(
            f"these {len(named)} models need {needed} × {gpu.name} ({each}), and this machine has "
            f"{there}; name fewer models, or plan for other machines with `serve-app plan MODEL`"
        )
    return [_gpu_args(of, given, plan, there) for of, plan in zip(named, plans, strict=True)]


def _cautious(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the planner's own error taken off the GPU's memory."""
    share = float(arguments.get("gpu_memory_utilization") or defaults.DEFAULT_UTILIZATION)
    if TIGHT_SHARE < share <= 1:  # else as given, to be refused by its own number
        share -= TIGHT_SHARE
    return {**arguments, "gpu_memory_utilization": share}


def _sizes(of: _Named, given: Mapping[str, Any], gpu: GPU, there: int) -> list[Parallelism]:
    """The layouts to try: the one that the command line asks for, else all, the smallest first."""
    if given.keys() & set(_SIZES):
        asked = defaults.parallelism(dict(given))
        if wrong := parallelism.problems(of.loaded.shape, asked):
            raise ConfigError(f"{of.model}: {'; '.join(wrong)}")
        return [asked]
    return list(choose.layouts(of.loaded, of.arguments, gpu, there))


def _layout(of: _Named, given: Mapping[str, Any], gpu: GPU, there: int) -> Plan | None:
    """The smallest layout here that holds a request of ``max_model_len``; None where none does."""
    for parallel in _sizes(of, given, gpu, there):
        plan = choose.plan_on(of.loaded, _cautious(of.arguments), gpu, parallel)
        if plan.fits:
            return plan
    return None


def _shorter(of: _Named, given: Mapping[str, Any], gpu: GPU, there: int) -> Plan:
    """The smallest layout here that holds a useful request.

    Raises:
        UserError: none holds any.
    """
    if _asked_length(given) is not None:
        found = _layout(of, given, gpu, there)
        if found is None:
            raise _too_large(of, gpu, there)
        return found
    arguments = _cautious(of.arguments) | {"max_model_len": -1}
    useful = min(_USEFUL_LENGTH, of.loaded.shape.max_position_embeddings)
    longest: Plan | None = None
    for parallel in _sizes(of, given, gpu, there):
        plan = choose.plan_on(of.loaded, arguments, gpu, parallel)
        if plan.fits:
            if plan.engine.max_model_len >= useful:
                return plan
            longest = plan
    if longest is None:
        raise _too_large(of, gpu, there)
    return longest


def _too_large(of: _Named, gpu: GPU, there: int) -> UserError:
    """Why a model does not fit on this machine, and what would."""
    choice = choose.smallest(of.loaded, of.arguments, gpu)
    if choice.plan is None:
        why = f"does not run on {gpu.name}: {choice.refused}"
    else:
        why = (
            f"needs {choice.plan.parallel.gpus} × {gpu.name} ({choice.plan.parallel}), and this "
            f"machine has {there}"
        )
    needed = choice.plan.parallel.gpus if choice.plan else 1 << 30
    fewer = choose.lighter(of.loaded, of.arguments, gpu, needed)
    hint = next((f"with {one.how} it fits, or " for one in fewer if one.gpus <= there), "")
    return UserError(
        f"{of.model} {why}; {hint}`serve-app plan {of.model}` shows which machines hold it"
    )


def _gpu_args(of: _Named, given: Mapping[str, Any], plan: Plan, there: int) -> dict[str, Any]:
    own, length = of.loaded.shape.max_position_embeddings, plan.engine.max_model_len
    engine: dict[str, Any] = {}
    shortened = length < own and _asked_length(given) is None
    if shortened:
        length = _rounded(length)
    arguments = of.arguments | {"max_model_len": length}
    plan = choose.plan_on(of.loaded, arguments, plan.gpu, plan.parallel)  # without the caution
    stage = plan.tightest
    if not given.keys() & set(_SIZES):
        gpus = plan.parallel.gpus
        fewest = f"{gpus} of this machine's {there} GPUs {'is' if gpus == 1 else 'are'} the fewest"
        engine["tensor_parallel_size"] = note(
            plan.parallel.tensor,
            f"{'This GPU' if there == 1 else fewest + ' that'} hold{'s' * (gpus == 1)} it: "
            f"{_size(stage.weights)} of weights{' on each' * (gpus > 1)} and {_cache(plan)}.",
        )
    if shortened:
        engine["max_model_len"] = note(
            length,
            f"The model's own is {own}, but beside the weights there is no room for one request of "
            "that length.",
        )
    shown = {key: value for key, value in given.items() if key not in engine}
    return _args(of, engine, shown)


def _cache(plan: Plan) -> str:
    if not plan.groups:
        return "no KV cache"
    return (
        f"{_size(plan.tightest.kv_cache)} for the KV cache, which is "
        f"{plan.concurrency():.1f} requests of {plan.engine.max_model_len} tokens at once"
    )


# --- the CPU -----------------------------------------------------------------------------------


def _on_cpu(
    named: list[_Named], given: Mapping[str, Any], machine: Machine
) -> list[dict[str, Any]]:
    sizes = defaults.parallelism(dict(given))
    if sizes.gpus > 1:
        raise UserError(
            f"{sizes} needs {sizes.gpus} GPUs, and this machine has none; leave it out to run on "
            "the CPU"
        )
    named = [replace(of, arguments=_cpu_engine(of) | of.arguments) for of in named]
    least = [cpu_bytes(_cpu_plan(of, DEFAULT_CPU_KV_GIB)) for of in named]
    free = machine.free_memory_bytes
    if sum(least) > free:
        raise _too_large_for_memory(named, least, free)
    spare = (free - sum(least)) // len(named)
    return [_cpu_args(of, given, int(spare / GIB / 2)) for of in named]


def _cpu_engine(of: _Named) -> dict[str, Any]:
    plain: dict[str, Any] = {"enforce_eager": True}
    # Quantized layers have kernels for 16 bits only.
    return plain if of.loaded.shape.quantization else plain | {"dtype": "float32"}


def _cpu_plan(of: _Named, kv_gib: int, **arguments: Any) -> Plan:
    config = ModelConfig(
        model=of.model,
        engine=of.arguments | arguments,
        resources=Resources(device="cpu"),
        env={"VLLM_CPU_KVCACHE_SPACE": str(kv_gib)},
    )
    return cpu_plan(of.loaded, config)


def _too_large_for_memory(named: list[_Named], least: list[int], free: int) -> UserError:
    model, size = max(zip(named, least, strict=True), key=lambda pair: pair[1])
    if size > free:
        return UserError(
            f"{model.model} takes about {size / GIB:.1f} GiB of memory on the CPU, and this "
            f"machine has no GPU and {free / GIB:.1f} GiB free; `serve-app plan {model.model}` "
            "shows the GPUs that hold it"
        )
    return UserError(
        f"these {len(named)} models take about {sum(least) / GIB:.1f} GiB of memory on the CPU, "
        f"and this machine has no GPU and {free / GIB:.1f} GiB free; name fewer models"
    )


def _cpu_args(of: _Named, given: Mapping[str, Any], spare_gib: int) -> dict[str, Any]:
    """``spare_gib`` is the host memory that the KV cache may have beyond its default."""
    asked = _asked_length(given)
    own = of.loaded.shape.max_position_embeddings
    useful = asked or min(own, _USEFUL_LENGTH)
    space = DEFAULT_CPU_KV_GIB
    while (
        space < DEFAULT_CPU_KV_GIB + spare_gib
        and not _cpu_plan(of, space, max_model_len=useful).fits
    ):
        space += 1
    plan = _cpu_plan(of, space, max_model_len=asked or -1)
    if not plan.fits:
        raise UserError(
            f"{of.model}: {'; '.join(plan.reasons)}, and this machine has no memory for a larger "
            "KV cache; leave max_model_len out"
        )
    length = plan.engine.max_model_len
    engine: dict[str, Any] = {}
    if length < own and asked is None:
        engine["max_model_len"] = note(
            _rounded(length),
            f"The model's own is {own}; the KV cache of {space} GiB holds one request of this "
            "length.",
        )
    engine["enforce_eager"] = note(True, "Starts in seconds instead of minutes on a CPU.")
    if "dtype" in of.arguments and "dtype" not in given:
        engine["dtype"] = note("float32", "On a CPU the faster one, mostly.")
    chosen = {key: why for key, why in engine.items() if key == "max_model_len" or key not in given}
    args = _args(of, chosen, {key: value for key, value in given.items() if key not in chosen})
    args["resources"] = {
        "device": note(
            "cpu", f"This machine has no GPU. The weights take {_size(plan.tightest.weights)}."
        )
    }
    if space != DEFAULT_CPU_KV_GIB:
        why = f"GiB of memory for the KV cache, for a request of {useful} tokens."
        args["env"] = {"VLLM_CPU_KVCACHE_SPACE": note(str(space), why)}
    return args

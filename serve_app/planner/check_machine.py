"""Checks of a whole config against one machine: cores, host memory, GPUs.

Only what the machine plainly lacks is found. What replicas reserve is counted at its fewest, and
memory without what is only estimated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from serve_app.config.document import GATEWAY_IMPORT_PATH, Fleet
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.planner import asleep, choose, swap, together
from serve_app.planner.finding import Finding
from serve_app.planner.hardware import GIB, GPU
from serve_app.planner.loading import cpu_bytes, cpu_plan, load_known
from serve_app.planner.vllm import defaults
from serve_app.planner.vllm.share import KEY

_CHECK = "this machine"

_OVERRIDES = {
    "num_replicas",
    "autoscaling_config",
    "ray_actor_options",
    "placement_group_bundles",
}
"""Keys of ``deployments`` that take the place of what is counted here."""


@dataclass(frozen=True)
class Limits:
    """What one machine has, as its Ray would count it."""

    gpus: tuple[GPU, ...] | None
    """None where it cannot be told."""

    cores: int
    memory_bytes: int
    free_memory_bytes: int | None
    """None where what runs now may make room for what is to come."""

    @property
    def room_bytes(self) -> int:
        """Host memory for new replicas."""
        return self.memory_bytes if self.free_memory_bytes is None else self.free_memory_bytes

    @property
    def room(self) -> str:
        """The same, to be put into a sentence."""
        free = "" if self.free_memory_bytes is None else " free"
        return f"this machine has {self.room_bytes / GIB:.1f} GiB{free}"


def lacks(fleet: Fleet, limits: Limits) -> Iterator[Finding]:
    """What the machine has too little of for the fewest replicas of ``fleet``, with a remedy.

    Needs no network: the memory of a model whose metadata is not on this machine is not counted.
    """
    counted = {
        name: config for name, config in fleet.models.items() if not _overridden(fleet, name)
    }
    yield from _cores(fleet, counted, limits)
    yield from _memory(counted, limits)
    yield from _swapped(counted, limits)
    if limits.gpus is not None:
        yield from _gpus(counted, limits, limits.gpus)


def _overridden(fleet: Fleet, name: str) -> bool:
    [application] = [a for a in fleet.document["applications"] if a.get("name") == name]
    return any(_OVERRIDES & set(override) for override in application.get("deployments") or [])


def _fewest(config: ModelConfig) -> int:
    """The fewest replicas that Serve starts; the ranks of a gang are replicas too."""
    return config.replica_range[0] * defaults.parallelism(config.engine).data


def _cores(fleet: Fleet, counted: dict[str, ModelConfig], limits: Limits) -> Iterator[Finding]:
    each = {n: (_fewest(c), c.resources.num_cpus, "resources.") for n, c in counted.items()}
    for application in fleet.document["applications"]:
        name = application["name"]
        of_gateway = application["import_path"] == GATEWAY_IMPORT_PATH
        if of_gateway and fleet.gateway and not _overridden(fleet, name):
            fewest = 1 if fleet.gateway.replicas == "auto" else fleet.gateway.replicas
            each[name] = (fewest, fleet.gateway.num_cpus, "")
    there = f"this machine has {limits.cores} core{'s' * (limits.cores > 1)}"
    wrong = False
    for name, (_, cpus, where) in each.items():
        if cpus > limits.cores:
            wrong = True
            yield Finding(
                _CHECK, "fail", name, f"{where}num_cpus is {cpus:g}, and {there}", "lower it"
            )
    total = sum(replicas * cpus for replicas, cpus, _ in each.values())
    if not wrong and total > limits.cores + 1e-6:
        most = max(each, key=lambda name: each[name][0] * each[name][1])
        replicas, cpus, where = each[most]
        parts = f"{most} alone {replicas} × {cpus:g}" if replicas > 1 else f"{most} alone {cpus:g}"
        yield Finding(
            _CHECK,
            "fail",
            most,
            f"all replicas together reserve {total:.10g} CPU cores ({parts}), and {there}",
            f"lower {where}num_cpus, or replicas",
        )


def _memory(counted: dict[str, ModelConfig], limits: Limits) -> Iterator[Finding]:
    taken: dict[str, tuple[int, int]] = {}  # at least, and about
    for name, config in counted.items():
        reserved = config.resources.memory_gib or 0
        if reserved * GIB > limits.memory_bytes:
            there = f"this machine has {limits.memory_bytes / GIB:.1f}"
            said = f"resources.memory_gib is {reserved:g}, and {there}"
            yield Finding(_CHECK, "fail", name, said, "lower it")
        if config.resources.device != "cpu" or not _fewest(config):
            continue
        if (model := load_known(config)) is None:
            continue
        try:
            plan = cpu_plan(model, config)
        except UserError:
            continue  # told as the model's own
        replicas, least = _fewest(config), plan.tightest.requested
        taken[name] = (replicas * least, replicas * cpu_bytes(plan))
        if least > limits.room_bytes:
            yield Finding(
                _CHECK,
                "fail",
                name,
                f"it takes about {cpu_bytes(plan) / GIB:.1f} GiB of memory on the CPU, and "
                f"{limits.room}",
                f"`serve-app plan {config.model}` shows the GPUs that hold it",
            )
            return
    if sum(least for least, _ in taken.values()) > limits.room_bytes:
        about = sum(about for _, about in taken.values())
        yield Finding(
            _CHECK,
            "fail",
            max(taken, key=lambda name: taken[name]),
            f"all replicas together take about {about / GIB:.1f} GiB of memory on the CPU, and "
            f"{limits.room}",
            "serve fewer models or replicas",
        )


def _gpus(
    counted: dict[str, ModelConfig], limits: Limits, gpus: tuple[GPU, ...]
) -> Iterator[Finding]:
    there = f"this machine has {len(gpus) or 'none'}"
    names = {gpu.ray_name for gpu in gpus}
    if any(name and name.startswith("A100") for name in names):
        names.add("A100")  # as Ray itself marks both sizes
    needed: dict[str, int] = {}
    parts: list[together.Part] = []
    smallest = min(gpus, key=lambda gpu: gpu.memory_bytes, default=None)
    wrong = False
    for name, config in counted.items():
        group = config.resources.swap_group  # which has its GPU also without a replica
        if config.resources.device == "cpu" or not (_fewest(config) or group):
            continue
        size = defaults.parallelism(config.engine)
        one = size.gpus // size.data
        part = together.part_of(name, config, smallest)
        if group:
            needed[f"swap group {group}"] = 1
        elif part is not None:
            parts += _fewest(config) * [part]
        else:
            needed[name] = _fewest(config) * one
        asked = config.resources.accelerator_type
        if one > len(gpus):
            wrong = True
            said = f"{size} needs {one} GPUs" if one > 1 else "it needs a GPU"
            said = f"{said}, and {there}"
            yield Finding(_CHECK, "fail", name, said, _without_gpus(config, one, limits, gpus))
        elif asked is not None and None not in names and asked not in names:
            said = f"resources.accelerator_type is {asked}, and this machine has {gpus[0].ray_name}"
            yield Finding(_CHECK, "fail", name, said, "change it, or remove it")
    total = sum(needed.values()) + len(together.packed(parts))
    if not wrong and total > len(gpus):
        told = [f"{name}: {count}" for name, count in needed.items()]
        told += [f"{part.name}: {part.setting}" for part in parts]
        said = f"all replicas together need {total} GPUs ({', '.join(told)}), and {there}"
        fix = _smaller_part(parts, counted, gpus, len(gpus) - sum(needed.values()))
        first = [*([] if fix else needed), *(part.name for part in parts)][0]
        yield Finding(_CHECK, "fail", first, said, fix or "serve fewer models or replicas")


def _smaller_part(
    parts: list[together.Part], counted: dict[str, ModelConfig], gpus: tuple[GPU, ...], left: int
) -> str | None:
    """One model's smaller part with which it fits, and all parts fit on ``left`` GPUs."""
    over = round(sum(part.fraction for part in parts) - left, 4)
    for part in sorted(parts, key=lambda part: -part.fraction):
        config, smaller = counted[part.name], round(part.fraction - over, 4)
        if _fewest(config) > 1 or smaller <= 0 or (model := load_known(config)) is None:
            continue
        arguments = choose.arguments_of(config)
        arguments[KEY] = size = arguments[KEY].of_size(smaller, gpus[0], down=True)
        rest = [other for other in parts if other is not part]
        fits = choose.plan_on(model, arguments, gpus[0]).fits
        if fits and len(together.packed([*rest, replace(part, fraction=smaller)])) <= left:
            return f"with {size} '{part.name}' fits beside the others"
    return None


def _swapped(counted: dict[str, ModelConfig], limits: Limits) -> Iterator[Finding]:
    """Whether there is host memory for all models of swap groups: while two change places, both
    have their weights in it."""
    sleeping = {
        name: asleep.host_bytes(config)
        for members in swap.groups(counted).values()
        for name, config in members.items()
        if config.resources.device == "gpu"
    }
    if sum(sleeping.values()) > limits.room_bytes:
        largest = max(sleeping, key=lambda name: sleeping[name])
        said = f"the models of swap groups sleep in {sum(sleeping.values()) / GIB:.1f} GiB of host "
        said += f"memory, and {limits.room}"
        yield Finding(_CHECK, "fail", largest, said, "take models out of the groups")


def _without_gpus(config: ModelConfig, one: int, limits: Limits, gpus: tuple[GPU, ...]) -> str:
    """What to do about GPUs that are missing."""
    elsewhere = f"`serve-app plan {config.model}` shows the machines that hold it"
    if gpus:
        return f"lower engine.tensor_parallel_size; {elsewhere}"
    on_cpu = config.model_copy(
        update={"resources": config.resources.model_copy(update={"device": "cpu"})}
    )
    model = load_known(on_cpu)
    if one > 1 or (
        model is not None and cpu_plan(model, on_cpu).tightest.requested > limits.room_bytes
    ):
        return elsewhere
    also = " and remove accelerator_type" if config.resources.accelerator_type else ""
    return f"set resources.device: cpu{also} to run it on the CPU"

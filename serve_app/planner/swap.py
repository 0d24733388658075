"""Whether the models of each swap group fit their GPU, and the host memory in which they sleep."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

from rich.console import Console
from rich.markup import escape

from serve_app.config.document import Fleet
from serve_app.config.settings import ModelConfig, SwapGroup
from serve_app.errors import UserError, did_you_mean
from serve_app.planner import hardware, pods
from serve_app.planner.asleep import awake_bytes, host_bytes, left_bytes, plan_of
from serve_app.planner.finding import Finding
from serve_app.planner.hardware import CONTEXT_BYTES, GIB, GPU
from serve_app.planner.loading import load_known

CHECK = "swap groups"


def groups(models: Mapping[str, ModelConfig]) -> dict[str, dict[str, ModelConfig]]:
    """The members of each group."""
    found: dict[str, dict[str, ModelConfig]] = {}
    for name, config in models.items():
        if config.resources.swap_group:
            found.setdefault(config.resources.swap_group, {})[name] = config
    return found


def terms(fleet: Fleet, group: str) -> SwapGroup:
    """A group's terms."""
    return _given(fleet).get(group, SwapGroup())


def _given(fleet: Fleet) -> Mapping[str, SwapGroup]:
    return fleet.gateway.swap_groups if fleet.gateway else {}


def problems(
    fleet: Fleet, here: GPU | None = None, *, instead: GPU | None = None, anywhere: bool = True
) -> Iterator[Finding]:
    """What is wrong with the groups of a config.

    Args:
        here: the GPU that members without ``accelerator_type`` get, if it is known.
        instead: plan on this GPU, whatever the config says.
        anywhere: it may be any machine that EC2 has, and must be one of them.
    """
    members = groups(fleet.models)
    for name in _given(fleet):
        if name not in members:
            hint = did_you_mean(name, members) or "; put it into a model's resources.swap_group"
            said = f"swap_groups has terms of '{name}', of which no model is{hint}"
            yield Finding(CHECK, "fail", str(fleet.path), said)
    for group, configs in members.items():
        if wrong := _unlike(group, configs):
            yield wrong
            continue
        first = next(iter(configs.values()))
        if first.resources.device == "cpu":
            said = f"'{group}' is on the CPU, where a model that sleeps keeps its memory"
            yield Finding(CHECK, "warn", ", ".join(configs), said, "it is good for tests alone")
            continue
        gpu = instead or here
        if not instead and (accelerator := first.resources.accelerator_type):
            try:
                gpu, _ = hardware.find(accelerator)
            except UserError:
                continue  # for which there is another finding
        yield from _too_little_reserved(configs)
        awake = terms(fleet, group).awake
        if awake > len(configs):
            said = f"swap_groups.{group}.awake is {awake}, and the group has {len(configs)} models"
            yield Finding(CHECK, "fail", str(fleet.path), said, f"set {len(configs)} at most")
            continue
        if awake == len(configs):
            said = f"'{group}' has {awake} of {len(configs)} awake, so none ever sleeps"
            if group not in _given(fleet):
                said += did_you_mean(group, _given(fleet))
            fix = (
                "give them parts of a GPU (resources.gpu_share), or put more models into the group"
            )
            yield Finding(CHECK, "warn", ", ".join(configs), said, fix)
        gpu = gpu or smallest(group, configs, awake)
        if gpu is not None:
            yield from _on_gpu(group, configs, awake, gpu)
            if anywhere:
                yield from _on_machine(group, configs, gpu)


def smallest(group: str, configs: Mapping[str, ModelConfig], awake: int = 1) -> GPU | None:
    """The smallest type of GPU that holds a group of which no type is said; where none does, the
    one with the most memory. None without metadata of all its models."""
    if any(load_known(config) is None for config in configs.values()):
        return None
    for gpu in hardware.gpus().values():
        found = [*_on_gpu(group, configs, awake, gpu), *_on_machine(group, configs, gpu)]
        if found and all(it.status == "ok" for it in found):
            return gpu
    return max(hardware.gpus().values(), key=lambda it: it.memory_bytes)


def gpu_names(fleet: Fleet) -> dict[str, str]:
    """The type of GPU to plan each member on, in groups of which no type is said."""
    found: dict[str, str] = {}
    for group, configs in groups(fleet.models).items():
        asked = [it.resources for it in configs.values()]
        if any(it.accelerator_type or it.device == "cpu" for it in asked):
            continue
        if gpu := smallest(group, configs, terms(fleet, group).awake):
            found |= dict.fromkeys(configs, gpu.name)
    return found


def show(groups: Iterable[Finding], console: Console) -> None:
    """Print of each group whether it fits."""
    for finding in groups:
        verdict = "[bold]does not fit[/]: " if finding.status == "fail" else ""
        console.print(f"\n[bold]swap group[/] {verdict}{escape(finding.text)}", soft_wrap=True)


def _unlike(group: str, configs: Mapping[str, ModelConfig]) -> Finding | None:
    """The members are on one GPU, so they must ask for the same."""
    for setting in ("device", "accelerator_type"):
        asked = {name: getattr(it.resources, setting) for name, it in configs.items()}
        if len(set(asked.values())) > 1:
            each = ", ".join(f"{name}: {value or 'any'}" for name, value in asked.items())
            said = f"the models of '{group}' share a GPU, but resources.{setting} differs ({each})"
            return Finding(CHECK, "fail", next(iter(configs)), said, "set the same for all")
    return None


def _on_gpu(
    group: str, configs: Mapping[str, ModelConfig], awake: int, gpu: GPU
) -> Iterator[Finding]:
    """Whether those that are awake fit beside what the others leave on the GPU."""
    plans = {name: it for name, config in configs.items() if (it := plan_of(config, gpu))}
    if not plans or not all(plan.fits for plan in plans.values()):
        return  # one that does not fit by itself is told as that
    planned = {name: plan.tightest for name, plan in plans.items()}
    # The worst case: those awake of which the most leaves the GPU when they sleep.
    by_size = sorted(
        planned, key=lambda name: left_bytes(planned[name]) - awake_bytes(planned[name])
    )
    largest, others = by_size[:awake], by_size[awake:]
    unknown = (len(configs) - len(planned)) * CONTEXT_BYTES
    left = unknown + sum(left_bytes(planned[name]) for name in others)
    needed = sum(awake_bytes(planned[name]) for name in largest) + left
    host = sum(host_bytes(config) for config in configs.values())
    if needed <= gpu.memory_bytes:
        said = (
            f"'{group}': {awake} of {len(configs)} awake on one {gpu.name} take "
            f"{(needed - left) / GIB:.1f} GiB at most, those that sleep {left / GIB:.1f}, together "
            f"{needed / GIB:.1f} of {gpu.memory_gib:.1f}; the weights of all take {host / GIB:.1f} "
            "GiB of host memory"
        )
        yield Finding(CHECK, "ok", ", ".join(configs), said)
        return
    yield Finding(
        CHECK,
        "fail",
        largest[0],
        f"'{group}': {awake} of {len(configs)} awake need {needed / GIB:.1f} GiB of a {gpu.name}, "
        f"which has {gpu.memory_gib:.1f} ({left / GIB:.1f} GiB stay with those that sleep)",
        _smaller(configs, gpu, awake, gpu.memory_bytes - left),
    )


def _smaller(configs: Mapping[str, ModelConfig], gpu: GPU, awake: int, room: int) -> str:
    """What to change so that any ``awake`` of them fit in ``room`` bytes."""
    share = room / awake - CONTEXT_BYTES
    most = math.floor(100 * share / gpu.memory_bytes)
    if most > 0 and all(_fits_in(config, gpu, most) for config in configs.values()):
        return f"set engine.gpu_memory_utilization to {most / 100:g} at most in each"
    out = "take models out of the group"
    if awake == 1:
        return out
    least = {name: _least(config, gpu) for name, config in configs.items()}
    largest = sorted(least.values())[-awake:]
    if sum(largest) * gpu.memory_bytes / 100 + awake * CONTEXT_BYTES <= room:
        each = ", ".join(f"{name} {it / 100:g}" for name, it in least.items())
        return f"set engine.gpu_memory_utilization to less in each ({each} at least)"
    return f"lower awake, or {out}"


def _least(config: ModelConfig, gpu: GPU) -> int:
    """The smallest percentage of its GPU with which a member could do; 100 where none is."""
    return 1 + bisect_left(range(1, 100), True, key=lambda it: _fits_in(config, gpu, it))


def _fits_in(config: ModelConfig, gpu: GPU, percent: int) -> bool:
    """Whether a member could do with so much of its GPU; true where its metadata is not at hand."""
    engine = {**config.engine, "gpu_memory_utilization": percent / 100}
    plan = plan_of(config.model_copy(update={"engine": engine}), gpu)
    return plan is None or plan.fits


def _on_machine(group: str, configs: Mapping[str, ModelConfig], gpu: GPU) -> Iterator[Finding]:
    """Whether a machine with such a GPU has the host memory and cores for the group's pod."""
    offered = [it for it in hardware.instances().values() if it.gpu is gpu]
    pod = pods.of_group(configs)
    if not offered or any(pods.fits(it, 1, [pod]) for it in offered):
        return
    cores, memory = max((pods.share(it, 1) for it in offered), key=lambda share: share[1])
    needed = pods.cpus(pod, 1)
    said = (
        f"'{group}' needs a pod with {needed} cores and {pods.memory_gib(pod, 1, needed)} GiB of "
        f"host memory, where its {len(configs)} models sleep, and no EC2 machine gives more than "
        f"{cores} and {memory} to one {gpu.name}"
    )
    yield Finding(CHECK, "fail", next(iter(configs)), said, "take models out of the group")


def _too_little_reserved(configs: Mapping[str, ModelConfig]) -> Iterator[Finding]:
    """Members whose ``memory_gib`` does not hold their weights."""
    for name, config in configs.items():
        asked = config.resources.memory_gib
        if asked and asked < (needed := host_bytes(config) / GIB):
            said = (
                f"resources.memory_gib is {asked:g}, and the weights of '{name}' take "
                f"{needed:.1f} GiB of host memory while it sleeps"
            )
            fix = f"set it to {math.ceil(needed)} at least, or leave it out"
            yield Finding(CHECK, "fail", name, said, fix)

"""What shares a GPU, added up: each model's part, and what is in it."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serve_app.config.document import Fleet
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.planner import choose, hardware, pods, shares
from serve_app.planner.finding import Finding
from serve_app.planner.hardware import CONTEXT_BYTES, GIB, GPU
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.report import Report
from serve_app.planner.vllm.memory import Plan
from serve_app.planner.vllm.share import KEY

CHECK = "shared GPU"


@dataclass(frozen=True)
class Part:
    """One replica's part of a GPU."""

    name: str
    fraction: float
    setting: str
    """As the config says it: ``gpu_share 0.3``."""
    plan: Plan | None = None
    """None where the model's metadata are not at hand."""


@dataclass
class Shared:
    """A GPU, and the parts that are on it."""

    kind: str
    """Its type by Ray's name; empty where any will do."""
    parts: list[Part] = field(default_factory=list)

    @property
    def free(self) -> float:
        return round(1 - sum(part.fraction for part in self.parts), 4)


def part_of(
    name: str, config: ModelConfig, gpu: GPU | None, plan: Plan | None = None
) -> Part | None:
    """A replica's part of ``gpu``; None with whole GPUs, and where it is not known of which."""
    if not config.resources.part_of_gpu:
        return None
    named = config.resources.accelerator_type
    try:
        if gpu and named and named not in (gpu.name, gpu.ray_name):  # planned on another one
            fraction = shares.fraction_of(config, gpu)
        else:
            fraction = shares.fraction(config)
    except UserError:
        fraction = shares.fraction_of(config, gpu) if gpu else None
    fraction = fraction and round(fraction, 4)  # as Ray counts it
    setting = str(choose.arguments_of(config)[KEY])
    return None if fraction is None else Part(name, fraction, setting, plan)


def packed(parts: Iterable[Part], kind: str = "") -> list[Shared]:
    """The parts on as few GPUs as Ray takes for them, if the largest come first.

    Ray gives a part that GPU of a node which has the least room for it
    (tests/cluster/test_placement_cluster.py).
    """
    gpus: list[Shared] = []
    by_room: list[tuple[float, int]] = []
    """What each GPU has free, and its place in ``gpus``; the fullest first."""
    for part in sorted(parts, key=lambda part: -part.fraction):
        at = bisect.bisect_left(by_room, (part.fraction, 0))
        if at < len(by_room):
            _, place = by_room.pop(at)
        else:
            place = len(gpus)
            gpus.append(Shared(kind))
        gpus[place].parts.append(part)
        bisect.insort(by_room, (gpus[place].free, place))
    return gpus


def on_gpus(configs: Mapping[str, ModelConfig], gpu: GPU | None, which: int) -> list[Shared]:
    """The GPUs of this type that models with parts of one share, at their fewest (0) or most (1)
    replicas."""
    return packed(
        part
        for name, config in configs.items()
        if (part := part_of(name, config, gpu))
        for _ in range(config.replica_range[which])
    )


def of_fleet(reports: Iterable[Report]) -> list[Shared]:
    """The shared GPUs of planned models, at the fewest replicas of each, one at least."""
    found: dict[str, list[Part]] = {}
    for report in reports:
        config, gpu = report.config, report.plan.gpu
        if part := part_of(report.name, config, gpu, report.plan):
            kind = gpu.ray_name or gpu.name
            found.setdefault(kind, []).extend([part] * (config.replica_range[0] or 1))
    return [gpu for kind, parts in found.items() for gpu in packed(parts, kind)]


def one_gpu(models: Mapping[str, tuple[Model, ModelConfig]]) -> GPU | None:
    """The smallest GPU for the models with parts of one of which no type is said, that a machine
    holds with all that shares it; without such a machine the smallest, and None without any."""
    parts = {
        name: (model, config)
        for name, (model, config) in models.items()
        if config.resources.part_of_gpu and not config.resources.accelerator_type
    }
    configs = {name: config for name, (_, config) in parts.items()}
    smallest = None
    for gpu in hardware.gpus().values() if parts else ():
        if all(choose.plan_on(it, choose.arguments_of(of), gpu).fits for it, of in parts.values()):
            smallest = smallest or gpu
            if not _too_much(configs, gpu):
                return gpu
    return smallest


def name_of(gpu: GPU | None, config: ModelConfig) -> str | None:
    """That GPU's name for a model with a part of one of which no type is said."""
    resources = config.resources
    return gpu.name if gpu and resources.part_of_gpu and not resources.accelerator_type else None


def problems(fleet: Fleet, *, instead: GPU | None = None) -> Iterator[Finding]:
    """GPUs of which no EC2 machine has the host memory and cores for all that shares one.

    Args:
        instead: plan on this GPU, whatever the config says.
    """
    kinds: dict[str, dict[str, ModelConfig]] = {}
    for name, config in fleet.models.items():
        kind = instead.name if instead else config.resources.accelerator_type or ""
        kinds.setdefault(kind, {})[name] = config
    for kind, configs in kinds.items():
        try:
            gpu = hardware.find(kind)[0] if kind else None
        except UserError:
            continue  # for which there is another finding
        if found := _too_much(configs, gpu):
            yield found


def _too_much(configs: Mapping[str, ModelConfig], gpu: GPU | None) -> Finding | None:
    """What shares a GPU, at the most replicas, and has too little host memory or cores on any
    machine with one (None: of any type)."""
    offered = [it for it in hardware.instances().values() if gpu in (None, it.gpu)]
    for shared in on_gpus(configs, gpu, 1) if offered else ():
        sharing = [configs[part.name] for part in shared.parts]
        if not any(pods.fits(it, 1, sharing) for it in offered):
            return _on_no_machine(shared, sharing, offered, gpu.name if gpu else "GPU")
    return None


def _on_no_machine(
    shared: Shared, sharing: list[ModelConfig], offered: list[hardware.Instance], kind: str
) -> Finding:
    largest = max(offered, key=lambda it: pods.share(it, 1)[::-1])
    cores, memory = pods.share(largest, 1)
    count = Counter(part.name for part in shared.parts)
    names = ", ".join(f"{number} × {it}" if number > 1 else it for it, number in count.items())
    needed, asked = pods.of_all(sharing, 1, cores)
    said = (
        f"{names} share a GPU, and need a pod with {needed} cores and {asked} GiB of host memory; "
        f"of EC2's machines {largest.name} gives the most to one {kind}, {cores} and {memory}"
    )
    fix = "lower their resources.num_cpus or memory_gib, or give them larger parts"
    return Finding(CHECK, "fail", shared.parts[0].name, said, fix)


def show(gpus: list[Shared], crowded: Iterable[Finding], console: Console) -> None:
    """Print each shared GPU as a table, in GiB; of several alike, what they are asked for."""
    alike: dict[str, list[Shared]] = {}
    for gpu in gpus:
        alike.setdefault(gpu.kind, []).append(gpu)
    for kind, of in alike.items():
        for number, gpu in enumerate(of, 1):
            which = f"GPU {number} of {len(of)}" if len(of) > 1 else "a GPU"
            asked = f"; {sum(1 - it.free for it in of):g} are asked for" if len(of) > 1 else ""
            console.print(
                f"\n[bold]What shares {which}{f' ({kind})' if kind else ''}[/], in GiB{asked}"
            )
            console.print(_table(gpu))
    for finding in crowded:
        console.print(f"\n[bold]does not fit[/]: {escape(finding.text)}", soft_wrap=True)


def _table(gpu: Shared) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("model", header_style="dim", overflow="fold")
    for column in ("part", "GiB", "weights", "working", "context", "KV cache", "KV tokens"):
        # Numbers and settings stay whole on a narrow screen; names are folded.
        least = max([len(column), *(len(it.setting) for it in gpu.parts if column == "part")])
        table.add_column(column, header_style="dim", no_wrap=True, min_width=least)
    for part in gpu.parts:
        table.add_row(part.name, part.setting, *_cells(part))
    if gpu.free > 0:
        table.add_row("[dim]free[/]", f"{gpu.free:g}")
    return table


def as_json(gpus: list[Shared]) -> list[dict[str, Any]]:
    """The same as plain data; sizes in bytes."""
    return [
        {
            "gpu": gpu.kind,
            "free": gpu.free,
            "models": [
                {"name": part.name, "fraction": part.fraction, **_sizes(part)} for part in gpu.parts
            ],
        }
        for gpu in gpus
    ]


def _sizes(part: Part) -> dict[str, int]:
    plan = part.plan
    if plan is None:
        return {}
    stage = plan.tightest
    return {
        "part_bytes": plan.engine.part_bytes or 0,
        "weights_bytes": stage.weights,
        "working_bytes": stage.without_kv - stage.weights,
        "context_bytes": CONTEXT_BYTES,
        "kv_cache_bytes": max(0, stage.kv_cache) if plan.groups else 0,
        "kv_cache_tokens": plan.kv_cache_tokens,
    }


def _cells(part: Part) -> list[str]:
    *sizes, tokens = _sizes(part).values()
    return [*(f"{size / GIB:.1f}" for size in sizes), f"{tokens:,}" if tokens else "-"]

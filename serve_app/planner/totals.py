"""The EC2 machines of all models of a config, at their fewest and at their most replicas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from serve_app.config.settings import ModelConfig
from serve_app.planner import choose, hardware, swap, together
from serve_app.planner.hardware import MIB, Instance
from serve_app.planner.report import Report


def machines(reports: Iterable[Report]) -> tuple[dict[str, int], dict[str, int]]:
    """Machines by EC2 type, for the fewest and for the most replicas.

    Replicas that are on one machine each share machines of the same type; a replica of several
    machines has them to itself. Models that fit on none are left out.
    """
    placed = [report for report in reports if report.machines]
    fewest: dict[str, float] = {}
    most: dict[str, float] = {}
    groups: dict[str, list[Report]] = {}
    for report in placed:
        if group := report.config.resources.swap_group:
            groups.setdefault(group, []).append(report)
        if group or report.config.resources.part_of_gpu:
            continue
        best = report.machines[0]
        share = report.plan.parallel.gpus / best.instance.gpus if best.count == 1 else best.count
        for total, count in zip((fewest, most), report.config.replica_range, strict=True):
            total[best.instance.name] = total.get(best.instance.name, 0) + count * share
    for which, total in enumerate((fewest, most)):
        # A swap group has its one GPU also while all its models are scaled to zero.
        for sharing in (*groups.values(), *_sharing(placed, which)):
            instance = _holding(sharing)
            total[instance.name] = total.get(instance.name, 0) + 1 / instance.gpus
    return _whole(fewest), _whole(most)


def _sharing(reports: list[Report], which: int) -> Iterator[list[Report]]:
    """Those on each GPU that parts share, at the fewest (0) or most (1) replicas."""
    kinds: dict[str, list[Report]] = {}
    for report in reports:
        if report.config.resources.part_of_gpu:
            kinds.setdefault(report.plan.gpu.name, []).append(report)
    for alike in kinds.values():
        named = {report.name: report for report in alike}
        parts = [
            part
            for report in alike
            if (part := together.part_of(report.name, report.config, report.plan.gpu))
            for _ in range(report.config.replica_range[which])
        ]
        for gpu in together.packed(parts):
            yield [named[part.name] for part in gpu.parts]


def _holding(sharing: list[Report]) -> Instance:
    """The first machine with the cores and the host memory of all that share a GPU; where none
    has, the first."""
    cpu_m = sum(1000 * choose.own_cpus(report.config) for report in sharing)
    mib = sum(_host_mib(report.config) for report in sharing)
    machines = [machines.instance for machines in sharing[0].machines]
    roomy = (
        one
        for one in machines
        if one.allocatable_cpu_m >= cpu_m and one.allocatable_memory_mib >= mib
    )
    return next(roomy, machines[0])


def _host_mib(config: ModelConfig) -> float:
    asleep = swap.host_bytes(config) if config.resources.swap_group else 0
    return max(1024 * (config.resources.memory_gib or 0), asleep / MIB)


def _whole(total: dict[str, float]) -> dict[str, int]:
    order = [*hardware.instances()]
    named = sorted(total, key=order.index)
    return {name: count for name in named if (count := math.ceil(round(total[name], 6)))}


def said(reports: list[Report]) -> str | None:
    """The total in a sentence; None without GPUs."""
    fewest, most = machines(reports)
    if not most:
        return None
    text = f"all models together: {_listed(fewest) or 'no machine while all are scaled to zero'}"
    if most != fewest:
        text += f"; at most {_listed(most)}"
    left_out = [one.name for one in reports if not one.plan.fits]
    return text + (f" (without {', '.join(left_out)})" if left_out else "")


def _listed(total: dict[str, int]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in total.items())


def as_json(reports: list[Report]) -> dict[str, Any]:
    """The same as plain data."""
    fewest, most = machines(reports)
    return {"fewest": fewest, "most": most}

"""The EC2 machines of all models of a config, at their fewest and at their most replicas."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from serve_app.config.settings import ModelConfig
from serve_app.planner import hardware, pods, together
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
    kinds: dict[str, list[Report]] = {}
    for report in placed:
        if group := report.config.resources.swap_group:
            groups.setdefault(group, []).append(report)
            continue
        if report.config.resources.part_of_gpu:
            kinds.setdefault(report.plan.gpu.name, []).append(report)
            continue
        best = report.machines[0]
        share = report.plan.parallel.gpus / best.instance.gpus if best.count == 1 else best.count
        for total, count in zip((fewest, most), report.config.replica_range, strict=True):
            total[best.instance.name] = total.get(best.instance.name, 0) + count * share
    for members in groups.values():
        # It has its one GPU also while all its models are scaled to zero.
        pod = pods.of_group({report.name: report.config for report in members})
        _add(members, [[[pod]]] * 2, fewest, most)
    for alike in kinds.values():
        _add(alike, [_pods(alike, which) for which in (0, 1)], fewest, most)
    return _whole(fewest), _whole(most)


def _pods(sharing: list[Report], which: int) -> list[list[ModelConfig]]:
    """The replicas on each GPU that parts of one type share, at the fewest (0) or most (1)."""
    configs = {report.name: report.config for report in sharing}
    shared = together.on_gpus(configs, sharing[0].plan.gpu, which)
    return [[configs[part.name] for part in gpu.parts] for gpu in shared]


def _add(
    reports: list[Report], at: list[list[list[ModelConfig]]], *totals: dict[str, float]
) -> None:
    """Add to each of the totals the machines for its pods, which have a GPU each.

    They are one group, so of the first type that holds each of them at their most; where none
    does, of the first.
    """
    offered = [machines.instance for machines in reports[0].machines]
    holding = (it for it in offered if all(pods.fits(it, 1, pod) for pod in at[-1]))
    instance = next(holding, offered[0])
    for total, alike in zip(totals, at, strict=True):
        if alike:
            total[instance.name] = total.get(instance.name, 0) + len(alike) / instance.gpus


def _whole(total: dict[str, float]) -> dict[str, int]:
    order = [*hardware.instances()]
    named = sorted(total, key=order.index)
    return {name: count for name in named if (count := math.ceil(round(total[name], 6)))}


def verdict(reports: list[Report], together_fit: bool) -> str:
    """Whether all fit, and the machines for all together, in a sentence.

    Which machines are taken by what shares a GPU and does not fit (``together_fit``) has no answer.
    """
    not_fitting = [one.name for one in reports if not one.plan.fits]
    if not_fitting:
        fit = f"{len(not_fitting)} of {len(reports)} models do not fit: {', '.join(not_fitting)}"
    elif not together_fit:
        return "each model fits, but what shares a GPU does not: see below"
    else:
        fit = f"all {len(reports)} models fit"
    fewest, most = machines(reports)
    if not most:
        return fit
    text = f"together: {_listed(fewest) or 'no machine while all are scaled to zero'}"
    if most != fewest:
        text += f"; at most {_listed(most)}"
    return f"{fit}; {text}" + (f" (without {', '.join(not_fitting)})" if not_fitting else "")


def _listed(total: dict[str, int]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in total.items())


def as_json(reports: list[Report]) -> dict[str, Any]:
    """The same as plain data."""
    fewest, most = machines(reports)
    return {"fewest": fewest, "most": most}

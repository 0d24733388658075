"""The EC2 machines of all models of a config, at their fewest and at their most replicas."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from serve_app.config.settings import ModelConfig
from serve_app.planner import hardware, shares
from serve_app.planner.report import Report


def replicas(config: ModelConfig) -> tuple[int, int]:
    """The fewest and the most replicas of a model."""
    if config.autoscaling is not None:
        return config.autoscaling.min_replicas, config.autoscaling.max_replicas
    return config.replicas or 1, config.replicas or 1


def machines(reports: Iterable[Report]) -> tuple[dict[str, int], dict[str, int]]:
    """Machines by EC2 type, for the fewest and for the most replicas.

    Replicas that are on one machine each share machines of the same type; a replica of several
    machines has them to itself. Models that fit on none are left out.
    """
    fewest: dict[str, float] = {}
    most: dict[str, float] = {}
    groups: set[str] = set()
    for report in reports:
        group = report.config.resources.swap_group
        if not report.machines or group in groups:
            continue
        if group:  # its models share one GPU, which is there also while all are scaled to zero
            groups.add(group)
        best = report.machines[0]
        gpus: float = report.plan.parallel.gpus
        if report.config.resources.part_of_gpu:
            gpus = shares.fraction_of(report.config, report.plan.gpu) or 1.0
        share = gpus / best.instance.gpus if best.count == 1 else best.count
        counts = (1, 1) if group else replicas(report.config)
        for total, count in zip((fewest, most), counts, strict=True):
            total[best.instance.name] = total.get(best.instance.name, 0) + count * share
    return _whole(fewest), _whole(most)


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

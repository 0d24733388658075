"""The simulator's runs: which there are, and what is kept of each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.routing.engine import H100_8B
from benchmarks.routing.fleet import Fleet, Outcome
from benchmarks.routing.policies import POLICIES, ROUND_ROBIN
from benchmarks.routing.traces import TRACES

MEASURED_S = 120.0
"""Of each run, after the trace's time to warm up."""

_PATIENCE_S = 180.0
"""After the last measured arrival; what has not ended by then is counted as such."""

FEW_LOADS = (1.0, 1.5)
"""Requests/s that are offered, over what round robin completes where more are offered."""

MORE_LOADS = (2.0, 0.8)

SEEDS = (1, 2, 3)

MAIN = 8, 1
"""Replicas and gateways of the fleet that is looked at closely."""

SEVERAL = ((2, 2), (8, 8), (8, 2))
"""Fleets of several gateways, looked at with one seed; at the first of the loads with all."""

OTHERS = (*SEVERAL, (2, 1), (64, 8), (64, 1), (64, 2))
"""Looked at with one seed."""


@dataclass(frozen=True)
class Case:
    """One run."""

    trace: str
    replicas: int
    gateways: int
    policy: str
    load: float
    seed: int


def cases(*, quick: bool) -> Iterator[Case]:
    """All of them, what matters most first; or those of the main fleet, and of one other, once."""
    seeds, others = (SEEDS[:1], OTHERS[:1]) if quick else (SEEDS, OTHERS)
    fleets: list[tuple[tuple[int, int], tuple[float, ...], int]] = []
    fleets += [(MAIN, FEW_LOADS, seed) for seed in seeds]
    fleets += [(fleet, FEW_LOADS, 1) for fleet in others]
    fleets += [(fleet, FEW_LOADS[:1], seed) for seed in seeds[1:] for fleet in SEVERAL]
    fleets += [(MAIN, MORE_LOADS, 1)]
    for (replicas, gateways), loads, seed in fleets:
        for load in loads:
            for trace in TRACES:
                for policy in POLICIES:
                    yield Case(trace, replicas, gateways, policy, load, seed)


def capacity(trace: str, replicas: int) -> float:
    """Requests/s that round robin completes where half as many again, or more, are offered."""
    rate = 1.5 * replicas
    while True:
        outcome = _play(trace, replicas, 1, ROUND_ROBIN, rate, 1, patience_s=0.0)
        completed = outcome.ended / MEASURED_S
        if completed < rate / 1.5:
            return round(completed, 3)
        rate *= 2


def run(case: Case, rate: float) -> dict[str, Any]:
    """Play a case; what is kept of it."""
    began = time.process_time()
    outcome = _play(case.trace, case.replicas, case.gateways, case.policy, rate, case.seed)
    prompts = max(1, outcome.prompt_tokens)
    return asdict(case) | {
        "rate": round(rate, 3),
        "arrived_per_s": round(outcome.arrived / MEASURED_S, 3),
        "requests_per_s": round(outcome.ended / MEASURED_S, 3),
        "tokens_per_s": round(outcome.output_tokens / MEASURED_S, 1),
        "ttft_s": {f"p{q}": round(quantile(outcome.ttft_s, q / 100), 4) for q in (50, 90, 99)},
        "hit": round(outcome.cached_tokens / prompts, 4),
        "predicted_hit": round(outcome.predicted_tokens / prompts, 4),
        "reasons": dict(outcome.reasons),
        "held": outcome.held,
        "unfinished": outcome.unfinished,
        "cpu_s": round(time.process_time() - began, 1),
    }


def quantile(values: list[float], part: float) -> float:
    """The smallest value that at least ``part`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def _play(
    trace: str, replicas: int, gateways: int, policy: str, rate: float, seed: int,
    patience_s: float = _PATIENCE_S,
) -> Outcome:  # fmt: skip
    shape = TRACES[trace]
    end = shape.warm_s + MEASURED_S
    fleet = Fleet(H100_8B, replicas, gateways, POLICIES[policy], seed)
    return fleet.run(shape.at(rate, end, seed), shape.warm_s, end, end + patience_s)


def _capacity(of: tuple[str, int]) -> float:
    return capacity(*of)


def play_all(path: Path, budget_s: float, *, quick: bool, processes: int) -> bool:
    """Play what a result file does not have yet; whether it has everything now.

    Args:
        budget_s: no run is begun after so many seconds; a later call goes on.
    """
    data = json.loads(path.read_text()) if path.is_file() else {}
    capacities: dict[str, float] = data.setdefault("round_robin_requests_per_s", {})
    records: list[dict[str, Any]] = data.setdefault("runs", [])
    data["engine"] = asdict(H100_8B)
    data["traces"] = {name: trace.about for name, trace in TRACES.items()}
    keys = tuple(Case.__dataclass_fields__)
    have = {tuple(record[key] for key in keys) for record in records}
    wanted = [c for c in cases(quick=quick) if tuple(asdict(c).values()) not in have]
    deadline = time.monotonic() + budget_s

    def save() -> None:
        path.write_text(json.dumps(data, indent=1) + "\n")

    at = 0
    with ProcessPoolExecutor(processes) as pool:
        while at < len(wanted) and time.monotonic() < deadline:
            part = wanted[at : at + 8 * processes]
            sizes = {f"{c.trace}, {c.replicas}": (c.trace, c.replicas) for c in part}
            missing = [key for key in sizes if key not in capacities]
            found = pool.map(_capacity, [sizes[key] for key in missing])
            capacities.update(zip(missing, found, strict=True))
            rates = [c.load * capacities[f"{c.trace}, {c.replicas}"] for c in part]
            records.extend(pool.map(run, part, rates))
            at += len(part)
            path.write_text(json.dumps(data, indent=1) + "\n")
            print(f"{len(records)} runs, {len(wanted) - at} left", flush=True)
    return at >= len(wanted)

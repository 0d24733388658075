"""What replicas' weights (``serve_app/gateway/standing.py``) do to TTFT and errors, simulated.

    PYTHONPATH=. python -m benchmarks.replica_weights

The gateway's own policy and judge, and a clock that is set. A replica computes prompts one after
the other, at so many tokens per second, and decodes all requests at once. Each case runs with the
same requests twice, with the judge and without; ratios are with/without: minimum, median, maximum.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from serve_app.cluster.exchange import Usage
from serve_app.gateway.ledger import Entry
from serve_app.gateway.policy import FewestRequests
from serve_app.gateway.replicas import Board, FrontEnd
from serve_app.gateway.standing import Outliers

PREFILL = 25_000.0
"""Tokens per second of an ordinary replica."""

BASE = 500
"""Tokens' worth of time that each request takes besides its prompt."""

DECODE_S, ERROR_S = 2.0, 0.01
UNTIL_S, WARM_S = 400.0, 60.0
SEEDS = range(5)

CASES: dict[str, tuple[Sequence[float], float]] = {
    "4 equal, load 0.5": ([1, 1, 1, 1], 32),
    "4 equal, load 0.8": ([1, 1, 1, 1], 51),
    "4 equal, load 0.95": ([1, 1, 1, 1], 61),
    "8 equal, load 0.85": ([1] * 8, 108),
    "one of 4 is 4 times slower, load 0.5": ([1, 1, 1, 1 / 4], 26),
    "one of 4 is 4 times slower, load 0.8": ([1, 1, 1, 1 / 4], 42),
    "one of 4 is 10 times slower, load 0.8": ([1, 1, 1, 1 / 10], 40),
    "one of 4 answers 500 at once": ([1, 1, 1, 0], 30),
    "one of 2 answers 500 at once": ([1, 0], 15),
}
"""By name: each replica's speed (0: it fails), and requests per second."""


@dataclass
class Simulation:
    """One run. Prompts are lognormal, with a median of 665 tokens."""

    speeds: Sequence[float]
    rate: float
    seed: int
    judged: bool
    now: float = 0.0
    ttfts: list[float] = field(default_factory=list)
    requests: int = 0
    errors: int = 0

    def run(self) -> Simulation:
        random.seed(self.seed)  # the policy's ties
        self._chance = random.Random(self.seed)
        board = Board()
        board.publish("m", {f"r{n}": ("h", n) for n in range(len(self.speeds))})
        self._live = board.live("m")
        self._judge = Outliers(board, lambda: self.now)
        self._policy = FewestRequests(lambda: self.now)
        self._busy_until = [0.0] * len(self.speeds)
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._at(0, self._arrives)
        while self.now < UNTIL_S:
            self.now, _, happens = heapq.heappop(self._events)
            happens()
        return self

    def _at(self, time: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), happens))

    def _arrives(self) -> None:
        self._at(self.now + self._chance.expovariate(self.rate), self._arrives)
        tokens = int(self._chance.lognormvariate(6.5, 1.0))
        decodes_s = self._chance.expovariate(1 / DECODE_S)
        front_end = self._policy.choose(self._live, cast(Any, None))
        front_end.began()
        self.requests += 1
        arrived, n = self.now, front_end.port
        if not self.speeds[n]:
            self.errors += 1
            self._at(arrived + ERROR_S, lambda: self._ended(front_end, None, 0))
            return
        first = max(arrived, self._busy_until[n]) + (BASE + tokens) / (PREFILL * self.speeds[n])
        self._busy_until[n] = first
        if arrived > WARM_S:
            self.ttfts.append(first - arrived)
        self._at(first + decodes_s, lambda: self._ended(front_end, first - arrived, tokens))

    def _ended(self, front_end: FrontEnd, ttft: float | None, tokens: int) -> None:
        front_end.ended()
        status = 500 if ttft is None else 200
        usage = Usage(tokens, 0, 10)
        entry = Entry("x", "x", "", "m", "m", "/", front_end.id, "answered", status, 0, 0, ttft,
                      1, 0, usage, streamed=True)  # fmt: skip
        if self.judged:
            self._judge.entered(entry)

    def quantile(self, part: float) -> float:
        return sorted(self.ttfts)[int(part * len(self.ttfts))]


def main() -> None:
    logging.disable(logging.WARNING)
    for name, (speeds, rate) in CASES.items():
        runs = [[Simulation(speeds, rate, s, j).run() for j in (False, True)] for s in SEEDS]
        said = [name]
        for part in (0.5, 0.9):
            ratios = sorted(after.quantile(part) / before.quantile(part) for before, after in runs)
            median = statistics.median(ratios)
            said.append(f"TTFT p{part * 100:g} {ratios[0]:.2f} - {median:.2f} - {ratios[-1]:.2f}")
        for which, label in enumerate(("errors", "→")):
            share = statistics.median(run[which].errors / run[which].requests for run in runs)
            said.append(f"{label} {share:.1%}")
        print("; ".join(said), flush=True)


if __name__ == "__main__":
    main()

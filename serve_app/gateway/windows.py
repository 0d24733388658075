"""How much was taken in the time that a limit looks back on: a sliding window of buckets.

A bucket is a part of that time, counted from the epoch, so that all gateways have the same ones.
As the window slides, its oldest bucket counts in part, as if what is in it had come evenly. So a
minute is never wrong by more than what came in one of its six buckets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

Taken = dict[int, float]
"""What was taken, by bucket."""


@dataclass(frozen=True, eq=False)
class Span:
    """The time that a limit looks back on. ``now`` is in seconds since the epoch."""

    bucket_s: float
    buckets: int = 1
    """That count in full; a span of one bucket begins anew with each."""

    @cached_property
    def _slides(self) -> bool:
        return self.buckets > 1

    def bucket(self, now: float) -> int:
        return int(now // self.bucket_s)

    def used(self, taken: Mapping[int, float], now: float) -> float:
        # Asked of each limit of each request: no call for each bucket.
        fading = self.bucket(now) - self.buckets
        used = 0.0
        for bucket, amount in taken.items():
            if bucket > fading:
                used += amount
            elif bucket == fading and self._slides:
                used += amount * self._left(bucket, now)
        return used

    def wait(self, taken: Mapping[int, float], excess: float, now: float) -> float:
        """Seconds until ``excess`` of what is taken does not count any more."""
        ends = 0.0
        for bucket, amount in sorted(taken.items()):
            left = self._left(bucket, now)
            if amount <= 0 or left <= 0:
                continue
            ends = (bucket + self.buckets + self._slides) * self.bucket_s - now
            counts = amount * min(1.0, left) if self._slides else amount
            if counts >= excess:
                return ends - (counts - excess) / amount * self.bucket_s if self._slides else ends
            excess -= counts
        return ends

    def ends(self, taken: Mapping[int, float], now: float) -> float:
        """Seconds until nothing of it counts any more."""
        newest = max((bucket for bucket, amount in taken.items() if amount > 0), default=None)
        if newest is None:
            return 0.0
        return max(0.0, (newest + self.buckets + self._slides) * self.bucket_s - now)

    def prune(self, taken: Taken, now: float) -> None:
        """Forget the buckets that do not count any more."""
        for bucket in [b for b in taken if self._left(b, now) <= 0]:
            del taken[bucket]

    def _left(self, bucket: int, now: float) -> float:
        """Buckets' lengths until it does not count any more; the last one of them it fades."""
        return bucket + self.buckets + self._slides - now / self.bucket_s

"""What others do, in a few lines each, as reference policies of the simulator."""

from __future__ import annotations

from collections.abc import Sequence

CACHE_THRESHOLD = 0.3
BALANCE_ABS_THRESHOLD = 64
BALANCE_REL_THRESHOLD = 1.5
"""The defaults of ``vllm-router`` 0.1.17 and of SMG (``--cache-threshold`` and so on)."""

_LETTERS = 27
"""Characters with which the rest of a prompt may begin."""


class CacheAware:
    """vllm-router's ``cache_aware``, which it has from SMG (``src/policies/cache_aware.rs`` there).

    One radix tree of texts. A node belongs to the worker whose request made it, and stays so when
    others send through it. Where the requests in flight differ by more than 64 and by half, the
    worker with the fewest gets it; else the owner of the deepest node that the prompt reaches, if
    more than 0.3 of it match; else the one with the fewest. A node that is reached only in part
    counts too: its first character is enough.

    Here the tree's texts are blocks of 16 tokens, and what begins after a matched block is a node
    for each of 27 first characters. Its eviction (33 million characters for each worker, every 120
    s) is left out: no run here sends a worker so much.
    """

    def __init__(self) -> None:
        self._owner: dict[int, int] = {}
        self._begun: dict[tuple[int, int], int] = {}
        """Owners of nodes that begin after a block, by the block and their first character."""

    def choose(self, inflight: Sequence[int], blocks: Sequence[int]) -> tuple[int, str, int]:
        """The worker for a prompt of these blocks, why, and how many of its blocks matched."""
        fewest = min(range(len(inflight)), key=inflight.__getitem__)
        most, least = max(inflight), inflight[fewest]
        if most - least > BALANCE_ABS_THRESHOLD and most > BALANCE_REL_THRESHOLD * least:
            chosen, why, matched = fewest, "imbalanced", 0
        else:
            matched = next(
                (n for n, block in enumerate(blocks) if block not in self._owner), len(blocks)
            )
            if matched > CACHE_THRESHOLD * len(blocks):
                chosen, why = self._owner[blocks[matched - 1]], "matched"
                if matched < len(blocks):
                    chosen = self._begun.get(_begin(blocks, matched), chosen)
            else:
                chosen, why = fewest, "unmatched"
        self._insert(blocks, chosen)
        return chosen, why, matched if why == "matched" else 0

    def _insert(self, blocks: Sequence[int], worker: int) -> None:
        for number, block in enumerate(blocks):
            if block not in self._owner:
                if number:
                    self._begun.setdefault(_begin(blocks, number), worker)
                self._owner[block] = worker


def _begin(blocks: Sequence[int], at: int) -> tuple[int, int]:
    # A block's number says nothing of its text; scrambled, it stands for its first character.
    return blocks[at - 1], (blocks[at] * 2654435761 >> 8) % _LETTERS

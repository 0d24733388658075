"""Which replicas have which blocks of prompts in their KV caches, as far as this gateway knows.

Each replica's part has a size, and forgets what was used least recently, as the engine does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

Block = bytes
"""A hash of a prompt from its beginning to the end of a block (:mod:`.prefix`)."""


class _Part:
    """One replica's blocks, the least recently used first."""

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.capacity = 0
        self.blocks: OrderedDict[Block, int] = OrderedDict()
        """With each, how many prompts had all up to it in common with what was here, and then
        something new."""


class Index:
    """Blocks by replica, and replicas by block."""

    def __init__(self) -> None:
        self._parts: dict[str, _Part] = {}
        self._holders: dict[Block, int] = {}
        """By block: the bits of the replicas that have it."""

    @property
    def replicas(self) -> Iterable[str]:
        """The ids of those that it knows something of."""
        return self._parts.keys()

    def blocks(self, replica: str) -> int:
        """How many blocks a replica has."""
        part = self._parts.get(replica)
        return len(part.blocks) if part else 0

    def match(self, blocks: Sequence[Block]) -> dict[str, int]:
        """How many of a prompt's leading blocks each replica has; only those with at least one.

        A walk along the prompt that ends where the last replica drops out: its time does not grow
        with the number of replicas.
        """
        if not blocks or not (having := self._holders.get(blocks[0], 0)):
            return {}
        left, at = having, {}
        for n, block in enumerate(blocks):
            now = left & self._holders.get(block, 0)
            if now != left:
                at[left & ~now] = n
                left = now
                if not left:
                    break
        if left:
            at[left] = len(blocks)
        return {
            id: n
            for id, part in self._parts.items()
            if part.bit & having
            for bits, n in at.items()
            if part.bit & bits
        }

    def add(self, replica: str, blocks: Sequence[Block], capacity: int) -> None:
        """A replica has, or is about to have, all blocks of a prompt.

        Args:
            capacity: the most blocks that it can have.
        """
        part = self._parts.get(replica)
        if part is None:
            part = self._parts[replica] = _Part(self._free_bit())
        part.capacity = capacity
        # The last block first: of one prompt the beginning is then forgotten last.
        its, holders, bit = part.blocks, self._holders, part.bit
        new = False
        for block in reversed(blocks[:capacity]):
            if block not in its:
                its[block] = 0
                holders[block] = holders.get(block, 0) | bit
                new = True
                continue
            its.move_to_end(block)
            if new:
                its[block] += 1
                new = False
        self._trim(part)

    def went_on(self, replica: str, block: Block) -> int:
        """How many prompts have gone on from this block otherwise than what was there.

        If any has, more than one conversation begins so: the next turn of one goes on from its
        own last block. A turn of less than a block, and a prompt that is sent again, add nothing.
        """
        part = self._parts.get(replica)
        return part.blocks.get(block, 0) if part else 0

    def clear(self, replica: str) -> None:
        """Forget what a replica had: it has dropped its cache, or is gone."""
        if part := self._parts.pop(replica, None):
            part.capacity = 0
            self._trim(part)

    def _trim(self, part: _Part) -> None:
        holders, others = self._holders, ~part.bit
        for _ in range(len(part.blocks) - part.capacity):
            block, _ = part.blocks.popitem(last=False)
            if left := holders[block] & others:
                holders[block] = left
            else:
                del holders[block]

    def _free_bit(self) -> int:
        taken = 0
        for part in self._parts.values():
            taken |= part.bit
        return ~taken & (taken + 1)  # the lowest bit that none has

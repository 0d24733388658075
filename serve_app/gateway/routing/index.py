"""Which replicas have which blocks of prompts in their KV caches, as far as this gateway knows.

Each replica's part is as large as its own KV cache, and forgets what was used least recently, as
the engine does. The engine also keeps what it has generated and what other gateways sent, so it
may forget sooner than this index: :meth:`Index.resize` makes a part smaller.
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
        self.blocks: OrderedDict[Block, None] = OrderedDict()


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

    def knows(self, block: Block) -> bool:
        """Whether any replica has this block."""
        return block in self._holders

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
        kept = blocks[:capacity]
        for block in reversed(kept):
            if block in part.blocks:
                part.blocks.move_to_end(block)
            else:
                part.blocks[block] = None
                self._holders[block] = self._holders.get(block, 0) | part.bit
        self._trim(part)

    def resize(self, replica: str, capacity: int) -> None:
        """Its KV cache holds fewer or more blocks of prompts than was thought."""
        if part := self._parts.get(replica):
            part.capacity = capacity
            self._trim(part)

    def clear(self, replica: str) -> None:
        """Forget what a replica had: it has dropped its cache, or is gone."""
        if part := self._parts.pop(replica, None):
            part.capacity = 0
            self._trim(part)

    def _trim(self, part: _Part) -> None:
        while len(part.blocks) > part.capacity:
            block, _ = part.blocks.popitem(last=False)
            if left := self._holders[block] & ~part.bit:
                self._holders[block] = left
            else:
                del self._holders[block]

    def _free_bit(self) -> int:
        taken = 0
        for part in self._parts.values():
            taken |= part.bit
        return ~taken & (taken + 1)  # the lowest bit that none has

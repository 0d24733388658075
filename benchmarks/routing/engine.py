"""An engine in simulated time: chunked prefill, decode in the same steps, and vLLM's prefix cache.

A request is admitted when the blocks of its whole prompt are free; while it decodes it takes more,
and where there are none, the one that came last is preempted and computed again later.

What it leaves out: the part of a prefill's attention that grows with the square of its length,
tokenization and HTTP, CUDA graphs' sizes, speculative decoding, cascade attention.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

BLOCK = 16
"""Tokens of a block of vLLM's KV cache."""

_BULK = 64
"""Decode steps, at most, that are taken for equally long."""


@dataclass(frozen=True)
class Speed:
    """What a step of an engine takes."""

    fixed_s: float
    """Of every step: scheduling, launching, sampling."""

    weights_s: float
    """Reading the weights once; arithmetic takes place meanwhile."""

    tokens_per_s: float
    """Arithmetic: tokens, prefilled or decoded, where a step has many."""

    context_s: float
    """Reading the KV cache of one token of a decoding request's context."""

    batch_tokens: int
    """``max_num_batched_tokens``."""

    most_seqs: int
    """``max_num_seqs``."""

    kv_tokens: int
    """The size of the KV cache."""

    def step(self, prefill: int, decodes: int, context: int) -> float:
        """Seconds of a step with so many tokens, the decoding ones having so much context."""
        arithmetic = (prefill + decodes) / self.tokens_per_s
        return self.fixed_s + max(self.weights_s, arithmetic) + context * self.context_s


H100_8B = Speed(
    fixed_s=0.0011, weights_s=0.0049, tokens_per_s=42_000, context_s=48.5e-9,
    batch_tokens=8192, most_seqs=1024, kv_tokens=452_288,
)  # fmt: skip
"""Llama 3.1 8B, bf16, on one H100 80GB, fitted to bare vLLM 0.29 in ``results/h100.json`` (a test
holds it against that file). There a token takes 6.05 ms with one client: 4.9 ms is the
reading of 15 GiB at 3.35 TB/s. With 256 clients, 35 steps of 187 decodes and 26,100 prompt tokens
make a second: 42,000 tokens/s is what the arithmetic then must do. 48.5 ns are 128 KiB of KV cache
at 2.7 TB/s. The last three numbers are ``serve-app plan meta-llama/Llama-3.1-8B-Instruct --gpu
H100``'s."""


QUARTER = replace(H100_8B, kv_tokens=H100_8B.kv_tokens // 4)
"""With a quarter of its cache, for runs in real time."""


class Cache:
    """Blocks by their number, in use or free to be evicted: the least recently used one first.

    As vLLM's: a block is found by the hash of all tokens up to its end; a request's blocks are
    freed from its last one on, so that of one prompt the tail goes first.
    """

    def __init__(self, blocks: int) -> None:
        self.size = blocks
        self._used: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._blank = blocks
        self.decoded = 0
        """In use, without a number yet: requests that decode fill them."""

    @property
    def used(self) -> int:
        return len(self._used) + self.decoded

    @property
    def free(self) -> int:
        return self._blank + len(self._idle)

    def found(self, blocks: Sequence[int]) -> int:
        """How many of the first of these are there."""
        for number, block in enumerate(blocks):
            if block not in self._used and block not in self._idle:
                return number
        return len(blocks)

    def fits(self, blocks: Sequence[int], found: int, more: int = 0) -> bool:
        """Whether all of these can be taken, ``found`` of which are there, and ``more``."""
        idle = sum(block in self._idle for block in blocks[:found])
        return self.free - idle >= len(blocks) - found + more

    def take(self, blocks: Sequence[int]) -> None:
        """Use these; what is not there takes a blank block, or the one evicted first."""
        used, idle = self._used, self._idle
        for block in blocks:
            if block in used:
                used[block] += 1
                continue
            if block in idle:
                del idle[block]
            else:
                self._evict()
            used[block] = 1

    def release(self, blocks: Sequence[int]) -> None:
        """Use these no more; they stay until they are evicted."""
        used, idle = self._used, self._idle
        for block in reversed(blocks):
            if used[block] > 1:
                used[block] -= 1
            else:
                del used[block]
                idle[block] = None

    def unnamed(self, blocks: int) -> None:
        """So many blocks are in use by requests that decode."""
        for _ in range(blocks - self.decoded):
            self._evict()
        self._blank += max(0, self.decoded - blocks)
        self.decoded = blocks

    def _evict(self) -> None:
        if self._blank:
            self._blank -= 1
        else:
            self._idle.popitem(last=False)


@dataclass(eq=False, slots=True)
class Request:
    """A request in an engine."""

    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int]
    """Of prompt and answer, the full ones."""

    cached_tokens: int = 0
    """Of the prompt, found when it was admitted first."""

    generated: int = 0
    """Tokens that it had when it was preempted."""

    done: int = 0
    """Tokens whose keys and values it has, of the prompt and those generated before."""

    taken: int = 0
    """Blocks of these."""

    first_token: float = math.nan
    ended: float = math.nan
    preempted: int = 0
    owner: Any = None
    """What its sender wants to remember."""

    @property
    def length(self) -> int:
        """Tokens to compute before it decodes."""
        return self.prompt_tokens + self.generated

    @property
    def left(self) -> int:
        """Tokens to generate."""
        return self.output_tokens - self.generated


class Engine:
    """Runs requests, first come first served. The caller tells the time, and calls at each end.

    After :meth:`add` and :meth:`step_ended`, :attr:`ends` is when the current step ends.
    """

    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        self.cache = Cache(speed.kv_tokens // BLOCK)
        self.waiting: deque[Request] = deque()
        self._prefilling: deque[Request] = deque()
        self._chunks: list[tuple[Request, int]] = []
        self._decoding: list[tuple[int, int, Request]] = []
        """By the decode step with which each ends."""

        self._steps = 0
        self._number = 0
        self._context = 0
        """Tokens of those that decode, of prompts and answers."""

        self._produced = 0
        """Of these, what has been decoded since their prefill."""

        self._ahead = 0
        """Tokens that the current steps decode: they have blocks already."""

        self._began = 0.0
        self._bulk = (0, 0.0)
        """Decode steps until :attr:`ends`, and the time of each."""

        self.ends = math.inf

    @property
    def running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    @property
    def kv_cache_usage(self) -> float:
        return self.cache.used / self.cache.size

    def add(self, request: Request, now: float) -> None:
        """Take a request. It gets into a step when the current one has ended."""
        self.waiting.append(request)
        if self.ends == math.inf:
            self._step(now)
        elif self._bulk[0] > 1:
            # Decode steps were counted together: go on from the end of the one that runs.
            steps, each = self._bulk
            begun = min(steps, max(1, math.ceil((now - self._began) / each)))
            self._bulk = (begun, each)
            self.ends = self._began + begun * each

    def step_ended(self) -> tuple[list[Request], list[Request]]:
        """Begin the next step; which requests have their first token now, and which have ended."""
        now, first, ended = self.ends, [], []
        steps = self._bulk[0]
        self._steps += steps
        self._context += steps * len(self._decoding)
        self._produced += steps * len(self._decoding)
        self._ahead = 0
        while self._decoding and self._decoding[0][0] <= self._steps:
            _, _, request = heapq.heappop(self._decoding)
            self._stop(request, request.left - 1)
            ended.append(request)
        for request, tokens in self._chunks:
            request.done += tokens
            if request.done < request.length:
                continue
            self._prefilling.remove(request)
            if not request.preempted:
                request.first_token = now
                first.append(request)
            self._context += request.length
            if request.left <= 1:
                self._stop(request, 0)
                ended.append(request)
                continue
            self._number += 1
            last = self._steps + request.left - 1
            heapq.heappush(self._decoding, (last, self._number, request))
        for request in ended:
            request.ended = now
        self._step(now)
        return first, ended

    def _stop(self, request: Request, decoded: int) -> None:
        """A request decodes no more: its blocks are free, with numbers by which they are found."""
        self._context -= request.length + decoded
        self._produced -= decoded
        self.cache.unnamed(self._unnamed)
        filled = (request.length + decoded) // BLOCK
        new = request.blocks[request.taken : filled]
        if self.cache.free >= len(new):
            self.cache.take(new)
            request.taken = filled
        self.cache.release(request.blocks[: request.taken])

    @property
    def _unnamed(self) -> int:
        """Blocks with what was decoded, and each request's last one, which is not full."""
        return self.running + (self._produced + self._ahead) // BLOCK

    def _step(self, now: float) -> None:
        while self._decoding and not self._decodes(1):
            self._preempt()
        budget = self.speed.batch_tokens - len(self._decoding)
        self._chunks = []
        for request in self._prefilling:
            budget -= self._chunk(request, budget)
        while self.waiting and budget > 0 and self.running < self.speed.most_seqs:
            request = self.waiting[0]
            prompt = request.blocks[: request.length // BLOCK]
            found = self.cache.found(prompt)
            if not self.cache.fits(prompt, found, 1 + self._promised()):
                break
            self.waiting.popleft()
            # The last token is computed in any case: its logits are needed.
            request.done = min(found * BLOCK, request.length - 1)
            request.taken = found
            if not request.preempted:
                request.cached_tokens = request.done
            self.cache.take(prompt[:found])
            self._prefilling.append(request)
            self.cache.unnamed(self._unnamed)
            budget -= self._chunk(request, budget)
        prefill = sum(tokens for _, tokens in self._chunks)
        decodes = len(self._decoding)
        steps = 1
        if decodes and not prefill:
            steps = min(_BULK, max(1, self._decoding[0][0] - self._steps))
            while steps > 1 and not self._decodes(steps):
                steps //= 2
            self._decodes(steps)
        elif not prefill:
            self._bulk, self.ends = (0, 0.0), math.inf
            return
        each = self.speed.step(prefill, decodes, self._context)
        self._began, self._bulk, self.ends = now, (steps, each), now + steps * each

    def _promised(self) -> int:
        """Blocks that prompts which are being read will still take."""
        return sum(it.length // BLOCK - it.taken for it in self._prefilling)

    def _decodes(self, steps: int) -> bool:
        """Take the blocks for so many decode steps, if there are as many."""
        self._ahead = steps * len(self._decoding)
        more = self._unnamed - self.cache.decoded
        if more > self.cache.free - self._promised():
            self._ahead = 0
            return False
        self.cache.unnamed(self._unnamed)
        return True

    def _preempt(self) -> None:
        """The request that came last gives its blocks, and waits as the next one."""
        at = max(range(len(self._decoding)), key=lambda n: self._decoding[n][1])
        last, _, request = self._decoding.pop(at)
        heapq.heapify(self._decoding)
        decoded = request.left - 1 - (last - self._steps)
        self._stop(request, decoded)
        request.generated += decoded + 1
        request.preempted += 1
        request.done = request.taken = 0
        self.waiting.appendleft(request)

    def _chunk(self, request: Request, budget: int) -> int:
        """Put the next part of a prompt into the step; how many tokens."""
        tokens = min(budget, request.length - request.done)
        if tokens <= 0:
            return 0
        # Blocks count as cached when they are given out, as in vLLM's allocate_slots.
        new = request.blocks[request.taken : (request.done + tokens) // BLOCK]
        request.taken += len(new)
        self.cache.take(new)
        self._chunks.append((request, tokens))
        return tokens

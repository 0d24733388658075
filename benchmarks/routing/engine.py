"""An engine in simulated time: chunked prefill, decode in the same steps, and vLLM's prefix cache.

What it leaves out: preemption (a request is admitted when all of its prompt and answer fit), the
part of a prefill's attention that grows with the square of its length, tokenization and HTTP,
CUDA graphs' sizes, speculative decoding.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
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
"""Llama 3.1 8B, bf16, on one H100 80GB, fitted to bare vLLM 0.29 in ``benchmarks/results/h100.json``
(a test holds it against that file). There a token takes 6.05 ms with one client: 4.9 ms is the
reading of 15 GiB at 3.35 TB/s. With 256 clients, 35 steps of 187 decodes and 26,100 prompt tokens
make a second: 42,000 tokens/s is what the arithmetic then must do. 48.5 ns are 128 KiB of KV cache
at 2.7 TB/s. The last three numbers are ``serve-app plan meta-llama/Llama-3.1-8B-Instruct --gpu
H100``'s."""


class Cache:
    """Blocks by their number, in use or free to be evicted: the least recently used one first.

    As vLLM's: a block is found by the hash of all tokens up to its end; a request's blocks are freed
    from its last one on, so that of one prompt the tail goes first.
    """

    def __init__(self, blocks: int) -> None:
        self.size = blocks
        self._used: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()
        self._blank = blocks
        self.promised = 0
        """Blocks that running requests will still take."""

    @property
    def used(self) -> int:
        return len(self._used)

    def found(self, blocks: Sequence[int]) -> int:
        """How many of the first of these are there."""
        for number, block in enumerate(blocks):
            if block not in self._used and block not in self._free:
                return number
        return len(blocks)

    def room(self, blocks: Sequence[int], found: int, more: int) -> bool:
        """Whether all of these fit, ``found`` of which are there, and ``more``, unpromised."""
        idle = sum(block in self._free for block in blocks[:found])
        free = self._blank + len(self._free) - idle
        return free - self.promised >= len(blocks) - found + more

    def take(self, blocks: Sequence[int]) -> None:
        """Use these; what is not there takes a blank block, or the one evicted first."""
        used, free = self._used, self._free
        for block in blocks:
            if block in used:
                used[block] += 1
                continue
            if block in free:
                del free[block]
            elif self._blank:
                self._blank -= 1
            else:
                free.popitem(last=False)
            used[block] = 1

    def release(self, blocks: Sequence[int]) -> None:
        """Use these no more; they stay until they are evicted."""
        used, free = self._used, self._free
        for block in reversed(blocks):
            if used[block] > 1:
                used[block] -= 1
            else:
                del used[block]
                free[block] = None


@dataclass(eq=False, slots=True)
class Request:
    """A request in an engine."""

    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int]
    """Of prompt and answer, the full ones."""

    cached_tokens: int = 0
    done_tokens: int = 0
    """Of the prompt."""

    taken: int = 0
    """Blocks of the prompt that it has."""

    first_token: float = math.nan
    ended: float = math.nan
    owner: Any = None
    """What its sender wants to remember."""


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
        """By the decode step with which it ends."""

        self._steps = 0
        self._number = 0
        self._context = 0
        self._produced = 0
        """Tokens decoded by those that run: they have blocks, which are only promised here."""

        self._began = 0.0
        self._bulk = (0, 0.0)
        """Decode steps until :attr:`ends`, and the time of each."""

        self.ends = math.inf

    @property
    def running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    @property
    def kv_cache_usage(self) -> float:
        return (self.cache.used + self._produced // BLOCK) / self.cache.size

    def add(self, request: Request, now: float) -> None:
        """Take a request. It gets into a step when the current one has ended."""
        self.waiting.append(request)
        if self.ends == math.inf:
            self._step(now)
        elif self._bulk[0] > 1 and self._decoding:
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
        while self._decoding and self._decoding[0][0] <= self._steps:
            request = heapq.heappop(self._decoding)[2]
            self._context -= request.prompt_tokens + request.output_tokens - 1
            self._produced -= request.output_tokens - 1
            self._end(request, now)
            ended.append(request)
        for request, tokens in self._chunks:
            request.done_tokens += tokens
            if request.done_tokens < request.prompt_tokens:
                continue
            self._prefilling.remove(request)
            request.first_token = now
            first.append(request)
            if request.output_tokens <= 1:
                self._end(request, now)
                ended.append(request)
                continue
            self._context += request.prompt_tokens
            self._number += 1
            last = self._steps + request.output_tokens - 1
            heapq.heappush(self._decoding, (last, self._number, request))
        self._step(now)
        return first, ended

    def _end(self, request: Request, now: float) -> None:
        request.ended = now
        answer = request.blocks[request.prompt_tokens // BLOCK :]
        self.cache.promised -= _partly(request) + len(answer)
        self.cache.take(answer)
        self.cache.release(request.blocks)

    def _step(self, now: float) -> None:
        budget = self.speed.batch_tokens - len(self._decoding)
        self._chunks = []
        for request in self._prefilling:
            budget -= self._chunk(request, budget)
        while self.waiting and budget > 0 and self.running < self.speed.most_seqs:
            request = self.waiting[0]
            prompt = request.blocks[: request.prompt_tokens // BLOCK]
            found = self.cache.found(prompt)
            answer = len(request.blocks) - len(prompt) + _partly(request)
            if not self.cache.room(prompt, found, answer):
                break
            self.waiting.popleft()
            # The last token is computed in any case: its logits are needed.
            request.cached_tokens = min(found * BLOCK, request.prompt_tokens - 1)
            request.done_tokens = request.cached_tokens
            request.taken = found
            self.cache.take(prompt[:found])
            self.cache.promised += len(prompt) - found + answer
            self._prefilling.append(request)
            budget -= self._chunk(request, budget)
        prefill = sum(tokens for _, tokens in self._chunks)
        self._began = now
        if prefill:
            self._bulk = (1, self.speed.step(prefill, len(self._decoding), self._context))
        elif self._decoding:
            steps = min(_BULK, max(1, self._decoding[0][0] - self._steps))
            each = self.speed.step(0, len(self._decoding), self._context)
            self._bulk = (steps, each)
        else:
            self._bulk = (0, 0.0)
            self.ends = math.inf
            return
        self.ends = now + self._bulk[0] * self._bulk[1]

    def _chunk(self, request: Request, budget: int) -> int:
        """Put the next part of a prompt into the step; how many tokens."""
        tokens = min(budget, request.prompt_tokens - request.done_tokens)
        if tokens <= 0:
            return 0
        # Blocks count as cached when they are given out, as in vLLM's allocate_slots.
        new = request.blocks[request.taken : (request.done_tokens + tokens) // BLOCK]
        request.taken += len(new)
        self.cache.take(new)
        self.cache.promised -= len(new)
        self._chunks.append((request, tokens))
        return tokens


def _partly(request: Request) -> int:
    """The block that is not full at a request's end."""
    return int((request.prompt_tokens + request.output_tokens) % BLOCK > 0)

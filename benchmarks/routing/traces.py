"""Traces: sessions of requests whose prompts begin alike, or do not; made from a seed.

A prompt is a list of pieces, each a stretch of tokens from a *stream*: a stream is a text that goes
on for ever, and two prompts that begin with the same pieces begin with the same tokens. So a
prompt's blocks, of whatever size, can be told without making its tokens (:func:`blocks`), and its
text can be made where there is a server to send it to (:func:`text`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain

BYTES_PER_TOKEN = 4
"""Of English text and Llama's vocabulary, about; ``text`` makes words of this length."""

_CEILING = 1 << 24
"""Tokens of a stream, at most."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session."""

    pieces: tuple[tuple[int, int], ...]
    """Of its prompt: stream, and the token of the prompt at which this stream's piece ends."""

    prompt_tokens: int
    output_tokens: int
    pause_s: float = 0.0
    """From the end of the session's last turn to this one."""


@dataclass(frozen=True, slots=True)
class Session:
    """Requests of one user, each sent when the one before has been answered."""

    at: float
    """Seconds after the trace's begin."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Trace:
    """A recorded shape of load."""

    name: str
    about: str
    sessions: Callable[[random.Random], Iterator[tuple[Turn, ...]]]
    """Makes sessions for ever."""

    turns: float
    """Turns of a session, on average."""

    wins: bool
    """Whether a cache-aware policy has something to win here."""

    warm_s: float = 120.0
    """Seconds until as many sessions end as begin, about."""

    def at(self, rate: float, seconds: float, seed: int) -> list[Session]:
        """Poisson arrivals of sessions that make ``rate`` requests/s, for so many seconds."""
        rng = random.Random(f"{self.name} {seed}")
        made, now, found = self.sessions(rng), 0.0, []
        while (now := now + rng.expovariate(rate / self.turns)) < seconds:
            found.append(Session(now, next(made)))
        return found


def blocks(pieces: tuple[tuple[int, int], ...], tokens: int, size: int) -> list[int]:
    """The full blocks of ``size`` tokens, as numbers: equal where all tokens up to them are.

    ``tokens`` may be more than the prompt has: the last stream goes on, with the answer.
    """
    found: list[int] = []
    for stream, end in (*pieces[:-1], (pieces[-1][0], tokens)):
        # A block with tokens of two streams is the second one's.
        found.extend(range(stream * _CEILING + len(found), stream * _CEILING + end // size))
    return found


@cache
def _words(stream: int) -> list[str]:
    rng = random.Random(stream)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(rng.choices(letters, k=BYTES_PER_TOKEN - 1)) + " " for _ in range(256)]


def text(turn: Turn) -> str:
    """The prompt's text: a word of four bytes for each token, the same for equal pieces."""
    parts, begin = [], 0
    for stream, end in turn.pieces:
        words, rng = _words(stream), random.Random(stream)
        parts.extend(rng.choices(words, k=end)[begin:])
        begin = end
    return "".join(parts)


def _lognormal(rng: random.Random, mean: float, sigma: float, most: int) -> int:
    """At least 4; ``mean`` is that before the cut at ``most``."""
    drawn = rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)
    return max(4, min(most, round(drawn)))


class _Streams:
    """Numbers of streams, each used once."""

    def __init__(self) -> None:
        self._last = 0

    def new(self) -> int:
        self._last += 1
        return self._last


GROUPS, SHARED, OWN, OUT = 150, 6000, 1200, 1000


def _b2b_saas(
    rng: random.Random, customers: int = GROUPS, out: int = OUT, shared: int = SHARED,
    own: int = OWN,
) -> Iterator[tuple[Turn, ...]]:  # fmt: skip
    """150 customers, each with a prompt of 6,000 tokens of its own before 1,200 of a question.

    The shape is inference-perf's ``shared_prefix`` as llm-d's guide "optimized baseline" runs it:
    150 groups × 5 prompts, 1,000 tokens out, Poisson 3 → 60 requests/s on 8 replicas. There the
    750 prompts come again and again; here a question never does, so that only the shared part can
    be found again.
    """
    streams = _Streams()
    groups = [streams.new() for _ in range(customers)]
    while True:
        order = [group for group in groups for _ in range(5)]
        rng.shuffle(order)
        for group in order:
            pieces = (group, shared), (streams.new(), shared + own)
            yield (Turn(pieces, shared + own, out),)


def _conversation(
    rng: random.Random, pieces: tuple[tuple[int, int], ...], own: int, turns: int,
    said: Callable[[], int], answered: Callable[[], int], pause_s: float, most: int,
) -> tuple[Turn, ...]:  # fmt: skip
    """A conversation: each prompt is the last one, its answer and what the user says then."""
    found: list[Turn] = []
    length = pieces[-1][1] if pieces else 0
    for number in range(turns):
        length += said()
        answer = answered()
        if length + answer > most and found:
            break
        pause = rng.expovariate(1 / pause_s) if number and pause_s else 0.0
        found.append(Turn((*pieces, (own, length)), length, answer, pause))
        length += answer
    return tuple(found)


def _multi_turn(rng: random.Random) -> Iterator[tuple[Turn, ...]]:
    """Chats that go on: KubeAI's benchmark takes ShareGPT's threads of several turns.

    Lengths are lognormal about the means of ShareGPT as vLLM's benchmark filters it (some 220
    tokens in each question and 200 in each answer); turns are geometric, 6 on average; all share a
    system prompt of 100 tokens. As there, the next question comes as soon as the answer is there.
    """
    streams = _Streams()
    system = streams.new()
    while True:
        turns = min(40, 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / 6)))
        yield _conversation(
            rng, ((system, 100),), streams.new(), turns,
            lambda: _lognormal(rng, 220, 1.0, 4000), lambda: _lognormal(rng, 200, 0.8, 2000),
            0.0, 16_000,
        )  # fmt: skip


def _code_agent(rng: random.Random) -> Iterator[tuple[Turn, ...]]:
    """A coding agent: 131 tokens go in for each that comes out.

    The ratio is that of llm-d's "code-gen" load (its blog of 2026-08-17). All agents have the same
    8,000 tokens of instructions and tools, each begins with 6,000 of its repository; each of 20
    steps adds a call of 250 tokens and a result of 1,750, after 3 s of the tool's time.
    """
    streams = _Streams()
    tools = streams.new()
    while True:
        said = chain([6000], (_lognormal(rng, 1750, 0.8, 12_000) for _ in range(19)))
        yield _conversation(
            rng, ((tools, 8000),), streams.new(), 20, partial(next, said),
            lambda: _lognormal(rng, 250, 0.6, 2000), 3.0, 100_000,
        )  # fmt: skip


def _low_sharing(rng: random.Random) -> Iterator[tuple[Turn, ...]]:
    """All prompts share 2,548 of their 9,800 tokens: 26 %, as in sglang#21199.

    There the sglang router's cache_aware had a TTFT of 1,617 ms, round robin one of 627 ms.
    """
    streams = _Streams()
    shared = streams.new()
    while True:
        yield (Turn(((shared, 2548), (streams.new(), 9800)), 9800, 430),)


def _reasoning(rng: random.Random) -> Iterator[tuple[Turn, ...]]:
    """Short questions, long thoughts, nothing shared: llm-d's "reasoning" load in kind."""
    streams = _Streams()
    while True:
        prompt = _lognormal(rng, 300, 0.7, 4000)
        yield (Turn(((streams.new(), prompt),), prompt, _lognormal(rng, 2500, 0.7, 12_000)),)


def _different(rng: random.Random) -> Iterator[tuple[Turn, ...]]:
    """Long prompts of which no two begin alike: summaries."""
    streams = _Streams()
    while True:
        prompt = _lognormal(rng, 2000, 0.8, 16_000)
        yield (Turn(((streams.new(), prompt),), prompt, _lognormal(rng, 200, 0.6, 2000)),)


TRACES = {
    trace.name: trace
    for trace in (
        Trace("b2b-saas", "150 × 6,000 shared + 1,200 own, 1,000 out", _b2b_saas, 1, True, 240),
        Trace("multi-turn", "chats of 6 turns, 220 in and 200 out each", _multi_turn, 5.9, True),
        Trace("code-agent", "20 steps of an agent, 131 in to 1 out", _code_agent, 20, True, 240),
        Trace("26 % shared", "2,548 of 9,800 shared, 430 out", _low_sharing, 1, False),
        Trace("reasoning", "300 in, 2,500 out, nothing shared", _reasoning, 1, False, 180),
        Trace("all different", "2,000 in, 200 out, nothing shared", _different, 1, False),
    )
}

QUARTER = Trace(
    "b2b-saas, a quarter", "38 × 6,000 shared + 1,200 own, 250 out",
    partial(_b2b_saas, customers=GROUPS // 4 + 1, out=OUT // 4), 1, True,
)  # fmt: skip
"""For runs in real time: answers are shorter, and there are fewer customers for smaller caches."""

SMALL = Trace(
    "b2b-saas, small", "24 × 600 shared + 60 own, 16 out",
    partial(_b2b_saas, customers=24, out=16, shared=600, own=60), 1, True,
)  # fmt: skip
"""For engines on a CPU."""

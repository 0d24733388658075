"""Chooses a replica for a call: one that has the beginning of its prompt, until that is saturated.

docs/routing.md tells why it is so, and of each constant.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType
from typing import Literal, NamedTuple

from serve_app.cluster.exchange import Usage
from serve_app.config.settings import RoutingConfig
from serve_app.gateway.replicas import KV_CACHE_FULL, FrontEnd, Replica
from serve_app.gateway.routing.index import Block, Index
from serve_app.gateway.routing.prefix import BLOCK, MOST, Prompt
from serve_app.gateway.routing.work import Backlog, Mean, Rate
from serve_app.gateway.standing import OUT

Reason = Literal["warm", "overflow", "cold", "session", "short"]
"""Why a replica was chosen. ``warm``: it has the beginning of the prompt. ``overflow``: others have
it, and too much to do, or can be sent nothing now. ``cold``: none has it; this one has the least to
do. ``session``: the client named its session. ``short``: the prompt has no whole block; the replica
has the least to do."""

WARM = 0.8
"""Part of what the best replica has cached from which on another is as good."""

PATIENCE = 4.0
"""How many times the prefill that a cache saves a call may wait for it: it also saves the time of
others. ``max_wait_for_cache_s`` bounds it."""

BOUND = 3.0
"""Times the mean number of requests that a replica may have and still get more for its cache, while
it has what it needs: a request more costs a step of many little, and a prompt that is computed
again much."""

SCARCE_BOUND = 1.5
"""The same where its KV cache is full or requests wait in it, for a conversation that is alone with
its beginning; and for the requests of one beginning alone, beside the mean and beside all that
another replica has. What everybody sends is computed once on each replica, which is nothing."""

SHARED_BOUND = 2.0
"""The same where it lacks room, for a beginning that several conversations have: what they need
beside it is little, and elsewhere it would be one more copy for all of them."""

SESSION_BOUND = 1.25
"""The same for a client's session: as in Mirrokni et al., "Consistent Hashing with Bounded Loads",
2016."""

HOME_BOUND = 2.0
"""Times the work of the one with the least that a prompt's home may have, of those that have the
prompt. What is asked for at several is kept at several, and pushes out others."""

NEXT_BOUND = 1.25
"""Times the work of the one with the least that the replica may have where calls overflow to."""

SOONER = 2.0
"""How many times sooner another replica must answer at least: where all have much to do, some have
a little less, and a prompt that moves there for that pushes out another's."""

REMEMBERED = 4.0
"""How many times its KV cache a replica's part of the index is. A replica is still the best place
for what it has just forgotten: elsewhere that would push out what others come back to."""

SLACK = 4
"""Requests beyond the mean that it may have in any case."""

UNKNOWN_TOKENS = 2**16
"""Size of a KV cache that its replica has not told yet."""

_BYTES_PER_TOKEN = 4.0
_COMPLETION_TOKENS = 256.0
"""Before the accounting has told."""

_LEAST_TRUST = 0.1
"""So that what is not believed at all can be tried again."""

_ENDS = 64
"""Calls whose ends tell how soon a replica without room has a place."""


class Option(NamedTuple):
    """A replica that a call could go to."""

    replica: Replica
    blocks: int
    """Of the prompt, those that the index has of it."""

    cached: float
    """Tokens of that, by what such beliefs were worth at this replica."""

    weight: float
    """Of the replica, above 0 and at most 1."""

    requests: float
    """What it has, of all gateways, by its weight."""

    ahead: float
    """Uncached tokens that it has to read first."""

    rate: float
    """Tokens of prompts that it reads in a second."""

    ttft_s: float
    """Seconds until it has read those and the prompt's own."""

    work: float
    """Tokens that it has to read and to generate, by its weight."""

    alike: int
    """Requests of this gateway there that have as much of this prompt in common."""

    shared: bool
    """Whether most of the prompt is there, and is where other prompts began, too."""

    full: bool
    """Whether it has no place for the call now."""


@dataclass(slots=True)
class Sent:
    """A call that was given to a replica."""

    prompt: Prompt
    replica: str
    blocks: int
    cached: float
    """As in :class:`Option`."""

    beginning: Block | None
    """The last block of the prompt that was known there."""


class _Seen:
    """What is known of one replica."""

    def __init__(self, drops: int, rate: Rate) -> None:
        self.drops = drops
        """How often it had dropped its cache, when the index was last cleared of it."""

        self.backlog = Backlog(rate)
        self.trust = Mean(1.0, 4000.0)
        """What part of the tokens that were believed to be cached were so."""

        self.alike: Counter[Block] = Counter()
        """Of the requests that are there: how many had all up to this block in common with what was
        known there, and no more."""

        self.ends: deque[float] = deque(maxlen=_ENDS)
        """When its latest calls ended."""

    @property
    def trusted(self) -> float:
        return max(_LEAST_TRUST, self.trust.value)


class CacheAware:
    """One model's choice. It holds no asyncio, and takes its time from ``now``."""

    def __init__(
        self,
        config: RoutingConfig | None = None,
        now: Callable[[], float] = time.monotonic,
        *,
        warm: float = WARM,
        patience: float = PATIENCE,
        bound: float = BOUND,
        slack: float = SLACK,
        sooner: float = SOONER,
        remembered: float = REMEMBERED,
    ) -> None:
        self.config = config or RoutingConfig()
        self._now = now
        self._warm, self._patience = warm, patience
        self._bound, self._slack, self._sooner = bound, slack, sooner
        self._remembered = remembered
        self.index = Index()
        self._rate = Rate()
        self._bytes_per_token = Mean(_BYTES_PER_TOKEN, 1000.0)
        self._completion = Mean(_COMPLETION_TOKENS, 4.0)
        self._seen: dict[str, _Seen] = {}
        self._sent: dict[str, Sent] = {}
        """By call that is not accounted for yet: where it was sent last."""

        self.reason: Reason = "short"
        """Why the last choice was made."""

    # --- a call's way --------------------------------------------------------------------------

    def choose(self, id: str, prompt: Prompt, live: Sequence[FrontEnd]) -> FrontEnd:
        """The front end of ``live``, which is not empty, that gets a call. It counts as sent there.

        Args:
            id: the call's; each further attempt has the same.
        """
        now = self._now()
        options, known = self._options(prompt, dict.fromkeys(it.replica for it in live), now)
        option, self.reason = self._pick(prompt, options, known, now)
        self._send(id, prompt, option, now)
        return least_busy([it for it in live if it.replica is option.replica])

    def waits_for(
        self, prompt: Prompt, live: Sequence[FrontEnd], full: Mapping[Replica, int]
    ) -> tuple[Replica, float] | None:
        """A replica without room that is worth waiting for, and for how many seconds at most.

        A place there is one more thing that the call would wait for, beside the prompts that are
        read before its own.

        Args:
            full: by replica without room: how many calls must end there before this one has a
                place; 0 where no replica has ample room, so that all wait.
        """
        if not self.config.max_wait_for_cache_s or not (prompt.blocks or prompt.session):
            return None
        now = self._now()
        waits = {it: self._seconds_for(calls, it, now) for it, calls in full.items()}
        replicas = dict.fromkeys(it.replica for it in live) | waits
        options, known = self._options(prompt, replicas, now, waits)
        option, reason = self._pick(prompt, options, known, now)
        if option.replica in full and reason in ("warm", "session"):
            return option.replica, self.config.max_wait_for_cache_s
        return None

    def first_byte(self, id: str) -> None:
        """The first byte of the answer has come."""
        if seen := self._where(id):
            seen.backlog.first_byte(id, self._now())

    def ended(self, id: str) -> None:
        """The call has ended at the replica that it was sent to, well or not."""
        if seen := self._where(id):
            seen.backlog.read(id)
            seen.ends.append(self._now())
            sent = self._sent[id]
            if sent.beginning is not None:
                seen.alike[sent.beginning] -= 1
                if seen.alike[sent.beginning] <= 0:  # below: it was away, and is known anew
                    del seen.alike[sent.beginning]
                sent.beginning = None

    def used(self, id: str, usage: Usage | None) -> Sent | None:
        """What the call took in all; None where that is not known. Nothing comes after it.

        Returns what was believed of it.
        """
        seen, sent = self._where(id), self._sent.pop(id, None)
        known = usage if usage and usage.prompt_tokens else None
        if seen:
            seen.backlog.used(id, known.prompt_tokens - known.cached_tokens if known else None)
        if sent is None or known is None:
            return None
        if sent.prompt.size:
            # No tokenizer makes more than one of a byte; what counts them more often may not tell.
            tokens = min(known.prompt_tokens / sent.prompt.answers, sent.prompt.size)
            self._bytes_per_token.add(sent.prompt.size, tokens)
        self._completion.add(known.completion_tokens, 1)
        if seen and sent.blocks:
            believed = _part(sent.blocks, sent.prompt) * known.prompt_tokens
            seen.trust.add(min(known.cached_tokens, believed), believed)
        return sent

    def keep(self, replicas: set[str]) -> None:
        """Forget all replicas but these."""
        for id in self._seen.keys() - replicas:
            self.index.clear(id)
            del self._seen[id]

    @property
    def replicas(self) -> int:
        """How many replicas it remembers something of."""
        return len(self._seen)

    # --- the choice ----------------------------------------------------------------------------

    def _pick(
        self, prompt: Prompt, options: list[Option], known: int, now: float
    ) -> tuple[Option, Reason]:
        # One with faults has the fewest requests, since its errors come at once.
        options = [it for it in options if it.weight > OUT] or options
        if prompt.session is not None:
            return self._of_session(prompt.session, options), "session"
        if not prompt.blocks:
            return _least(options), "short"
        if not known:
            return _least(options), "cold"
        fitting = self._fitting(options, now)
        most = max(it.blocks for it in options)
        enough = self._warm * max(it.cached for it in options)
        warm = [it for it in fitting if it.cached >= enough]
        cold = [it for it in fitting if it.cached < enough]
        if most < self._warm * known:  # who has it can be sent nothing now
            return self._next_home(prompt, known, warm or cold, now), "overflow"
        if not warm:
            return self._next_home(prompt, most, cold, now), "overflow"
        # A place at one that has it is had now: what all have in common is waited for nowhere.
        first = self._home(prompt, [it for it in warm if not it.full] or warm, len(options))
        better = [
            it for it in cold if self._is_worth(it, first, now) or self._is_idle(it, first, now)
        ]
        if better:
            return self._next_home(prompt, first.blocks, better, now), "overflow"
        return first, "warm"

    def _home(self, prompt: Prompt, warm: list[Option], replicas: int) -> Option:
        """Of those that have most of it: the one where it stays, until that has much more to do.

        Where more than half of the replicas have it, as what all prompts begin with, or what they
        have is the smaller part of the prompt, that is worth less than that all have as much to do.
        """
        least = _least(warm)
        most = max(it.blocks for it in warm)
        if len(warm) > (replicas + 1) // 2 or 2 * most < len(prompt.blocks):
            return least
        homes = [it for it in warm if it.blocks == most]
        home = min(homes, key=_order(prompt.blocks[most - 1]))
        return home if home.work <= HOME_BOUND * least.work else least

    def _is_worth(self, cold: Option, warm: Option, now: float) -> bool:
        """Whether a call would be answered so much sooner there that its prompt may be computed
        again: where there is no room, it would push out another one, which then moves too."""
        patience_s = self.config.max_wait_for_cache_s
        if not _is_scarce(cold.replica, now):
            saved_s = (warm.cached - cold.cached) / warm.rate
            patience_s = min(patience_s, self._patience * saved_s)
        return warm.ttft_s - cold.ttft_s > patience_s and warm.ttft_s > self._sooner * cold.ttft_s

    def _is_idle(self, cold: Option, warm: Option, now: float) -> bool:
        """Whether it has few requests of all kinds beside those of one beginning alone at another.

        Without this a replica that comes gets nothing of what everybody sends until the others lack
        room: they have little more than the mean.
        """
        much = SCARCE_BOUND * cold.requests + self._slack
        return warm.alike > much and not _is_scarce(cold.replica, now)

    def _next_home(self, prompt: Prompt, blocks: int, cold: list[Option], now: float) -> Option:
        """Where calls go that share a beginning, of so many blocks, and overflow: all to the same.

        Else each makes a copy at another replica, and the copies push each other out.
        """
        cold = [it for it in cold if not _is_scarce(it.replica, now)] or cold
        most = NEXT_BOUND * min(it.work for it in cold)
        fitting = [it for it in cold if it.work <= most]
        return min(fitting, key=_order(prompt.blocks[blocks - 1]))

    def _fitting(self, options: list[Option], now: float) -> list[Option]:
        """Those that do not have many more requests than the others. There is always one."""
        mean = _mean(options)
        bounds = (self._bound, SCARCE_BOUND, SHARED_BOUND)
        most, scarce, shared = (max(bound * mean, mean + self._slack) for bound in bounds)
        return [
            it
            for it in options
            if it.alike + 1 <= scarce
            and it.requests + 1
            <= (most if not _is_scarce(it.replica, now) else shared if it.shared else scarce)
        ] or options

    def _of_session(self, name: str, options: list[Option]) -> Option:
        """The first with room, in an order that all gateways have for this session."""
        ordered = sorted(options, key=_order(name.encode()))
        most = math.ceil(SESSION_BOUND * _mean(options))
        return next((it for it in ordered if it.requests + 1 <= most), ordered[0])

    def _options(
        self,
        prompt: Prompt,
        replicas: Collection[Replica],
        now: float,
        waits: Mapping[Replica, float] = MappingProxyType({}),
    ) -> tuple[list[Option], int]:
        """What is to be expected of each replica. It runs for each of them at each call.

        Args:
            waits: by replica without room, seconds until it has a place.

        Returns:
            The options, and how many blocks of the prompt the one has that has most of it, which
            may be none of them.
        """
        tokens = prompt.size / self._bytes_per_token.value
        completion = self._completion.value
        inflight = reading = 0.0
        known = []
        for replica in replicas:
            seen = self._look_at(replica)
            seen.backlog.expire(now)
            inflight += replica.inflight
            reading += seen.backlog.tokens
            known.append((replica, seen))
        found = self.index.match(prompt.blocks)
        # What other gateways have sent is as far as what this one has.
        each = reading / inflight if inflight else 0.0
        options = []
        for replica, seen in known:
            others = replica.others if now < replica.load_until else 0
            weight, rate = replica.weight(now), seen.backlog.rate
            requests = replica.inflight + others
            blocks = found.get(replica.id, 0)
            cached = _part(blocks, prompt) * tokens * seen.trusted if blocks else 0.0
            ahead = seen.backlog.tokens + others * each
            ttft_s = (ahead + tokens - cached) / (rate * weight)
            if waits:
                ttft_s += waits.get(replica, 0.0)
            work = (ahead + (requests + 1) * completion) / weight
            alike, shared = 0, False
            if blocks:
                beginning = prompt.blocks[blocks - 1]
                alike = seen.alike[beginning]
                most = 2 * blocks >= len(prompt.blocks)
                shared = most and self.index.went_on(replica.id, beginning) > 0
            options.append(
                Option(
                    replica,
                    blocks,
                    cached,
                    weight,
                    requests / weight,
                    ahead,
                    rate,
                    ttft_s,
                    work,
                    alike,
                    shared,
                    replica in waits,
                )
            )
        return options, max(found.values(), default=0)

    def _send(self, id: str, prompt: Prompt, option: Option, now: float) -> None:
        replica = option.replica
        if before := self._where(id):
            before.backlog.used(id, None)  # that attempt has failed
        seen = self._seen[replica.id]
        beginning = prompt.blocks[option.blocks - 1] if option.blocks else None
        self._sent[id] = Sent(prompt, replica.id, option.blocks, option.cached, beginning)
        if beginning is not None:
            seen.alike[beginning] += 1
        uncached = prompt.size / self._bytes_per_token.value - option.cached
        # What waits in an engine waits for a place or KV blocks: that tells nothing of its rate.
        waits = replica.load is not None and now < replica.load_until and replica.load.waiting > 0
        seen.backlog.began(
            id, uncached, option.ahead, now, streams=prompt.streams, measures=not waits
        )
        if prompt.blocks:
            self.heard(replica, prompt.blocks)

    def heard(self, replica: Replica, blocks: Sequence[Block]) -> None:
        """A replica was sent a prompt with these blocks, by this gateway or by another one."""
        self._look_at(replica)
        told = replica.load.prefix_cache_tokens if replica.load else None
        tokens = UNKNOWN_TOKENS if told is None else told
        size = tokens * self._bytes_per_token.value * self._remembered
        self.index.add(replica.id, blocks, int(size / BLOCK))

    def _seconds_for(self, calls: int, replica: Replica, now: float) -> float:
        """How long it takes until so many calls have ended at a replica."""
        if not calls:
            return 0.0
        ends = self._look_at(replica).ends
        return calls * (now - ends[0]) / len(ends) if len(ends) > 1 else math.inf

    def _look_at(self, replica: Replica) -> _Seen:
        """What is known of it; nothing of its cache, if it has dropped that."""
        drops = replica.load.cache_drops if replica.load else 0
        seen = self._seen.get(replica.id)
        if seen is None:
            seen = self._seen[replica.id] = _Seen(drops, self._rate)
        elif seen.drops != drops:
            seen.drops = drops
            self.index.clear(replica.id)
        return seen

    def _where(self, id: str) -> _Seen | None:
        sent = self._sent.get(id)
        return self._seen.get(sent.replica) if sent else None


def least_busy(front_ends: Sequence[FrontEnd]) -> FrontEnd:
    """The front end of one replica that has the fewest requests."""
    fewest = min(it.inflight for it in front_ends)
    return random.choice([it for it in front_ends if it.inflight == fewest])


def _least(options: list[Option]) -> Option:
    """The one with the least to do. Ties are broken at random, so that gateways differ."""
    least = min(it.work for it in options)
    return random.choice([it for it in options if it.work == least])


def _mean(options: list[Option]) -> float:
    """Requests of each, with one more, if all had as many by their weights."""
    return (sum(it.requests * it.weight for it in options) + 1) / sum(it.weight for it in options)


def _order(key: bytes) -> Callable[[Option], bytes]:
    """Sorts options in an order that all gateways have for this key.

    Rendezvous hashing (Thaler and Ravishankar, 1998): a replica that comes or goes moves only the
    keys that are or were its own.
    """
    start = blake2b(key, digest_size=16).digest()
    return lambda it: blake2b(it.replica.id.encode(), key=start).digest()


def _part(blocks: int, prompt: Prompt) -> float:
    """The part of a prompt that its first blocks are."""
    if blocks == len(prompt.blocks) == MOST // BLOCK:
        return 1.0
    return min(1.0, blocks * BLOCK / prompt.size)


def _is_scarce(replica: Replica, now: float) -> bool:
    """Whether its engine lacks room for what it has."""
    load = replica.load
    if load is None or now >= replica.load_until:
        return False
    return load.waiting > 0 or load.kv_cache_usage >= KV_CACHE_FULL

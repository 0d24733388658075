"""The limits of API keys: what a request will take is reserved before, and settled after it.

The tokens that it will take are estimated: those of its prompt from the bytes of its text, by what
this model's requests had; those of its answer from the bound in its body, or from what this model's
answers had. The ledger then tells the true count.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from serve_app.cluster.exchange import Usage
from serve_app.config.keys import KeyLimits
from serve_app.gateway import body as request_body
from serve_app.gateway.body import Size
from serve_app.gateway.callers import Caller
from serve_app.gateway.errors import GatewayError
from serve_app.gateway.leases import AT_ONCE, LIMITS, REQUESTS, TODAY, TOKENS, Counts, Limit
from serve_app.gateway.ledger import Entry
from serve_app.gateway.stages import Call, Outcome

_NOTHING = Usage()

_OF_REQUESTS = (REQUESTS,)
_OF_TOKENS = (TOKENS, TODAY)
_KINDS = {
    limits: tuple(f"x-ratelimit-{what}-{kind}".encode() for what in ("limit", "remaining", "reset"))
    for kind, limits in (("requests", _OF_REQUESTS), ("tokens", _OF_TOKENS))
}
"""The limits of each kind, and the headers that tell of them."""

_GENERATES = (
    "/completions", "/responses", "/messages", "/generate", "/chat", "/batch", "/invocations",
    "/transcriptions", "/translations",
)  # fmt: skip
"""Ends of the paths that answer with generated tokens."""

EXPOSED = [
    "retry-after",
    "retry-after-ms",
    *(name.decode() for names in _KINDS.values() for name in names),
]
"""The headers that a web page may read."""

_AT_ONCE_RETRY_S = 1.0
"""Seconds after which to ask again for the place of a running request: nobody knows when."""


class _Bound(NamedTuple):
    """One limit that a request falls under."""

    scope: str
    limit: Limit
    most: int
    cached_weight: float
    of: str
    """`` of the model 'm'``, or empty where it is for all models."""


@dataclass(frozen=True)
class _Reserved:
    """What a request has taken."""

    size: Size | None
    """None where no token is limited."""

    taken: list[tuple[_Bound, int, float]]
    """Of each limit: the bucket and the amount."""


@dataclass
class _Typical:
    """What a model's requests have, the later ones counting more."""

    text: float = 4000.0
    prompt: float = 1000.0
    """Tokens that were made of ``text`` bytes."""

    completion: float = 256.0
    """Tokens of an answer."""

    def prompt_of(self, size: Size) -> float:
        return size.text * self.prompt / self.text

    def learn(self, size: Size, usage: Usage, *, whole: bool) -> None:
        """``whole``: the answer was not cut off."""
        if size.text and usage.prompt_tokens:
            self.text += size.text - _FADE * self.text
            self.prompt += usage.prompt_tokens - _FADE * self.prompt
        if whole:
            self.completion += _FADE * (usage.completion_tokens / size.answers - self.completion)


_FADE = 0.05
"""What each request takes from the weight of those before it."""


class Limits:
    """The stage that reserves, and the listener of the ledger that settles."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """``clock`` tells the seconds since the epoch."""
        self._clock = clock
        self.counts = Counts()
        self.hit: Callable[[Call, str], None] = lambda call, limit: None
        """Told of each call that is refused, and of the setting that refuses it."""

        self._reserved: dict[str, _Reserved] = {}
        self._typical: defaultdict[str, _Typical] = defaultdict(_Typical)

    async def admit(self, call: Call) -> Call:
        """Reserve what the call will take.

        Raises:
            GatewayError: 429 where a limit of its key has no room.
        """
        if call.caller is None or not (bounds := _bounds(call, call.caller)):
            return call
        of_tokens = any(bound.limit in _OF_TOKENS for bound in bounds)
        size = request_body.size(call.request.body) if of_tokens else None
        tokens = self._tokens(call, size) if size else (0.0, 0.0)
        now = self._clock()
        asked = []
        longest = 0.0
        for bound in bounds:
            amount = 1.0
            if bound.limit in _OF_TOKENS:
                least, likely = tokens
                amount = max(least, min(likely, bound.most))
            wait, left = self.counts.room(bound.scope, bound.limit, bound.most, amount, now)
            if wait > longest:
                longest, refusing = wait, (wait, bound, amount)
            asked.append((bound, amount, left))
        if longest:
            call.answer_headers.extend(self._headers([(b, left) for b, _, left in asked], now))
            self.hit(call, refusing[1].limit.setting)
            raise _refused(call, call.caller, *refusing)
        taken = [
            (bound, self.counts.take(bound.scope, bound.limit, amount, now), amount)
            for bound, amount, _ in asked
        ]
        self._reserved[call.id] = _Reserved(size, taken)
        after = [(bound, left - amount) for bound, amount, left in asked]
        call.answer_headers.extend(self._headers(after, now))
        return call

    def ended(self, call: Call, outcome: Outcome) -> None:
        """Give back its place among the running ones. The rest waits for the ledger."""
        if reserved := self._reserved.get(call.id):
            self._settle(reserved, (AT_ONCE,), _NOTHING)

    def entered(self, entry: Entry) -> None:
        """Put what was taken in the place of what was reserved."""
        reserved = self._reserved.pop(entry.id, None)
        if reserved is None:
            return
        if entry.usage is not None:
            self._settle(reserved, _OF_TOKENS, entry.usage)
            if reserved.size:
                whole = entry.end == "answered" and entry.status == 200
                self._typical[entry.model].learn(reserved.size, entry.usage, whole=whole)
        elif not entry.replica:
            self._settle(reserved, (*_OF_REQUESTS, *_OF_TOKENS), _NOTHING)

    def _settle(self, reserved: _Reserved, which: tuple[Limit, ...], usage: Usage) -> None:
        now = self._clock()
        for bound, bucket, amount in reserved.taken:
            if bound.limit in which:
                more = _counted(usage, bound.cached_weight) - amount
                self.counts.correct(bound.scope, bound.limit, bucket, more, now)

    def _tokens(self, call: Call, size: Size) -> tuple[float, float]:
        """What the call will take, as far as can be told: at least, and likely."""
        if not call.request.body:
            return 0.0, 0.0
        typical = self._typical[call.model.name]
        least = typical.prompt_of(size)
        if size.max_completion is not None:
            least += size.max_completion * size.answers
        elif call.request.path.endswith(_GENERATES):
            # What nobody has asked for makes no request too large.
            return least, least + typical.completion * size.answers
        return least, least

    def _headers(self, left: list[tuple[_Bound, float]], now: float) -> list[tuple[bytes, bytes]]:
        """OpenAI's headers. Of several limits of a kind they tell of the one with least left."""
        headers = []
        for limits, (most, remaining, reset) in _KINDS.items():
            least = float("inf")
            for one, more in left:
                if more < least and one.limit in limits:
                    least, bound = more, one
            if least == float("inf"):
                continue
            until = duration(self.counts.reset(bound.scope, bound.limit, now))
            headers += [
                (most, b"%d" % bound.most),
                (remaining, b"%d" % max(0, int(least))),
                (reset, until.encode()),
            ]
        return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``120ms``, ``1s``, ``6m0s``, ``23h59m59s``."""
    if seconds < 1:
        return f"{ceil(seconds * 1000)}ms"
    minutes, s = divmod(ceil(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{f'{hours}h' if hours else ''}{f'{m}m' if minutes else ''}{s}s"


def _bounds(call: Call, caller: Caller) -> list[_Bound]:
    found = _of(caller.limits, caller.name, "")
    if alone := caller.limits_for(call.model_id, call.model) if caller.model_limits else None:
        adapter = call.model_id in call.model.adapters
        model = call.model_id if adapter else call.model.name
        # No key's name has a slash.
        found += _of(alone, f"{caller.name}/{model}", f" of the model '{model}'")
    return found


def _of(limits: KeyLimits, scope: str, of: str) -> list[_Bound]:
    weight = limits.cached_token_weight
    return [_Bound(scope, _LIMIT[name], most, weight, of) for name, most in limits.given.items()]


_LIMIT = {limit.setting: limit for limit in LIMITS}


def _counted(usage: Usage, cached_weight: float) -> float:
    cached = usage.cached_tokens
    return usage.prompt_tokens - cached + cached_weight * cached + usage.completion_tokens


def _refused(call: Call, caller: Caller, wait: float, bound: _Bound, amount: float) -> GatewayError:
    """429: when there is room again, or that there never is."""
    key, limit = f"the API key '{caller.name}'", bound.limit
    kind = "tokens" if limit in _OF_TOKENS else "requests"
    most = f"{bound.most:,} {kind if bound.most > 1 else kind[:-1]}"
    too_large = amount > bound.most
    if limit is AT_ONCE:
        wait = _AT_ONCE_RETRY_S
        said = (
            f"T{key[1:]} may have {most}{bound.of} at once, and has; please send this one again "
            "when another has ended."
        )
    else:
        allowed = f"{most} per {'day' if limit is TODAY else 'minute'}{bound.of}"
        about = f"about {amount:,.0f} tokens"
        if too_large:
            said = (
                f"This request may take {about}, and {key} has {allowed}; send less text, or lower "
                "max_tokens."
            )
        elif kind == "requests":
            said = f"T{key[1:]} has {allowed}; please send this one again in {duration(wait)}."
        else:
            said = (
                f"T{key[1:]} has {allowed}, with room for this request of {about} in "
                f"{duration(wait)}."
            )
    headers = {} if too_large else {"retry-after": str(ceil(wait))}
    if too_large or limit is TODAY:
        headers["x-should-retry"] = "false"
    else:
        headers["retry-after-ms"] = str(ceil(wait * 1000))
    code = "insufficient_quota" if limit is TODAY else "rate_limit_exceeded"
    type = code if limit is TODAY else kind
    if call.request.path.startswith("/v1/messages"):
        type = "rate_limit_error"  # Anthropic's, for all of them
    return GatewayError(429, said, type, code=code, headers=headers)

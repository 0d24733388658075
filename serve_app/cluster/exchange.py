"""What a gateway and a front end of a replica tell each other, besides requests and answers.

Each gateway keeps one ``POST`` to :data:`PATH` open at every front end. The front end answers with
an :class:`Answer` as soon as it has a report (under load a moment later, with more of them), else
after :data:`HOLD_S`, or :data:`IDLE_HOLD_S`. A report stays with the front end until a gateway's
next ``POST`` says that it has been taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import msgspec

PATH = "/-/serve_app/exchange"

CALL_HEADER = b"x-serve-app-call"
"""Request header that carries a :class:`Called` from the gateway to a front end."""

PROMPT_HEADER = b"x-serve-app-prompt"
"""Request header from a gateway that chooses by what is cached: its key of the prompt, as text. The
front end passes it on to the other gateways, which so know what its replica has."""

HOLD_S = 1.0
"""Seconds after which a front end answers though it has nothing to report."""

IDLE_HOLD_S = 3.0
"""The same while its engine idles, and the gateway knows that: most of a large fleet does, and each
answer costs every gateway."""


_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""What a replica counts. One that goes wrong is not heard, instead of stopping its siblings too:
the gateway computes the room of all replicas of a model at once."""


@dataclass(frozen=True)
class Called:
    """What a front end must know of a request so that its report can be matched, or stand alone."""

    id: str
    gateway: str
    key: str
    model: str
    model_id: str
    path: str
    arrived: float
    """Seconds since the epoch."""

    def header(self) -> bytes:
        """The value of :data:`CALL_HEADER`."""
        return _encode(self)

    @staticmethod
    def read(header: bytes) -> Called:
        """The inverse of :meth:`header`."""
        return _called.decode(header)


@dataclass(frozen=True)
class Usage:
    """What engines did for one request, as its front end counted it."""

    prompt_tokens: _Count = 0
    """Tokens of all its prompts that engines computed or found in the KV cache."""

    cached_tokens: _Count = 0
    """Those found in the KV cache."""

    completion_tokens: _Count = 0
    """Generated tokens, of an aborted request too."""


@dataclass(frozen=True)
class Report:
    """What one request took; or, without ``usage``, that the engine still works on it.

    A request may outlive its HTTP answer: a response that is made in the background does.
    """

    called: Called
    usage: Usage | None


@dataclass(frozen=True)
class Load:
    """An engine's load, as in its replica's autoscaling statistics."""

    running: _Count
    """Requests that the engine runs."""

    waiting: _Count
    """Requests that wait in it, or in a front end for it."""

    capacity: _Count
    """``max_num_seqs``."""

    kv_cache_usage: float
    """From 0 to 1."""

    gateways: _Count = 1
    """Gateways that send to it."""

    asleep: bool = False
    """Whether it has been put to sleep."""

    wakes: bool = False
    """Whether it then wakes by itself when requests wait for it: it is in a swap group."""

    over_plan: int = 0
    """Bytes of its GPU that it holds beyond its part (``resources.gpu_share``)."""

    prefix_cache_tokens: _Count | None = None
    """Tokens that its KV cache keeps of past prompts at most: 0 with prefix caching off, None where
    a replica of an earlier version does not tell."""

    cache_drops: _Count = 0
    """How often it has forgotten them all: it slept, was told to, or an adapter changed."""


@dataclass(frozen=True)
class Question:
    """What a gateway says."""

    gateway: str
    """Its id, made anew at each start."""

    of: str = ""
    """The ``of`` of the last answer."""

    taken: int = 0
    """The ``last`` of that answer: it has all reports up to there."""

    waiting: int = 0
    """Requests that wait in it for this model."""

    waited_s: float = 0.0
    """Seconds for which the oldest of these has waited."""

    heard: int | None = None
    """The ``heard`` of the last answer: it has all ``prompts`` up to there. None where a gateway of
    an earlier version does not listen."""

    soon_s: float = HOLD_S
    """Seconds within which it wants to be told what others have sent there."""

    def encode(self) -> bytes:
        return _encode(self)

    @staticmethod
    def decode(body: bytes) -> Question:
        return _question.decode(body)


@dataclass(frozen=True)
class Answer:
    """What a front end says."""

    of: str
    """What the numbers of ``reports`` belong to: those of another name begin anew."""

    last: int
    """The number of the last of ``reports``."""

    reports: list[Report] = field(default_factory=list)
    load: Load | None = None
    """From the front end that is in the engine's replica process; None from further ones."""

    prompts: list[str] = field(default_factory=list)
    """Of requests that other gateways have sent there: each one's :data:`PROMPT_HEADER`."""

    heard: int = 0
    """The number of the last of ``prompts``; also by the name ``of``."""

    def encode(self) -> bytes:
        return _encode(self)

    @staticmethod
    def decode(body: bytes) -> Answer:
        return _answer.decode(body)


_encode = msgspec.json.encode
_called = msgspec.json.Decoder(Called)
_question = msgspec.json.Decoder(Question)
_answer = msgspec.json.Decoder(Answer)

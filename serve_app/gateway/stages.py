"""Stages: hooks before a call is relayed and after it has ended, one stage per concern.

A stage does not stand between the replica and the client. So a chunk of an answer costs the same
however many stages there are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from serve_app.gateway.callers import Caller
from serve_app.gateway.directory import Model
from serve_app.gateway.errors import GatewayError
from serve_app.gateway.relay import Answer, Request
from serve_app.gateway.upstream import Headers

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Call:
    """One request on its way, as stages and policies see it."""

    id: str
    """Made by this gateway, and no other call's; ``request.id`` may be the client's choice."""

    request: Request
    model: Model
    model_id: str
    """The id that names it in the request."""

    caller: Caller | None
    """None where the gateway has no keys, and everybody may call."""

    arrived: float
    """``time.perf_counter`` when the whole request had been read."""

    front_end: str | None = None
    """The id of the only front end that can answer it; None where any can."""

    answer_headers: Headers = field(default_factory=list)
    """Sent with the answer, also where that is an error; a stage may append to it."""

    instead_of: Call | None = None
    """The call to the model that the client named, where this is one to its fallback."""

    @property
    def named(self) -> str:
        """The id that the client named."""
        return self.instead_of.model_id if self.instead_of else self.model_id


@dataclass
class Outcome:
    """How a call ended. Filled in along the way; complete when ``Stage.ended`` gets it."""

    end: Literal["answered", "refused", "lost", "left", "failed"] = "left"
    """``answered``: the replica's answer was sent whole, whatever its status. ``refused``: an
    error of the gateway was sent in its place. ``lost``: the replica was lost in the middle of
    its answer. ``left``: the client went away before the end. ``failed``: a bug in the gateway."""

    status: int = 499
    """The HTTP status to count the call by: that of its answer, except 502 where the replica was
    ``lost`` and 499 where the client ``left``, whatever status had been sent by then."""

    retries: list[str] = field(default_factory=list)
    """One reason for each retry: what the replica did that failed before its first byte."""

    front_end: str = ""
    """The id of the front end that had the call last; empty where none got it."""

    queued_s: float = 0.0
    """Seconds that it waited for a replica."""

    first_byte: float | None = None
    """``time.perf_counter`` at the first byte of the replica's answer; None without one."""

    ended: float = 0.0
    """``time.perf_counter`` at the end."""

    sent: float | None = None
    """``time.perf_counter`` when the request was written to the replica that answered; None where
    none did."""

    streamed: bool = False
    """Whether the replica's answer was an event stream."""


class Stage(Protocol):
    """One thing that is done for each call."""

    async def admit(self, call: Call) -> Call:
        """Admit the call; return it with what this stage found out about it. May wait.

        A stage that raises here, or is cancelled because the client went away, has not admitted
        the call, and its ``ended`` is not called.

        Raises:
            GatewayError: the answer that the client gets instead, such as 401 or 429.
        """
        ...

    def ended(self, call: Call, outcome: Outcome) -> None:
        """Called exactly once, however the call ended, if this stage admitted it.

        ``call`` is the one that ``admit`` returned. Must not raise.
        """
        ...


async def run(
    stages: Sequence[Stage],
    call: Call,
    answer: Answer,
    relay: Callable[[Call, Outcome], Awaitable[int]],
) -> None:
    """Let each stage admit the call, relay it, then call ``ended`` on each, the last one first.

    ``relay`` returns the status of the answer that it sent.

    Raises:
        GatewayError: from a stage or from ``relay``; not sent yet.
    """
    outcome = Outcome()
    admitted: list[tuple[Stage, Call]] = []
    try:
        for stage in stages:
            call = await stage.admit(call)
            admitted.append((stage, call))
        outcome.status = await relay(call, outcome)
        outcome.end = "answered"
    except GatewayError as error:
        outcome.end, outcome.status = "refused", error.status
        raise
    except Exception:  # not CancelledError, which means that the client went away
        outcome.end, outcome.status = "failed", 500
        raise
    finally:
        if answer.cut:
            outcome.end, outcome.status = "lost", 502
        outcome.first_byte = answer.started_at
        outcome.sent, outcome.streamed = answer.asked_at, answer.streamed
        outcome.ended = time.perf_counter()
        for stage, as_admitted in reversed(admitted):
            try:
                stage.ended(as_admitted, outcome)
            except Exception:
                logger.exception(f"request {call.request.id}: a stage failed at its end")

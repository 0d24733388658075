"""What is done before a call is relayed and after it has ended, one stage per concern.

Stages are hooks at both ends of a call. None stands between the replica and the client, so a
chunk of an answer costs the same however many there are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from serve_app.gateway.directory import Model
from serve_app.gateway.errors import GatewayError
from serve_app.gateway.relay import Answer, Request

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    name: str


@dataclass(frozen=True)
class Call:
    """One request on its way: what every stage and policy may look at."""

    request: Request
    model: Model
    caller: Caller | None
    """None where nobody has asked who it is."""

    arrived: float
    """``time.perf_counter`` when the whole request was there."""

    replica: str | None = None
    """The id of the only replica that can answer it; None where any can."""


@dataclass
class Outcome:
    """How a call ended. Filled in on its way, complete when a stage sees it."""

    end: Literal["answered", "refused", "lost", "left", "failed"] = "left"
    """``answered``: the replica's answer was sent whole, whatever its status. ``refused``: an
    error of the gateway was sent in its place. ``lost``: the replica was lost in the middle of
    its answer. ``left``: the client went away before the end. ``failed``: a bug in the gateway."""

    status: int = 499
    """The HTTP status to count the call by: that of its answer, except 502 where the replica was
    ``lost`` and 499 where the client ``left``, whatever status had been sent by then."""

    retries: list[str] = field(default_factory=list)
    """What each replica did that failed before its first byte, where another one was tried."""

    first_byte: float | None = None
    """``time.perf_counter`` when the first byte of the replica's answer was sent; None without."""

    ended: float = 0.0
    """``time.perf_counter`` at the end."""


class Stage(Protocol):
    """One thing that is done for each call."""

    async def admit(self, call: Call) -> Call:
        """Let the call pass, with what this stage found out about it; may wait.

        A stage that raises here, or is cancelled because the client went away, has not admitted
        the call and is not told of its end.

        Raises:
            GatewayError: the answer that the client gets instead, such as 401 or 429.
        """
        ...

    def ended(self, call: Call, outcome: Outcome) -> None:
        """The end of a call that this stage admitted: called exactly once, whatever happened.

        ``call`` is the one that ``admit`` returned. Must not raise.
        """
        ...


async def run(
    stages: Sequence[Stage],
    call: Call,
    answer: Answer,
    relay: Callable[[Call, Outcome], Awaitable[int]],
) -> None:
    """Have each stage in turn admit the call, then relay it; tell them, last one first, its end.

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
    except Exception:  # not CancelledError: a client that goes away ends the task by it
        outcome.end, outcome.status = "failed", 500
        raise
    finally:
        if answer.cut:
            outcome.end, outcome.status = "lost", 502
        outcome.first_byte = answer.started_at
        outcome.ended = time.perf_counter()
        for stage, as_admitted in reversed(admitted):
            try:
                stage.ended(as_admitted, outcome)
            except Exception:
                logger.exception(f"request {call.request.id}: a stage failed at its end")

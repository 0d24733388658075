"""The gateway's side of the exchange with all front ends (:mod:`serve_app.cluster.exchange`)."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from serve_app.cluster.credential import CREDENTIAL_HEADER
from serve_app.cluster.exchange import CALL_HEADER, PATH, Answer, Called, Question
from serve_app.gateway import routes
from serve_app.gateway.ledger import Ledger
from serve_app.gateway.replicas import Board, FrontEnd
from serve_app.gateway.upstream import Pool, UpstreamError

logger = logging.getLogger("ray.serve")

GATEWAY = uuid.uuid4().hex
"""This process's id."""

_SOON_S = 0.1
"""Seconds after which it wants to know what others have sent, at the soonest."""

TOLD_PER_S = 200
"""Answers a second that tell of this, of all front ends together: a twentieth of a core."""

_LOOK_S = 0.2
"""Seconds between two looks for new front ends."""

_PAUSE_S = 1.0
"""Seconds before a front end that failed is asked again."""

_SILENCE_S = 30.0
"""Seconds that a front end may take for its answer: its loop may be busy with long prompts."""


def called(id: str, key: str, model: str, model_id: str, path: str) -> tuple[bytes, bytes]:
    """The header that tells a front end of a request: see :class:`Called`."""
    said = Called(id, GATEWAY, key, model, model_id, routes.told(path), time.time())
    return CALL_HEADER, said.header()


def soon_s(front_ends: int) -> float:
    """Within how many seconds it is to be told what other gateways have sent, by each of so many
    front ends."""
    return max(_SOON_S, front_ends / TOLD_PER_S)


class Exchange:
    """Asks every front end on the board, over and over."""

    def __init__(self, board: Board, ledger: Ledger, credential: bytes) -> None:
        self._board = board
        self._ledger = ledger
        self._credential = credential
        self._pool = Pool(connect_timeout_s=5.0, silence_timeout_s=_SILENCE_S)
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._wanted: dict[str, asyncio.Event] = {}
        """By application: set while requests have begun to wait that no question has told of."""

        board.wanted = lambda application: self._wanted_of(application).set()

    async def run(self) -> None:
        """Ask for ever."""
        try:
            while True:
                known = {it.id: (name, it) for name, it in self._board.all()}
                # One that drains is off the board, and still has reports: its task ends by itself.
                self._asking = {id: it for id, it in self._asking.items() if not it.done()}
                for id in known.keys() - self._asking.keys():
                    self._asking[id] = asyncio.create_task(self._ask(*known[id]))
                await asyncio.sleep(_LOOK_S)
        finally:
            for task in self._asking.values():
                task.cancel()
            self._pool.close()

    async def _ask(self, model: str, front_end: FrontEnd) -> None:
        said = Answer("", 0)
        while True:
            wanted = self._wanted_of(model)
            wanted.clear()
            waiting = self._board.waiting(model)
            question = Question(
                GATEWAY,
                said.of,
                said.last,
                waiting.requests,
                round(waiting.longest_s, 3),
                said.heard,
                soon_s(len(self._asking)),
            )
            try:
                asking = self._once(front_end, question)
                if front_end.replica.sleeps_for_now:
                    answer = await _unless(wanted, asking)
                else:
                    answer = await asking
            except (UpstreamError, ValueError) as error:
                if not self._board.has(front_end):
                    self._ledger.lost(front_end.id)
                    return
                logger.debug(f"no exchange with {front_end.id}: {error!r}")
                await asyncio.sleep(_PAUSE_S)
                continue
            if answer is None:
                continue
            said = answer
            for report in said.reports:
                self._ledger.report(report, front_end.id)
            if said.load:
                self._board.report(front_end.replica.id, said.load)
            if front_end.replica.load is None:  # nor how much it keeps: it tells them again
                said = replace(said, heard=0)
                continue
            for key in said.prompts:
                self._board.heard(model, front_end.replica, key)

    def _wanted_of(self, application: str) -> asyncio.Event:
        return self._wanted.setdefault(application, asyncio.Event())

    async def _once(self, front_end: FrontEnd, question: Question) -> Answer:
        headers = [
            (CREDENTIAL_HEADER, self._credential),
            (b"content-type", b"application/json"),
        ]
        body = question.encode()
        asked = self._pool.ask(front_end.host, front_end.port, "POST", PATH, headers, body)
        with await asked as connection:
            said = b""
            while not connection.ended:
                said += await connection.read()
            if connection.status != 200:
                raise ValueError(f"status {connection.status}")
        return Answer.decode(said)


async def _unless(event: asyncio.Event, asking: Coroutine[Any, Any, Answer]) -> Answer | None:
    """The answer; or None, and the question is broken off, as soon as there is the event.

    Its reports are not lost: the next question has not taken them.
    """
    asked, set_ = asyncio.create_task(asking), asyncio.create_task(event.wait())
    try:
        await asyncio.wait((asked, set_), return_when=asyncio.FIRST_COMPLETED)
        return asked.result() if asked.done() else None
    finally:
        asked.cancel()
        set_.cancel()

"""Sends an admitted call to one front end and, if that one fails, to another."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial

from serve_app.cluster.exchange import PROMPT_HEADER
from serve_app.gateway.errors import Unavailable, unavailable
from serve_app.gateway.queue import Queue
from serve_app.gateway.relay import Answer, Asleep, NotStarted, Relay, Request
from serve_app.gateway.replicas import Board
from serve_app.gateway.stages import Call, Outcome

logger = logging.getLogger("ray.serve")


class Dispatcher:
    """Relays each call to the front end at which it has its turn."""

    def __init__(self, board: Board, queue: Queue, relay: Relay) -> None:
        self._board = board
        self._queue = queue
        self._relay = relay

    async def send(self, call: Call, answer: Answer, outcome: Outcome) -> int:
        """Relay to one replica and, if that fails before its first byte, once to another.

        A replica has failed when one of its front ends did and it has no other, or a second one
        did. A sleeping replica does not count as failed; replicas that are awake are tried next.
        Returns the status that was sent.

        Raises:
            GatewayError: no replica was available, or their answers were lost.
        """
        name = call.model.name
        request = of_call = _with_priority(call)
        failed: set[str] = set()
        while True:
            waits = time.perf_counter()
            try:
                front_end = await self._queue.turn(call, again=bool(outcome.front_end))
            finally:
                outcome.queued_s += time.perf_counter() - waits
            outcome.front_end = front_end.id
            if key := self._queue.key(call):
                told = [*of_call.ours, (PROMPT_HEADER, key)]
                request = replace(of_call, ours=told)
            answer.first_byte = partial(self._queue.first_byte, call)
            try:
                return await self._relay.send(front_end, request, answer)
            except Asleep:
                config = call.model.config
                in_group = config is not None and config.resources.swap_group is not None
                self._board.asleep(front_end, wakes=in_group)
                if front_end.replica.sleeps_for_now:
                    continue  # it has just lost its turn
                if self._board.all_asleep(name):
                    raise Unavailable(
                        503,
                        f"The model '{name}' is asleep until its operator wakes it "
                        f"('serve-app admin {name} wake').",
                        "server_error",
                        code="model_asleep",
                        headers={"retry-after": "30"},
                    ) from None
            except NotStarted as error:
                logger.warning(
                    f"request {call.request.id}: {name}, replica {front_end.id}: {error}"
                )
                self._board.avoid(front_end)
                failed.add(front_end.replica.id)
                if len(failed) > 1 or len(outcome.retries) > 1:
                    raise unavailable(
                        f"The model '{name}' lost two replicas that had this request; "
                        "please send it again."
                    ) from None
                outcome.retries.append(str(error))
            finally:
                self._queue.end(call, front_end)


def _with_priority(call: Call) -> Request:
    """The request, with its caller's priority where the engine orders by that.

    No client says one in the body (``body.py``). vLLM's routes for chats, completions and responses
    read the header; its other routes give every request priority 0.
    """
    config = call.model.config
    if config is None or config.engine.get("scheduling_policy") != "priority":
        return call.request
    priority = -call.caller.priority if call.caller else 0  # vLLM serves the lowest first
    return replace(
        call.request, ours=[*call.request.ours, (b"x-vllm-priority", str(priority).encode())]
    )

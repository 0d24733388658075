"""A replica whose engine is dead or hangs ends itself, so that Serve replaces it at once."""

from __future__ import annotations

import asyncio
import logging
import os

from serve_app.replica.engine import Engine

logger = logging.getLogger("ray.serve")

FIRST_REQUEST_S = 300.0
"""Seconds that an engine may go without a step until it has finished a request: what no warm-up
covers is compiled and tuned then. vLLM gives up by itself after as long."""

_PERIOD_S = 0.2


async def exit_with_engine(engine: Engine, hang_timeout_s: float) -> None:
    """End this process as soon as the engine is dead, or busy without a step for so long.

    Serve replaces a replica whose process is gone at once, but only after three failed
    health checks when it is still there.
    """
    # Counted in turns of this loop: when this process itself gets no turn (the first request
    # imports, the node is overloaded), that is no silence of the engine.
    silent, seen = 0.0, 0.0
    while True:
        await asyncio.sleep(_PERIOD_S)
        if engine.dead:
            logger.error("the engine died; this replica exits so that Serve replaces it")
            os._exit(1)
        load = engine.load
        # An idle engine owes no steps.
        silent = silent + _PERIOD_S if engine.busy and load.last_step == seen else 0.0
        seen = load.last_step
        first_s = 0.0 if load.first_request_done else FIRST_REQUEST_S
        if silent > max(hang_timeout_s, first_s):
            logger.error(
                f"the engine made no step for {silent:.0f} s with requests running; this "
                "replica exits so that Serve replaces it"
            )
            os._exit(1)

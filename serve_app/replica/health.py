"""Ends a replica whose engine is dead or hangs, so that Serve replaces it at once."""

from __future__ import annotations

import asyncio
import logging
import os

from serve_app.replica.engine import Engine
from serve_app.replica.front_ends import FrontEnds
from serve_app.replica.load import EngineLoad

logger = logging.getLogger("ray.serve")

FIRST_REQUEST_S = 300.0
"""Seconds that an engine may take for a step before it has finished its first request. Kernels that
the warm-up missed are compiled and tuned then. vLLM's own limit is as long."""

_PERIOD_S = 0.2


async def exit_with_engine(
    engine: Engine, front_ends: FrontEnds, load: EngineLoad, hang_timeout_s: float
) -> None:
    """End this process when the engine is dead, or busy for ``hang_timeout_s`` without a step.

    Serve replaces a replica at once when its process is gone. While the process lives, Serve first
    waits for three failed health checks.
    """
    # Time is counted in turns of this loop. When this process itself does not run (the first
    # request imports, the node is overloaded), the engine is not the one that is silent.
    silent, seen = 0.0, 0.0
    while True:
        await asyncio.sleep(_PERIOD_S)
        if engine.dead:
            logger.error("the engine died; this replica exits so that Serve replaces it")
            os._exit(1)
        # An idle engine owes no steps, nor does one that sleeps with its requests paused.
        owes = front_ends.busy and not engine.asleep
        silent = silent + _PERIOD_S if owes and load.last_step == seen else 0.0
        seen = load.last_step
        first_s = 0.0 if load.first_request_done else FIRST_REQUEST_S
        if silent > max(hang_timeout_s, first_s):
            logger.error(
                f"the engine made no step for {silent:.0f} s with requests running; this "
                "replica exits so that Serve replaces it"
            )
            os._exit(1)

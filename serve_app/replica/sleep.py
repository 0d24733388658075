"""One replica's part of ``serve-app admin``: sleep, wake, prefix cache reset."""

from __future__ import annotations

import asyncio

from serve_app.errors import UserError, did_you_mean
from serve_app.replica.engine import Engine
from serve_app.replica.front_ends import FrontEnds

DRAIN_S = 600.0
"""Seconds that running requests get to finish before an engine sleeps."""

ACTIONS = ("sleep", "wake", "reset-prefix-cache")


class Sleep:
    """Puts one engine to sleep, and wakes it."""

    def __init__(self, engine: Engine, front_ends: FrontEnds) -> None:
        self._engine = engine
        self._front_ends = front_ends
        self._lock = asyncio.Lock()

    async def act(self, action: str) -> str:
        """Do ``action`` on the engine; return what to tell the operator.

        Sleep is vLLM's level 1: the weights go to host memory, the KV cache is dropped. Level 2
        drops the weights too, and an engine that wakes from it generates nonsense until they are
        reloaded.

        Raises:
            UserError: there is no such action.
        """
        llm = self._engine.llm
        if self._engine.wakes and action in ("sleep", "wake"):
            return "refused: a model of a swap group sleeps and wakes by itself"
        if action == "sleep":
            if not llm.vllm_config.model_config.enable_sleep_mode:
                return "refused: sleep needs engine.enable_sleep_mode: true"
            async with self._lock:
                return await self._fall_asleep()
        if action == "wake":
            # Never during a sleep: vLLM would fall asleep after all, at its first idle moment.
            async with self._lock:
                await self._wake()
            return "awake"
        if action == "reset-prefix-cache":
            if done := await llm.reset_prefix_cache():
                await self._front_ends.dropped()
            return "prefix cache reset" if done else "not reset: requests still hold blocks of it"
        raise UserError(f"there is no action '{action}'{did_you_mean(action, ACTIONS)}")

    async def _fall_asleep(self) -> str:
        try:
            await self._front_ends.asleep(True)  # from now on new requests are refused
            # vLLM would finish the running requests, and hold the waiting ones until it is woken.
            await self._front_ends.drain(DRAIN_S)
            if running := self._front_ends.running:
                await self._front_ends.asleep(False)
                return f"not asleep: {running} requests still run; try again"
            await self._engine.llm.sleep(level=1)
        except BaseException:
            await self._wake()  # vLLM stopped scheduling, even if sleep failed
            raise
        return "asleep"

    async def _wake(self) -> None:
        await self._engine.llm.wake_up()
        await self._front_ends.asleep(False)

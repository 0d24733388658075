"""One replica's part of ``serve-app admin``: sleep, wake, prefix cache reset."""

from __future__ import annotations

from serve_app.errors import UserError, did_you_mean
from serve_app.replica.engine import Engine
from serve_app.replica.front_end import FrontEnd

DRAIN_S = 600.0
"""Seconds that running requests get to finish before an engine sleeps."""

ACTIONS = ("sleep", "wake", "reset-prefix-cache")


async def act(engine: Engine, front_end: FrontEnd, action: str) -> str:
    """Do ``action`` on one engine; return what to tell the operator.

    Sleep is vLLM's level 1: the weights go to host memory, the KV cache is dropped. Level 2 drops
    the weights too, and an engine that wakes from it generates nonsense until they are reloaded.
    """
    llm = engine.llm
    if action == "sleep":
        if not llm.vllm_config.model_config.enable_sleep_mode:
            return "refused: sleep needs engine.enable_sleep_mode: true"
        async with engine.sleep_lock:
            return await _sleep(engine, front_end)
    if action == "wake":
        # Never during `_sleep`: vLLM would fall asleep after all, at its first idle moment.
        async with engine.sleep_lock:
            await llm.wake_up()
            engine.asleep = False
        return "awake"
    if action == "reset-prefix-cache":
        done = await llm.reset_prefix_cache()
        return "prefix cache reset" if done else "not reset: requests still hold blocks of it"
    raise UserError(f"there is no action '{action}'{did_you_mean(action, ACTIONS)}")


async def _sleep(engine: Engine, front_end: FrontEnd) -> str:
    engine.asleep = True  # from now on new requests are refused
    try:
        # vLLM would finish the running requests, and hold the waiting ones until it is woken.
        await front_end.drain(DRAIN_S)
        if front_end.running:
            engine.asleep = False
            return f"not asleep: {front_end.running} requests still run; try again"
        await engine.llm.sleep(level=1)
    except BaseException:
        await engine.llm.wake_up()  # vLLM stopped scheduling, even if sleep failed
        engine.asleep = False
        raise
    return "asleep"

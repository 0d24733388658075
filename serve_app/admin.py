"""Calls to every replica of a model, over Ray: sleep, wake, prefix cache reset."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from serve_app.config import DEPLOYMENT
from serve_app.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from serve_app.engine import Engine

ACTIONS = ("sleep", "wake", "reset-prefix-cache")


async def act(engine: Engine, action: str) -> str:
    """Do ``action`` on one engine; what to say about it.

    Sleep is vLLM's level 1: the weights go to host memory, the KV cache is dropped. Level 2 drops
    the weights too, and an engine that wakes from it speaks nonsense until they are loaded again.
    """
    llm, load = engine.llm, engine.load
    if action == "sleep":
        if not llm.vllm_config.model_config.enable_sleep_mode:
            return "refused: sleep needs engine.enable_sleep_mode: true"
        load.asleep = True  # from now on new requests are refused; those that run are finished
        try:
            await llm.sleep(level=1, mode="wait")
        except Exception:
            load.asleep = False
            raise
        return "asleep"
    if action == "wake":
        await llm.wake_up()
        load.asleep = False  # vLLM would tell its own stat loggers, and does not tell ours
        return "awake"
    if action == "reset-prefix-cache":
        done = await llm.reset_prefix_cache()
        return "prefix cache reset" if done else "not reset: requests still hold blocks of it"
    raise UserError(f"there is no action '{action}'{did_you_mean(action, ACTIONS)}")


def broadcast(model: str, action: str, *, address: str | None) -> list[tuple[str, str]]:
    """Run ``action`` on all replicas of the application ``model``: (replica id, result) each.

    Raises:
        UserError: no cluster, no such model, or the model has no replica.
    """
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        raise UserError("no Ray cluster is running here; give its address with --address") from None
    try:
        names = list(serve.status().applications)
        if model not in names:
            raise UserError(
                f"there is no application '{model}'{did_you_mean(model, names)} "
                f"(applications: {', '.join(names) or 'none'})"
            )
        handle = serve.get_deployment_handle(DEPLOYMENT, model)
        results = handle.broadcast("admin", action).results()
    finally:
        ray.shutdown()
    if not results:
        raise UserError(f"'{model}' has no running replica")
    return sorted(results)

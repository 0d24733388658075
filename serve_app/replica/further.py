"""A further front end of a replica's engine: a process that runs vLLM's app behind the same guard.

It does what the replica's own process (:mod:`serve_app.replica.server`) tells it, and ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import pickle
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from serve_app.cluster import front_end_ids
from serve_app.cluster.exchange import Load
from serve_app.replica.channel import Channel, Failed
from serve_app.replica.clients import Client
from serve_app.replica.engine import Engine
from serve_app.replica.front_end import FrontEnd
from serve_app.replica.recorder import Recorder

logger = logging.getLogger("ray.serve")

REPORT_S = 0.05
"""Seconds between two reports to the replica's process while there is something to report."""

SIGN_OF_LIFE_S = 1.0
"""Seconds between two reports while there is nothing."""


@dataclass(frozen=True)
class Order:
    """What all front ends of a replica are made of."""

    args: Namespace
    config: Any
    """vLLM's ``VllmConfig``, before the engine has changed it."""

    credential: bytes
    replica: str
    host: str

    async def front_end(
        self, engine: Engine, index: int, load: Callable[[], Load | None] = lambda: None
    ) -> FrontEnd:
        """The front end of this index, not yet listening. ``load`` tells the engine's, if known."""
        id = front_end_ids.of(self.replica, index)
        return await FrontEnd.build(engine, self.args, self.credential, id, load)


def main(index: int, order: bytes, client: Client, port: int, pipe: Connection[Any, Any]) -> None:
    """The process.

    Args:
        index: of the front end; 0 is the replica's own process.
        order: a pickled :class:`Order`. Reading it imports vLLM.
        port: to listen on; 0 takes a free one.
        pipe: to the replica's process.
    """
    import uvloop

    gc.disable()  # as in `supervised`
    ordered: Order = pickle.loads(order)
    gc.enable()
    from vllm.plugins import load_general_plugins
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.utils.system_utils import decorate_logs, set_process_title

    set_process_title("FrontEnd", str(index))
    decorate_logs()
    load_general_plugins()
    if ordered.args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(ordered.args.tool_parser_plugin)
    if ordered.args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(ordered.args.reasoning_parser_plugin)
    uvloop.run(_serve(index, ordered, client, port, pipe))


async def _serve(
    index: int, order: Order, client: Client, port: int, pipe: Connection[Any, Any]
) -> None:
    recorder = Recorder()
    try:
        order.config.parallel_config._api_process_rank = index
        engine = Engine.join(order.args, order.config, client, recorder)
        front_end = await order.front_end(engine, index)
        adapters = front_end.serving_models.lora_requests

        def sleep(asleep: bool) -> None:
            engine.asleep = asleep
            # Before the answer: whoever drains next must know of requests that came just before.
            report()

        def state() -> tuple[int, int, bool]:
            return front_end.running, front_end.reports.due, engine.busy

        def report() -> None:
            channel.tell("report", *state(), recorder.take())

        def learn(name: str, request: Any) -> None:
            adapters[name] = request

        def forget(name: str) -> None:
            adapters.pop(name, None)

        handlers: dict[str, Callable[..., Any]] = {
            "asleep": sleep,
            "learn": learn,
            "forget": forget,
            "dropped": front_end.reports.prompts.forget,
        }
        channel = Channel(pipe, handlers, lost=lambda: os._exit(1))

        async def resolve(name: str) -> Any:
            # The answer is in `adapters` by then: it is told before, in the order in which the
            # replica's process loads and unloads.
            return adapters.get(name) or await channel.ask("resolve", name)

        # Adapters are numbered, loaded and unloaded in one place: the engine would take two that
        # have the same number for one.
        front_end.serving_models.resolve_lora = resolve
        engine.asleep = await channel.ask("is_asleep")
        await front_end.listen(order.host, port)
    except BaseException as error:
        pipe.send(("failed", None, (f"{type(error).__name__}: {error}",)))
        raise
    channel.tell("listening", front_end.port)
    await _report(channel, state, recorder)


async def _report(
    channel: Channel, state: Callable[[], tuple[int, int, bool]], recorder: Recorder
) -> None:
    said, quiet = None, 0.0
    while True:
        records, now = recorder.take(), state()
        if records or now != said or quiet >= SIGN_OF_LIFE_S:
            # One at a time: while that process is busy, a full pipe would hold up this one, too.
            with contextlib.suppress(Failed):  # it is logged there
                await channel.ask("report", *now, records)
            said, quiet = now, 0.0
        await asyncio.sleep(REPORT_S)
        quiet += REPORT_S

"""The clients of one engine: the front ends that send it requests, each by an index of its own.

vLLM's EngineCore connects to an address for input and one for output of each client, once, when it
starts; the list cannot grow later (``vllm serve --api-server-count``). The message that tells a
client that the engine is ready is sent once per address, too. So the list also has spare clients:
a front end that is started again is a new client, and gets no output of the one before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SPARES = 8
"""Clients for front ends that are started again, in the life of one engine."""

ABORT = "serve_app_abort_client"
"""The method that :func:`prepare` adds to EngineCore."""


@dataclass(frozen=True)
class Client:
    """A client by vLLM's index, and the addresses that it binds."""

    index: int
    input_address: str
    output_address: str


def beyond_the_first(count: int) -> list[Client]:
    """Clients with the indices 1 to ``count``, at addresses that only this node can reach."""
    from vllm.utils.network_utils import get_open_zmq_ipc_path

    return [
        Client(index, get_open_zmq_ipc_path(), get_open_zmq_ipc_path())
        for index in range(1, count + 1)
    ]


@contextmanager
def announced(clients: list[Client]) -> Iterator[None]:
    """Let the engine that the ``with`` block starts connect to these clients, too."""
    from vllm.v1.engine import core_client

    module: Any = core_client
    plain = module.get_engine_zmq_addresses

    def with_clients(*args: Any, **kwargs: Any) -> Any:
        addresses = plain(*args, **kwargs)
        addresses.inputs += [client.input_address for client in clients]
        addresses.outputs += [client.output_address for client in clients]
        return addresses

    module.get_engine_zmq_addresses = with_clients
    try:
        yield
    finally:
        module.get_engine_zmq_addresses = plain


async def abort(llm: Any, client: Client) -> None:
    """End the requests of a client whose process is gone: nobody else can."""
    await llm.engine_core.call_utility_async(ABORT, client.index)


def prepare() -> None:
    """In EngineCore's process: add the method that :func:`abort` calls."""
    core: Any = sys.modules.get("vllm.v1.engine.core")
    if core is not None:
        setattr(core.EngineCore, ABORT, _abort_client)


def _abort_client(core: Any, client_index: int) -> None:
    requests = core.scheduler.requests.values()
    core.abort_requests([it.request_id for it in requests if it.client_index == client_index])

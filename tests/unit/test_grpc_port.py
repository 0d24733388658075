"""Serve's port between deployments, which unpickles what comes in."""

from __future__ import annotations

import inspect
import socket

import grpc
import pytest
import ray
from ray.serve._private import replica

from serve_app.cluster import grpc_port


def test_serve_still_opens_it_to_all_by_the_function_that_is_replaced() -> None:
    opened = 'add_port_to_grpc_server(self._server, "[::]:0")'
    assert opened in inspect.getsource(replica.Replica._on_initialized)


async def test_it_is_open_at_the_nodes_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "add_port_to_grpc_server", replica.add_port_to_grpc_server)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    grpc_port.at_the_nodes_address()
    server = grpc.aio.server()
    port = replica.add_port_to_grpc_server(server, "[::]:0")
    await server.start()
    try:
        socket.create_connection(("127.0.0.1", port), 10).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 10)
    finally:
        await server.stop(None)

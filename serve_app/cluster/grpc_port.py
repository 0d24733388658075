"""Serve's port between deployments, which is not for the network.

Each of Serve's replicas opens a gRPC port on all addresses (``ray/serve/_private/replica.py``,
``_on_initialized``), and unpickles whatever comes in: who reaches the port runs code as this user.
Not even ``http_options.host: 127.0.0.1`` closes it. Nothing of ours uses it; handles that do ask
for it at the node's address.
"""

from __future__ import annotations

from typing import Any

from serve_app import addresses


def at_the_nodes_address() -> None:
    """Have the replica in this process open that port at the address by which Ray knows its node.

    To be called in a deployment's ``__init__``, which Serve calls before it opens the port.
    """
    import ray
    from ray.serve._private import replica

    open_port = replica.add_port_to_grpc_server
    here = addresses.join(ray.util.get_node_ip_address(), 0)

    def open_there(server: Any, address: str) -> Any:
        return open_port(server, address.replace("[::]:0", here))

    replica.add_port_to_grpc_server = open_there

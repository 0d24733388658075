"""A gang: the replicas that are the data-parallel ranks of one mixture-of-experts model.

Each rank is a Serve replica with an engine and an HTTP port of its own, so the gateway balances
over ranks as over any replicas. Serve places all members of a gang or none, in one placement
group, and restarts them together. This module tells every engine where rank 0 is.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import ray
from ray import serve
from ray.util import get_current_placement_group, placement_group_table

from serve_app import addresses
from serve_app.cluster import kv
from serve_app.cluster.placement import data_parallel_rank
from serve_app.errors import UserError


def member() -> int:
    """This replica's position in its gang, 0 where it is in none."""
    gang = serve.get_replica_context().gang_context
    return gang.rank if gang is not None else 0


async def join(stages: int, timeout_s: float) -> dict[str, Any]:
    """The engine arguments that make this replica's engine a rank of its gang; ``{}`` without one.

    Args:
        stages: bundles of the placement group that each member has.
        timeout_s: seconds to wait for the member that becomes rank 0.

    Raises:
        UserError: rank 0 did not come up in time.
    """
    gang = serve.get_replica_context().gang_context
    if gang is None:
        return {}
    node_of = placement_group_table(get_current_placement_group())["bundles_to_node_id"]
    nodes = [node_of[bundle] for bundle in sorted(node_of)]
    rank = data_parallel_rank(nodes, stages, gang.rank)
    # A restarted gang has a new id, so no member reads the address of the previous one.
    key = f"gang/{gang.gang_id}"
    if rank == 0:
        host = ray.util.get_node_ip_address()
        here = json.dumps([host, _free_port(host)]).encode()
        kv.put(key, here)
    deadline = asyncio.get_running_loop().time() + timeout_s
    while (found := kv.get(key)) is None:
        if asyncio.get_running_loop().time() > deadline:
            raise UserError(
                f"data-parallel rank 0 of this gang did not start within {timeout_s:g} s"
            )
        await asyncio.sleep(0.2)
    address, port = json.loads(found)
    return {
        "data_parallel_rank": rank,
        "data_parallel_address": address,
        "data_parallel_rpc_port": port,
    }


async def drained(timeout_s: float) -> None:
    """Announce that this member has drained, and wait until all others have announced it.

    Every step of a mixture of experts needs all ranks: a member that ended early would end the
    requests of the others. A member that never came up calls this with ``timeout_s`` 0, so that
    the others do not wait for it.
    """
    gang = serve.get_replica_context().gang_context
    if gang is None:
        return
    keys = [f"gang/{gang.gang_id}/drained/{n}" for n in range(gang.world_size)]
    kv.put(keys[gang.rank], b"")
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not all(map(kv.exists, keys)):
        if asyncio.get_running_loop().time() > deadline:
            return
        await asyncio.sleep(0.2)


def _free_port(host: str) -> int:
    with socket.socket(addresses.family(host)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port

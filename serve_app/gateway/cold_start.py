"""Wakes a model that has no live replica.

One asks Serve for each model, however many calls wait: Serve starts the first replica of a
deployment as soon as anyone waits for it. Serve may never answer (its controller or the replica
that it asks hangs). So the gateway's own list of replicas and the directory are watched too.
"""

from __future__ import annotations

import asyncio

from ray.serve.exceptions import DeploymentUnavailableError

from serve_app.cluster.replicas import addresses
from serve_app.gateway import models
from serve_app.gateway.directory import Directory
from serve_app.gateway.errors import unavailable
from serve_app.gateway.replicas import Board

LOOK_S = 0.25
"""Seconds between two looks at the list of replicas and at the directory."""


class ColdStart:
    """Starts models that are scaled to zero, and waits for those that are starting."""

    def __init__(self, directory: Directory, board: Board) -> None:
        self._directory = directory
        self._board = board

    async def wake(self, name: str) -> None:
        """Return once the model has a live replica, however long that takes.

        Raises:
            GatewayError: 503 where none can start; 404 for a removed model.
        """
        asking = asyncio.create_task(self._ask_serve(name))
        try:
            while not asking.done():
                model = models.find(self._directory, name, caller=None)
                if model.name != name:
                    raise unavailable(
                        f"The model '{name}' has just been replaced; please send the request again."
                    )
                if model.broken:
                    raise unavailable(
                        f"The model '{name}' failed to start: {model.message}", retry_after_s=60
                    )
                await asyncio.wait([asking], timeout=LOOK_S)
                if self._board.live(name):
                    return
            asking.result()
        finally:
            asking.cancel()

    def doing(self, name: str) -> str:
        """What its next replica is doing, for a sentence; empty where that is not known."""
        model = self._directory.find(name)
        starting = self._directory.starting(model) if model else []
        return f"{starting[0]['phase']} ({starting[0]['seconds']} s)" if starting else ""

    async def _ask_serve(self, name: str) -> None:
        """Return when the board has a replica that Serve names and that it does not avoid."""
        while True:
            try:
                async with self._directory.handle(name).choose_replica() as chosen:
                    found = chosen.replica_metadata
            except DeploymentUnavailableError:
                raise unavailable(
                    f"The model '{name}' cannot start; GET /ready says why.", retry_after_s=30
                ) from None
            if self._board.add(name, addresses(chosen.replica_id, found)):
                return
            # The board avoids this replica: it is dead and Serve has not noticed, or it recovers.
            await asyncio.sleep(0.1)

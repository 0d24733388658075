"""The cold-start queue: where calls wait for a model without a live replica.

One waiter per model asks Serve; the others queue first-in, first-out on a lock. One waiter is
enough: Serve starts the first replica of a deployment as soon as anyone waits for it. Serve may
never answer (its controller or the replica that it asks hangs). So the waiter also watches the
gateway's own list of replicas and the directory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Sequence

from ray.serve.exceptions import DeploymentUnavailableError

from serve_app.cluster.replicas import addresses
from serve_app.gateway import models
from serve_app.gateway.directory import Directory, Model
from serve_app.gateway.errors import unavailable
from serve_app.gateway.replicas import Board, FrontEnd

_LOOK_S = 0.25
"""Seconds between two looks at the list of replicas and at the directory."""


class ColdStartQueue:
    """Where calls wait until their model has a live replica."""

    def __init__(self, directory: Directory, board: Board, timeout_s: float) -> None:
        self._directory = directory
        self._board = board
        self._timeout_s = timeout_s
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By model. A call holds the lock for long only while there is no live replica."""

    async def live(self, model: Model) -> Sequence[FrontEnd]:
        """The model's live front ends, at least one. Starts one if the model is scaled to zero.

        Raises:
            GatewayError: 503 where none can start, or none does in time; 404 for a removed model.
        """
        with contextlib.suppress(TimeoutError):
            # Every call takes the lock, also while replicas are live. The lock is first-in,
            # first-out, so a new call cannot overtake those that waited for the start.
            async with asyncio.timeout(self._timeout_s), self._locks[model.name]:
                return self._board.live(model.name) or await self._wake(model.name)
        latest = self._directory.find(model.name) or model
        doing = [f"{s['phase']} ({s['seconds']} s)" for s in self._directory.starting(latest)]
        raise unavailable(
            f"The model '{model.name}' did not start within {self._timeout_s:g} seconds; "
            + (f"it is {doing[0]}." if doing else "it may still be loading."),
            retry_after_s=30,
        )

    async def _wake(self, name: str) -> Sequence[FrontEnd]:
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
                await asyncio.wait([asking], timeout=_LOOK_S)
                if live := self._board.live(name):
                    return live
            return asking.result()
        finally:
            asking.cancel()

    async def _ask_serve(self, name: str) -> Sequence[FrontEnd]:
        """The front ends of the first replica that Serve names and the board does not avoid."""
        while True:
            try:
                async with self._directory.handle(name).choose_replica() as chosen:
                    found = chosen.replica_metadata
            except DeploymentUnavailableError:
                raise unavailable(
                    f"The model '{name}' cannot start; GET /ready says why.", retry_after_s=30
                ) from None
            if live := self._board.add(name, addresses(chosen.replica_id, found)):
                return live
            # The board avoids this replica: it is dead and Serve has not noticed, or it recovers.
            await asyncio.sleep(0.1)

"""How the gateway learns of replicas: Serve's controller pushes each change to it.

This is the feed that Serve's own handles and proxies read. A ``request_router_class`` would
see the same through a documented interface, but Serve refuses one for an application's only
deployment under HAProxy. The feed is not public API: this is the one module that uses it, and
a test holds it against the pinned Ray.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace

from serve_app.gateway.replicas import Board


class Watcher:
    """Keeps a :class:`Board` up to date for the applications it is told to watch."""

    def __init__(self, board: Board, deployment: str) -> None:
        self._board = board
        self._deployment = deployment
        self._clients: dict[str, LongPollClient] = {}

    def watch(self, application: str, controller: Any) -> None:
        """Start watching, or start again where the feed ended with its controller."""
        client = self._clients.get(application)
        if client is not None and client.is_running:
            return
        key = (
            LongPollNamespace.DEPLOYMENT_TARGETS,
            DeploymentID(name=self._deployment, app_name=application),
        )
        self._clients[application] = LongPollClient(
            controller,
            {key: lambda targets: self._publish(application, targets)},
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"serve_app gateway: {application}",
        )

    def forget(self, application: str) -> None:
        """Stop watching an application that was removed."""
        client = self._clients.pop(application, None)
        if client is not None:
            client.stop()
        self._board.forget(application)

    def _publish(self, application: str, targets: Any) -> None:
        if application not in self._clients:
            return
        running = {
            info.replica_id.unique_id: metadata
            for info in targets.running_replicas
            if "port" in (metadata := info.replica_metadata)
        }
        self._board.publish(
            application, {id: (it["host"], it["port"]) for id, it in running.items()}
        )
        for metadata in running.values():
            if length := metadata.get("max_model_len"):
                self._board.max_model_len[application] = length

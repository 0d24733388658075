"""The feed of live replicas: Serve's controller pushes each change.

Serve's own handles and proxies read the same feed. It is a private API, so a test checks it
against the pinned Ray. A ``request_router_class`` would see the same through a documented
interface, but under HAProxy Serve refuses one for an application's only deployment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from ray.serve._private.common import DeploymentID
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace

from serve_app.cluster import front_end_ids, serve


def addresses(replica: str, metadata: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """``{front end id: (host, port)}`` of a replica.

    Args:
        metadata: what ``ModelServer.record_replica_metadata`` returned. Images before this one
            have one front end, and no ``ports``.
    """
    ports = metadata.get("ports", [metadata["port"]])
    return {front_end_ids.of(replica, n): (metadata["host"], port) for n, port in enumerate(ports)}


class Board(Protocol):
    """Receives the changes."""

    def publish(
        self,
        application: str,
        running: dict[str, tuple[str, int]],
        max_model_len: int | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """An application's front ends are now these: ``{front end id: (host, port)}``.

        Args:
            max_model_len: the replicas' limit on a request's tokens; None where none reports it.
            about: what the replicas tell of their model, ``takes`` and ``memory``; or None.
        """

    def forget(self, application: str) -> None:
        """An application was removed."""


class Watcher:
    """Keeps a :class:`Board` up to date for the applications it is told to watch."""

    def __init__(self, board: Board, deployment: str) -> None:
        self._board = board
        self._deployment = deployment
        self._clients: dict[str, LongPollClient] = {}
        self._ids: dict[str, frozenset[str]] = {}

    def ids(self, application: str) -> frozenset[str] | None:
        """The model ids that all its running replicas answer to; None where that is not known."""
        return self._ids.get(application)

    def watch(self, application: str) -> None:
        """Start watching, or restart a feed that ended with its controller."""
        client = self._clients.get(application)
        if client is not None and client.is_running:
            return
        controller = serve.controller()
        if controller is None:
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
        self._ids.pop(application, None)
        client = self._clients.pop(application, None)
        if client is not None:
            client.stop()
        self._board.forget(application)

    def _publish(self, application: str, targets: Any) -> None:
        if application not in self._clients:
            return
        # Of each replica: what ModelServer.record_replica_metadata returned.
        running = {
            info.replica_id.unique_id: metadata
            for info in targets.running_replicas
            if "port" in (metadata := info.replica_metadata)
        }
        ids = [frozenset(it["ids"]) for it in running.values() if "ids" in it]
        if ids and len(ids) == len(running):  # images before this one do not tell
            self._ids[application] = frozenset.intersection(*ids)
        else:
            self._ids.pop(application, None)
        lengths = [length for it in running.values() if (length := it.get("max_model_len"))]
        abouts = [about for it in running.values() if (about := it.get("about"))]
        self._board.publish(
            application,
            {
                id: at
                for replica, it in running.items()
                for id, at in addresses(replica, it).items()
            },
            lengths[-1] if lengths else None,
            abouts[-1] if abouts else None,
        )

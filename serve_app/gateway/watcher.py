"""How the gateway learns of replicas: it is told by Serve, through a request router.

Serve pushes each change of a deployment's replicas into the deployment's request router,
which runs inside every process that holds a handle. :class:`ReplicaWatcher` is such a router,
the ``request_router_class`` of every model.
"""

from __future__ import annotations

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class ReplicaWatcher(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Serve's request router for models: it publishes the replicas it is told of.

    Requests go through it only while a model has no replica (``choose_replica`` waits there
    and wakes a model that is scaled to zero).
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        # Serve ships this class by value, module globals included, so the process's own board
        # is looked up where it runs.
        from serve_app.gateway.replicas import board

        super().update_replicas(replicas)
        board.publish(
            self._deployment_id.app_name,
            {
                str(r.replica_id.unique_id): (
                    r.replica_metadata["host"],
                    r.replica_metadata["port"],
                )
                for r in replicas
                if "port" in r.replica_metadata
            },
        )

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        return [candidate_replicas]

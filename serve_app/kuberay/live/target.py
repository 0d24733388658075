"""The RayService that a command is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve_app.errors import UserError
from serve_app.kuberay.live.api_server import APIServer
from serve_app.kuberay.render.names import labels
from serve_app.kuberay.render.profile import ClusterProfile

Document = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A RayService by name; it need not exist."""

    server: APIServer
    name: str
    namespace: str

    @property
    def address(self) -> str:
        """The name as a command takes it, with ``-n`` where the namespace is not the default."""
        default = ClusterProfile.model_fields["namespace"].default
        return self.name if self.namespace == default else f"{self.name} -n {self.namespace}"

    def get(self) -> Document | None:
        return self.server.get("RayService", self.name, self.namespace)

    def require(self) -> Document:
        """The object.

        Raises:
            UserError: there is none.
        """
        document = self.get()
        if document is None:
            raise UserError(f"no RayService {self.name} in namespace {self.namespace}")
        return document

    def pods(self) -> list[Document]:
        """All its pods, also those of a second cluster during an upgrade."""
        return self.server.list("Pod", self.namespace, labels(self.name))

    def clusters(self) -> list[Document]:
        """The RayClusters that the operator made for it: one, more around an upgrade."""
        made = {
            "ray.io/originated-from-cr-name": self.name,
            "ray.io/originated-from-crd": "RayService",
        }
        return self.server.list("RayCluster", self.namespace, made)

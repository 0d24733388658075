"""The live replicas of every model, and the choice among them: no call to Ray."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(eq=False)
class Replica:
    """A model server that can be sent requests."""

    id: str
    host: str
    port: int
    inflight: int = 0
    """Requests that this gateway has running there."""

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}"


class Board:
    """Replicas by application, as Serve last reported them, less those found dead since."""

    def __init__(self) -> None:
        self._replicas: dict[str, dict[str, Replica]] = {}
        self._dead: set[str] = set()

    def publish(self, application: str, running: dict[str, tuple[str, int]]) -> None:
        """Replace an application's replicas by ``{replica id: (host, port)}``."""
        before = self._replicas.get(application, {})
        self._dead -= before.keys() - running.keys()
        self._replicas[application] = {
            id: before.get(id) or Replica(id, host, port) for id, (host, port) in running.items()
        }

    def forget(self, application: str) -> None:
        """Forget an application that was removed."""
        self.publish(application, {})
        del self._replicas[application]

    def mark_dead(self, replica: Replica) -> None:
        """Choose it no more; Serve takes longer to notice than a refused connection."""
        self._dead.add(replica.id)

    def add(self, application: str, id: str, host: str, port: int) -> Replica | None:
        """A replica that Serve named elsewhere; None where it was found dead."""
        if id in self._dead:
            return None
        replicas = self._replicas.setdefault(application, {})
        return replicas.setdefault(id, Replica(id, host, port))

    def choose(self, application: str) -> Replica | None:
        """The live replica with the fewest requests from this gateway; None without any.

        Ties are broken at random, so that several gateways do not all pick the same one.
        """
        live = [r for r in self._replicas.get(application, {}).values() if r.id not in self._dead]
        if len(live) < 2:
            return live[0] if live else None
        least = min(r.inflight for r in live)
        return random.choice([r for r in live if r.inflight == least])

"""The live replicas of every model, as Serve reports them, and the choice among them.

:mod:`serve_app.gateway.watcher` writes on :data:`board` what Serve tells it, as soon as it
changes. So a choice costs no call to Ray at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock


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


@dataclass
class Board:
    """Replicas by application. Written by Serve's router thread, read by the event loop."""

    _replicas: dict[str, tuple[Replica, ...]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)
    _listeners: list[Callable[[str], None]] = field(default_factory=list)

    def publish(self, application: str, running: dict[str, tuple[str, int]]) -> None:
        """Replace an application's replicas by ``{replica id: (host, port)}``."""
        with self._lock:
            known = {r.id: r for r in self._replicas.get(application, ())}
            self._replicas[application] = tuple(
                known.get(id) or Replica(id, host, port) for id, (host, port) in running.items()
            )
        for listener in self._listeners:
            listener(application)

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call ``listener(application)`` after each change, in the thread that made it."""
        self._listeners.append(listener)

    def drop(self, application: str, replica: Replica) -> None:
        """Forget a replica that was found dead, until Serve next reports its replicas."""
        with self._lock:
            kept = tuple(r for r in self._replicas.get(application, ()) if r is not replica)
            self._replicas[application] = kept

    def forget(self, application: str) -> None:
        """Forget an application that was removed."""
        with self._lock:
            self._replicas.pop(application, None)

    def replicas(self, application: str) -> tuple[Replica, ...]:
        """The replicas that can be sent requests now."""
        return self._replicas.get(application, ())

    def choose(self, application: str, avoid: Replica | None = None) -> Replica | None:
        """The replica with the fewest requests from this gateway; None where there is none.

        Ties are broken at random, so that several gateways do not all pick the same one.
        """
        candidates = [r for r in self.replicas(application) if r is not avoid]
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        least = min(r.inflight for r in candidates)
        return random.choice([r for r in candidates if r.inflight == least])


board = Board()
"""This process's board."""

"""The live replicas of every model: no call to Ray."""

from __future__ import annotations

import time
from dataclasses import dataclass

from serve_app import addresses

AVOID_S = 3.0
"""Seconds for which a replica that failed a request is not chosen.

Serve removes a dead replica within that time, and a live one (it closed an idle connection
just when a request went out) gets requests again.
"""


@dataclass(eq=False)
class Replica:
    """A model server that can be sent requests."""

    id: str
    host: str
    port: int
    inflight: int = 0
    """Requests that this gateway has running there."""

    asleep_until: float = 0.0
    """By ``time.monotonic``; until then one that is awake is better."""

    @property
    def base_url(self) -> str:
        return f"http://{addresses.join(self.host, self.port)}"


class Board:
    """Replicas by application, as Serve last reported them, less those that failed since."""

    def __init__(self) -> None:
        self._replicas: dict[str, dict[str, Replica]] = {}
        self._avoid_until: dict[str, float] = {}
        self.max_model_len: dict[str, int] = {}
        """By application, as its last replica said; kept while it is scaled to zero."""

    def publish(
        self,
        application: str,
        running: dict[str, tuple[str, int]],
        max_model_len: int | None = None,
    ) -> None:
        """Replace an application's replicas by ``{replica id: (host, port)}``.

        ``max_model_len`` is what they say of it; without one the last stays.
        """
        if max_model_len:
            self.max_model_len[application] = max_model_len
        before = self._replicas.get(application, {})
        for id in before.keys() - running.keys():
            self._avoid_until.pop(id, None)
        self._replicas[application] = {
            id: before.get(id) or Replica(id, host, port) for id, (host, port) in running.items()
        }

    def forget(self, application: str) -> None:
        """Forget an application that was removed."""
        self.publish(application, {})
        del self._replicas[application]
        self.max_model_len.pop(application, None)

    def avoid(self, replica: Replica) -> None:
        """Do not choose it for a while; Serve takes longer to notice than a failed request."""
        self._avoid_until[replica.id] = time.monotonic() + AVOID_S

    def asleep(self, replica: Replica) -> None:
        """Choose it for a while only where all are asleep."""
        replica.asleep_until = time.monotonic() + AVOID_S

    def all_asleep(self, application: str) -> bool:
        """Whether a request found each of its live replicas asleep a moment ago."""
        now = time.monotonic()
        return all(r.asleep_until > now for r in self._not_avoided(application))

    def add(self, application: str, id: str, host: str, port: int) -> Replica | None:
        """A replica that Serve named elsewhere; None where it is to be avoided."""
        if self._is_avoided(id):
            return None
        replicas = self._replicas.setdefault(application, {})
        return replicas.setdefault(id, Replica(id, host, port))

    def application_of(self, replica: str) -> str | None:
        """The application that has the replica of this id, live or avoided."""
        having = (name for name, replicas in self._replicas.items() if replica in replicas)
        return next(having, None)

    def live(self, application: str) -> list[Replica]:
        """Those that can be sent a request now: not avoided, and awake unless all are asleep."""
        live = self._not_avoided(application)
        if len(live) < 2:
            return live
        now = time.monotonic()
        return [r for r in live if r.asleep_until < now] or live

    def _not_avoided(self, application: str) -> list[Replica]:
        replicas = list(self._replicas.get(application, {}).values())
        if self._avoid_until:
            replicas = [r for r in replicas if not self._is_avoided(r.id)]
        return replicas

    def _is_avoided(self, id: str) -> bool:
        until = self._avoid_until.get(id)
        if until is None:
            return False
        if time.monotonic() < until:
            return True
        del self._avoid_until[id]
        return False

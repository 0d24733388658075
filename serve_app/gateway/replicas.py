"""The live replicas of every model. A choice among them needs no call to Ray."""

from __future__ import annotations

import time
from dataclasses import dataclass

from serve_app import addresses

AVOID_S = 3.0
"""Seconds for which a replica that failed a request is avoided.

Serve removes a dead replica within that time. A live replica, which closed an idle connection just
when a request went out, gets requests again afterwards.
"""


@dataclass(eq=False)
class Replica:
    """A model server that can be sent requests."""

    id: str
    host: str
    port: int
    inflight: int = 0
    """This gateway's requests in flight at the replica."""

    asleep_until: float = 0.0
    """By ``time.monotonic``; until then replicas that are awake are preferred."""

    @property
    def base_url(self) -> str:
        return f"http://{addresses.join(self.host, self.port)}"


class Board:
    """The replicas that Serve reported last, by application. Avoids those that failed since."""

    def __init__(self) -> None:
        self._replicas: dict[str, dict[str, Replica]] = {}
        self._avoid_until: dict[str, float] = {}
        self.max_model_len: dict[str, int] = {}
        """By application, as its replicas reported it last; kept while there are none."""

    def publish(
        self,
        application: str,
        running: dict[str, tuple[str, int]],
        max_model_len: int | None = None,
    ) -> None:
        """Replace an application's replicas by ``{replica id: (host, port)}``.

        ``max_model_len`` is what the replicas report; None keeps the last value.
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
        """Keep a replica that failed a request out of :meth:`live` for a few seconds."""
        self._avoid_until[replica.id] = time.monotonic() + AVOID_S

    def asleep(self, replica: Replica) -> None:
        """Note that a replica sleeps: for a while it is live only if all others sleep too."""
        replica.asleep_until = time.monotonic() + AVOID_S

    def all_asleep(self, application: str) -> bool:
        """Whether requests found every live replica of an application asleep a moment ago."""
        now = time.monotonic()
        return all(r.asleep_until > now for r in self._not_avoided(application))

    def add(self, application: str, id: str, host: str, port: int) -> Replica | None:
        """Add a replica that a Serve handle named; None where it is avoided."""
        if self._is_avoided(id):
            return None
        replicas = self._replicas.setdefault(application, {})
        return replicas.setdefault(id, Replica(id, host, port))

    def application_of(self, replica: str) -> str | None:
        """The application of the replica with this id, live or avoided."""
        having = (name for name, replicas in self._replicas.items() if replica in replicas)
        return next(having, None)

    def live(self, application: str) -> list[Replica]:
        """Replicas to choose from: not avoided, and awake unless all are asleep."""
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

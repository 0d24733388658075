"""The phases of starting replicas: replicas publish them, gateways read them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass

from serve_app.cluster import kv


@dataclass(frozen=True)
class Phase:
    """The phase that a starting replica is in."""

    name: str
    since: float
    """By ``time.time`` where the replica runs."""


def read(replicas: Iterable[str]) -> dict[str, Phase]:
    """The phases of starting replicas by id. Replicas without a process have none yet."""
    found = {replica: kv.get(_key(replica)) for replica in replicas}
    return {replica: Phase(*json.loads(value)) for replica, value in found.items() if value}


def publish(replica: str, name: str) -> None:
    """Publish the phase that this replica's start has come to."""
    kv.put(_key(replica), json.dumps([name, time.time()]).encode())


def forget(replicas: Iterable[str]) -> None:
    """Delete the phases of replicas that start no longer."""
    for replica in replicas:
        kv.delete(_key(replica))


def _key(replica: str) -> str:
    return f"progress/{replica}"

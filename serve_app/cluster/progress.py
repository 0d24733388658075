"""How far the starts of replicas have come, as they publish it and gateways read it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass

from serve_app.cluster import kv


@dataclass(frozen=True)
class Phase:
    """What a starting replica is doing."""

    name: str
    since: float
    """By ``time.time`` where the replica runs."""


def read(replicas: Iterable[str]) -> dict[str, Phase]:
    """The phases of starting replicas by id; without those whose process is not up yet."""
    found = {replica: kv.get(_key(replica)) for replica in replicas}
    return {replica: Phase(*json.loads(value)) for replica, value in found.items() if value}


def publish(replica: str, name: str) -> None:
    """Say that this replica's start has come to a phase."""
    kv.put(_key(replica), json.dumps([name, time.time()]).encode())


def forget(replicas: Iterable[str]) -> None:
    """Delete what is left of replicas that were killed while they started."""
    for replica in replicas:
        kv.delete(_key(replica))


def _key(replica: str) -> str:
    return f"progress/{replica}"

"""Ids of front ends: the gateway sends requests to them, not to a replica as a whole."""

from __future__ import annotations


def of(replica: str, index: int) -> str:
    """The id of a replica's front end; the first has the id of its replica.

    ``replica`` is Serve's id, which has letters and digits only.
    """
    return f"{replica}-{index}" if index else replica


def replica_of(front_end: str) -> str:
    """The replica that a front end belongs to."""
    return front_end.partition("-")[0]

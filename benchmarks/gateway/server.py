"""A gateway process without Ray: ``python -m benchmarks.gateway.server PORT UPSTREAM CONFIG``.

With ``REPLICAS MODELS`` after these it has a fleet of that size, whose replicas listen from the
port UPSTREAM on. It is the application that Serve runs, with the args of the JSON file CONFIG. Only
what it would ask of Ray is answered here: which models there are and where, the credential, the
actor of the limits, other gateways, and the folder of Serve's logs. Around it is what Serve has
around an app (:class:`benchmarks.relay.gateway.LikeServe`).
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import uvicorn
import uvloop
from harness.scripted import CREDENTIAL, reported

from benchmarks.gateway.upstream import MODELS
from benchmarks.relay.gateway import LikeServe
from benchmarks.scale.fleet import Fleet
from serve_app.cluster import limits_actor
from serve_app.config.notices import HTTP_OPTIONS
from serve_app.gateway import GatewayServer
from serve_app.gateway.exposition import Alone
from serve_app.gateway.replicas import Board


async def main(
    port: int, upstream: int, args: dict[str, Any], work: Path, fleet: Fleet | None = None
) -> None:
    told = fleet.report() if fleet else {"applications": {it: reported() for it in MODELS}}
    pickled = pickle.dumps(told)

    class Watcher:
        def __init__(self, board: Board, deployment: str) -> None:
            self._board = board
            self._watched: set[str] = set()

        def watch(self, application: str) -> None:
            if application in self._watched:
                return
            self._watched.add(application)
            if fleet:
                self._board.publish(application, fleet.places(application))
                return
            place = "127.0.0.1", upstream + MODELS.index(application)
            self._board.publish(application, {f"{application}-r0": place})

        def ids(self, application: str) -> None:
            """The ids are not known otherwise than by the report."""

    async def report() -> dict[str, Any]:
        found: dict[str, Any] = pickle.loads(pickled)  # as Ray does
        return found

    deployment: Any = GatewayServer
    served = deployment.func_or_class.__mro__[1]  # without what Serve's ingress adds
    gateway = object.__new__(served)
    with (
        mock.patch("serve_app.cluster.replicas.Watcher", Watcher),
        mock.patch("serve_app.cluster.limits_actor.Coordinator", _Coordinator),
        mock.patch("serve_app.cluster.serve.report_async", report),
        mock.patch("serve_app.cluster.gateways.Gateways", Alone),
        mock.patch("serve_app.gateway.access_log.logs_folder", lambda: work / "logs"),
        mock.patch("serve_app.gateway.internal_credential", lambda: CREDENTIAL.encode()),
    ):
        await served.__init__(gateway, args)
        config = uvicorn.Config(
            LikeServe(gateway.__serve_build_asgi_app__()), host="127.0.0.1", port=port,
            lifespan="off", log_level="critical", access_log=False,
            timeout_keep_alive=HTTP_OPTIONS["keep_alive_timeout_s"],
        )  # fmt: skip
        await uvicorn.Server(config).serve()


class _Coordinator:
    """The limits' actor in this process: encoded and summed up as there."""

    def __init__(self) -> None:
        self._sums = limits_actor.Sums({})

    async def exchange(
        self, gateway: str, counted: limits_actor.Counted
    ) -> tuple[limits_actor.Told, int]:
        told = limits_actor.decode(limits_actor.encode(counted))
        others, live = self._sums.exchange(gateway, told, asyncio.get_running_loop().time())
        return limits_actor.decode_told(limits_actor.encode(others)), live


if __name__ == "__main__":
    config = Path(sys.argv[3])
    args = json.loads(config.read_text())
    first = int(sys.argv[2])
    size = [int(it) for it in sys.argv[4:]]
    fleet = Fleet(models=size[1], replicas=size[0], first_port=first) if size else None
    uvloop.run(main(int(sys.argv[1]), first, args, config.parent, fleet))

"""A gateway process without Ray: ``python -m benchmarks.gateway.server PORT UPSTREAM CONFIG``.

With a fourth argument COUNT it has one model ``m`` with so many replicas, at UPSTREAM and the ports
after it; without, the models of :mod:`benchmarks.gateway.upstream`, each with one. It is the application that Serve runs, with the args of the JSON file CONFIG. Only what it would ask
of Ray is answered here: which models there are and where, the credential, the actor of the limits,
other gateways, and the folder of Serve's logs. Around it is what Serve has around an app
(:class:`benchmarks.relay.gateway.LikeServe`).
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import uvicorn
import uvloop
from harness.scripted import CREDENTIAL, reported

from benchmarks.gateway.upstream import MODELS
from benchmarks.relay.gateway import LikeServe
from serve_app.cluster import limits_actor
from serve_app.gateway import GatewayServer
from serve_app.gateway.exposition import Alone
from serve_app.gateway.replicas import Board


async def main(
    port: int, upstream: int, args: dict[str, Any], work: Path, replicas: int = 0
) -> None:
    places = {model: {f"{model}-r0": upstream + n} for n, model in enumerate(MODELS)}
    if replicas:
        places = {"m": {f"m-r{n}": upstream + n for n in range(replicas)}}

    class Watcher:
        def __init__(self, board: Board, deployment: str) -> None:
            self._board = board

        def watch(self, application: str) -> None:
            ports = places[application]
            self._board.publish(application, {id: ("127.0.0.1", at) for id, at in ports.items()})

        def ids(self, application: str) -> None:
            """The ids are not known otherwise than by the report."""

    async def report() -> dict[str, Any]:
        return {"applications": {model: reported() for model in places}}

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
    count = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), args, config.parent, count))

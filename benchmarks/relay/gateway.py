"""A gateway process in front of one scripted upstream: ``python gateway.py PORT UPSTREAM``.

It is started with the tree that shall be measured on its PYTHONPATH, so it imports nothing from
beside it. What the tests' own harness puts around the app stands for Serve: it listens for a client
that leaves, and has a task for the call.
"""

from __future__ import annotations

import sys

import uvicorn
import uvloop
from harness.scripted import GatewayProcess, _CancelledOnDisconnect


async def main(port: int, upstream: int) -> None:
    async with GatewayProcess(upstream) as gateway:
        config = uvicorn.Config(
            LikeServe(gateway.app), host="127.0.0.1", port=port, lifespan="off",
            log_level="critical", access_log=False,
        )  # fmt: skip
        await uvicorn.Server(config).serve()


class LikeServe:
    """The two functions around ``send`` that Serve's direct ingress has, and what is around it."""

    def __init__(self, app: object) -> None:
        self._app = _CancelledOnDisconnect(app)

    async def __call__(self, scope: object, receive: object, send: object) -> None:
        async def user(message: object) -> None:
            await send(message)  # type: ignore[operator]

        async def outer(message: object) -> None:
            await user(message)

        await self._app(scope, receive, outer)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))

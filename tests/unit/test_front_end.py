"""A process's HTTP server: where it listens, what it counts, and how it ends; no engine."""

from __future__ import annotations

import asyncio
import signal
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from serve_app import addresses
from serve_app.cluster.credential import CREDENTIAL_HEADER
from serve_app.replica.front_end import FrontEnd, until_quiet
from serve_app.replica.guard import Guard
from serve_app.replica.reports import Reports

HEADERS = {CREDENTIAL_HEADER.decode(): "secret"}

REPORTS = Reports(lambda: None)


class App:
    """An ASGI app that answers once it may."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(openai_serving_models="vLLM's")
        self.routes: list[Any] = []
        self.asked, self.may_answer = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.asked.set()
            await self.may_answer.wait()
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_it_serves_the_gateway_until_it_is_closed(host: str) -> None:
    app = App()
    front_end = FrontEnd(app, Guard(app, b"secret", REPORTS, lambda: False, lambda: False), REPORTS)
    assert front_end.serving_models == "vLLM's"
    await front_end.listen(host)
    url = f"http://{addresses.join(front_end.host, front_end.port)}"
    async with httpx.AsyncClient(base_url=url) as client:
        stranger = await client.get("/")
        assert (stranger.status_code, front_end.running) == (401, 0)
        assert stranger.json()["error"]["code"] == "invalid_internal_credential"
        asked = asyncio.create_task(client.get("/", headers=HEADERS))
        await app.asked.wait()
        await until_quiet(lambda: front_end.running, 0.05)  # not longer
        drained = asyncio.create_task(until_quiet(lambda: front_end.running, 60))
        await asyncio.sleep(0.3)
        assert (front_end.running, drained.done()) == (1, False)
        app.may_answer.set()
        await drained
        assert ((await asked).status_code, front_end.running) == (204, 0)
        await front_end.close()
        with pytest.raises(httpx.ConnectError):
            await httpx.AsyncClient(base_url=url).get("/", headers=HEADERS)


async def test_a_signal_stays_the_process_s_own() -> None:
    """uvicorn, whose private ``capture_signals`` is replaced, would end its server at one."""
    handled = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in handled]
    front_end = FrontEnd(
        App(), Guard(App(), b"secret", REPORTS, lambda: False, lambda: False), REPORTS
    )
    await front_end.listen("127.0.0.1")
    try:
        assert [signal.getsignal(number) for number in handled] == before
    finally:
        await front_end.close()

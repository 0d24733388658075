"""How often an open page asks: by its own clock here, which the tests move."""

from __future__ import annotations

from typing import Any

from conftest import Opened
from harness.scripted import GatewayProcess, until
from playwright.async_api import Page, Route
from scripted_model import Model


class Watched:
    """A page whose clock stands, and what it has asked of ``route``.

    It is told ``poll_s``: the gateway, whose clock goes on, would take so many looks in a few
    seconds for those of many pages.
    """

    def __init__(self, page: Page, poll_s: float = 2.0, route: str = "**/fleet") -> None:
        self.page = page
        self._route = route
        self.asked = 0
        self._open = 0
        self._poll_s = poll_s

    async def begin(self) -> None:
        await self.page.clock.install()
        await self.page.route(self._route, self._answer)
        await self.page.reload()
        assert await until(lambda: self.asked == 1)
        await self._settled()
        await self.page.clock.pause_at(await self.page.evaluate("Date.now() / 1000 + 1"))

    async def _answer(self, route: Route) -> None:
        self.asked += 1
        self._open += 1
        answer = await route.fetch()
        headers: Any = answer.headers | {"x-poll-s": str(self._poll_s)}
        await route.fulfill(response=answer, headers=headers)
        self._open -= 1

    async def asked_within(self, seconds: int) -> int:
        """How often it asked while its clock went on by so much, a second at a time."""
        before = self.asked
        for _ in range(seconds):
            await self.page.clock.run_for(1000)
            await self._settled()
        return self.asked - before

    async def _settled(self) -> None:
        """What it asks for in this second has come: its answer sets the timer of the next."""
        await self.page.evaluate("fetch('health').then(() => 0)")
        assert await until(lambda: not self._open)
        await self.page.evaluate("fetch('health').then(() => 0)")


async def test_it_waits_as_long_as_the_gateway_says(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        watched = Watched(await opened(gateway), poll_s=30)
        await watched.begin()
        assert await watched.asked_within(20) == 0
        assert await watched.asked_within(12) == 1


async def test_one_that_nobody_touches_asks_seldom_until_it_is_touched(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        watched = Watched(await opened(gateway))
        await watched.begin()
        assert await watched.asked_within(10) >= 3
        await watched.asked_within(130)
        assert await watched.asked_within(60) <= 4
        await watched.page.mouse.move(10, 10)
        await watched.asked_within(20)
        assert await watched.asked_within(10) >= 3


async def test_a_hidden_one_asks_nothing_and_a_shown_one_at_once(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        watched = Watched(await opened(gateway))
        await watched.begin()
        hidden = (
            "(is) => Object.defineProperty(document, 'hidden', {get: () => is, configurable: true})"
        )
        await watched.page.evaluate(hidden, True)
        assert await watched.asked_within(60) == 0
        before = watched.asked
        await watched.page.evaluate(hidden, False)
        await watched.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        assert await until(lambda: watched.asked > before)

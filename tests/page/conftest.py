"""The page in a real Chromium, in front of the real gateway with scripted models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio
from harness.browser import ABSENT, CHROMIUM, PATIENCE_MS, Complaints, chromium
from harness.scripted import GatewayProcess
from playwright.async_api import Browser, Page


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One event loop for all of them, as one browser serves all."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
            item.add_marker(pytest.mark.skipif(not CHROMIUM, reason=ABSENT))


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def modules(browser: Browser) -> AsyncIterator[Page]:
    """A page for tests of its modules' functions alone, one for all of them."""
    async with GatewayProcess() as gateway:
        page = await browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        await page.goto(gateway.base_url)
        yield page
        await page.close()


class Opened(Protocol):
    async def __call__(self, gateway: GatewayProcess, view: str = "", **context: Any) -> Page: ...


@pytest_asyncio.fixture(loop_scope="session")
async def opened(browser: Browser) -> AsyncIterator[Opened]:
    """Opens the page of a gateway in a fresh profile; whatever its console says fails the test."""
    contexts = []
    complaints = Complaints()

    async def open(gateway: GatewayProcess, view: str = "", **context: Any) -> Page:
        contexts.append(await browser.new_context(**context))
        page = await contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        complaints.listen(page)
        await page.goto(f"{gateway.base_url}/{view and '#' + view}")
        return page

    yield open
    for it in contexts:
        await it.close()
    assert complaints.said == []

"""The page before real engines: it moves with them, and Stop ends a request in the engine."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from harness.browser import ABSENT, CHROMIUM, Complaints, ask, chromium
from harness.processes import eventually
from harness.servers import CHAT, EMBED, Cluster, ModelPort
from playwright.async_api import Route, expect

RUNNING = "vllm:num_requests_running"


async def _without_end(route: Route) -> None:
    """Let a small model not end its answer by itself."""
    body = json.loads(route.request.post_data or "{}")
    await route.continue_(post_data=json.dumps(body | {"ignore_eos": True}))


async def _runs(port: ModelPort, requests: int) -> Any:
    return await asyncio.to_thread(eventually, lambda: port.metric(RUNNING) == requests, 60)


@pytest.mark.skipif(not CHROMIUM, reason=ABSENT)
async def test_a_chat_is_seen_in_the_engine_and_ends_there(
    cluster: Cluster, chat_port: ModelPort
) -> None:
    complaints = Complaints()
    async with chromium() as browser:
        page = await browser.new_page()
        complaints.listen(page)
        await page.goto(cluster.base_url)
        card = page.get_by_role("article", name=CHAT)
        await expect(card.get_by_text("running", exact=True)).to_be_visible()
        await expect(card.get_by_text("tokens", exact=False).first).to_be_visible()
        await card.get_by_role("link", name="Chat with it").click()

        await page.route("**/v1/chat/completions", _without_end)
        await ask(page, "Tell me a story.")
        await expect(page.get_by_text("TTFT")).to_be_visible(timeout=60_000)
        assert await _runs(chat_port, 1)

        await page.get_by_role("link", name="Charts").click()
        moving = re.compile(r"^Tokens: generated [1-9]")
        tokens = page.get_by_role("img", name=moving)
        await expect(tokens).to_be_visible(timeout=60_000)

        await page.get_by_role("link", name="Chat").click()
        await page.get_by_role("button", name="Stop").click()
        await expect(page.get_by_text("stopped")).to_be_visible()
        assert await _runs(chat_port, 0)
    assert complaints.said == []


@pytest.mark.skipif(not CHROMIUM, reason=ABSENT)
async def test_each_model_can_be_tried(cluster: Cluster) -> None:
    async with chromium() as browser:
        page = await browser.new_page()
        await page.goto(f"{cluster.base_url}/#try")
        part = page.get_by_role("region", name="Embeddings")
        await expect(part.get_by_label("Model")).to_have_value(EMBED)
        await part.get_by_role("button", name="Try").click()
        numbers = part.get_by_role("img").locator("text")
        await expect(numbers).to_have_count(9)
        alike = [float(it) for it in await numbers.all_text_contents()]
        assert alike[0] == alike[4] == alike[8] == 1.0
        assert alike[1] > alike[2], "a cat is more like a kitten than like a stock market"

        part = page.get_by_role("region", name="Tokenize")
        await part.get_by_label("Model").select_option(CHAT)
        await part.get_by_role("button", name="Try").click()
        await expect(part.locator(".tokens")).to_have_text("Tokens are pieces of words.")

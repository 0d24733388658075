"""The view of the fleet: what Serve says of each model, and what mends it."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

from conftest import Opened
from harness.browser import ask
from harness.scripted import GatewayProcess, Upstream, reported
from playwright.async_api import Route, expect
from scripted_model import Model

from serve_app.cluster.exchange import Load

SENTENCE = "'org/model' has no weights in this folder; set args.model to one that has."


def failed() -> dict[str, Any]:
    return reported(status="DEPLOY_FAILED") | {"message": SENTENCE, "deployments": {}}


def starting() -> dict[str, Any]:
    application = reported(status="DEPLOYING")
    application["deployments"]["ModelServer"]["replicas"] = [
        {"state": "STARTING", "replica_id": "r7", "start_time_s": time.time(), "node_id": "n0"}
    ]
    return application


async def test_a_model_is_shown_with_its_names_and_its_load(opened: Opened) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        gateway.board.report("r0", Load(3, 1, 8, kv_cache_usage=0.41))
        page = await opened(gateway)
        card = page.get_by_role("article", name="m", exact=True)
        for shown in ("running", "also org/m:1.0", "3 of 8", "41 %", "1 in vLLM"):
            await expect(card.get_by_text(shown).first).to_be_visible()
        await expect(page.get_by_text("1 of 1 models run")).to_be_visible()
        await expect(page).to_have_title("Fleet · serve_app")


async def test_a_model_that_failed_says_why_and_is_shown_as_mended(opened: Opened) -> None:
    applications = {"m": reported(), "broken": failed()}
    async with (
        Upstream() as upstream,
        GatewayProcess(upstream, applications=applications) as gateway,
    ):
        page = await opened(gateway, permissions=["clipboard-read", "clipboard-write"])
        card = page.get_by_role("article", name="broken")
        await expect(card.get_by_text("failed to start")).to_be_visible()
        await expect(card.get_by_text(SENTENCE)).to_be_visible()
        command = await card.get_by_role("code").inner_text()
        assert command == "serve-app logs broken"
        await card.get_by_role("button", name="Copy").click()
        await expect(card.get_by_role("button", name="Copied")).to_be_visible()
        assert await page.evaluate("navigator.clipboard.readText()") == command

        gateway.directory.hear({"m": reported(), "broken": starting()})
        await expect(card.get_by_text("starting the process")).to_be_visible()
        await expect(card.get_by_text(SENTENCE)).to_be_hidden()

        gateway.directory.hear({"m": reported(), "broken": reported()})
        gateway.board.publish("broken", {"r7": (upstream.host, upstream.port)})
        await expect(card.get_by_text("running", exact=True)).to_be_visible()
        await expect(card.get_by_role("code")).to_have_count(0)


async def test_what_is_in_a_gpu_is_a_picture_with_words(opened: Opened) -> None:
    parts = {"weights": 16.1, "kv_cache": 50.2, "graphs": 1.2, "other": 0.0}
    about = {"takes": ["chat"], "memory": {"gpu_gib": 80.0, "gpus": 2, "parts": parts}}
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        gateway.board.publish("m", {"r0": (upstream.host, upstream.port)}, 8192, about=about)
        page = await opened(gateway)
        await expect(page.get_by_text("Each of 2 GPUs, 80.0 GiB")).to_be_visible()
        words = "weights 16.1 GiB, kv cache 50.2 GiB, graphs 1.2 GiB"
        picture = page.get_by_role("img", name=f"Memory of 80.0 GiB: {words}", exact=True)
        widths = await picture.locator("rect").evaluate_all(
            "all => all.map(it => it.width.baseVal.value)"
        )
        whole, *shares = widths
        assert [round(80 * it / whole, 1) for it in shares] == [16.1, 50.2, 1.2]


async def test_one_that_sleeps_says_how_to_wake_it(opened: Opened) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        gateway.board.report("r0", Load(0, 0, 8, kv_cache_usage=0.0, asleep=True))
        page = await opened(gateway)
        card = page.get_by_role("article", name="m", exact=True)
        await expect(card.locator(".state")).to_have_text("asleep")
        await expect(card.get_by_role("code")).to_have_text("serve-app admin m wake")


async def test_one_without_replicas_is_scaled_to_zero(opened: Opened) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        gateway.board.forget("m")
        page = await opened(gateway)
        card = page.get_by_role("article", name="m", exact=True)
        await expect(card.locator(".state")).to_have_text("scaled to zero")
        gateway.board.publish("m", {"r1": (upstream.host, upstream.port)})
        await expect(card.locator(".state")).to_have_text("running")


async def test_a_model_that_is_removed_goes_from_the_page(opened: Opened) -> None:
    applications = {"m": reported(), "old": reported()}
    async with (
        Upstream() as upstream,
        GatewayProcess(upstream, applications=applications) as gateway,
    ):
        page = await opened(gateway)
        await expect(page.get_by_role("article")).to_have_count(2)
        gateway.directory.hear({"m": reported()})
        await expect(page.get_by_role("article")).to_have_count(1)


async def test_what_a_person_folds_stays_so_while_the_numbers_change(opened: Opened) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        gateway.board.report("r0", Load(3, 0, 8, kv_cache_usage=0.4))
        page = await opened(gateway)
        fold = page.get_by_role("article").get_by_text("1 replica")
        row = page.get_by_role("rowheader", name="r0")
        await expect(row).to_be_visible()
        await fold.click()
        await expect(row).to_be_hidden()
        gateway.board.report("r0", Load(5, 0, 8, kv_cache_usage=0.4))
        await expect(page.get_by_text("5 of 8")).to_be_visible()
        await expect(row).to_be_hidden()


async def test_a_gateway_that_cannot_be_reached_is_told_and_found_again(opened: Opened) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        page = await opened(gateway)
        await expect(page.get_by_role("article")).to_have_count(1)
        await page.context.set_offline(True)
        await expect(page.get_by_text("The gateway cannot be reached.")).to_be_visible()
        await expect(page.get_by_role("article")).to_have_count(1)
        await page.context.set_offline(False)
        await expect(page.get_by_text("The gateway cannot be reached.")).to_be_hidden()


async def test_it_works_below_a_prefix(opened: Opened) -> None:
    """As behind a proxy that takes the prefix off before it passes a request on."""

    async def passed_on(route: Route) -> None:
        await route.continue_(url=route.request.url.replace("/llm/", "/"))

    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await page.route("**/llm/**", passed_on)
        await page.goto(f"{gateway.base_url}/llm/#chat")
        await ask(page, "Hello?")
        await expect(page.get_by_text("Hello.")).to_be_visible()
        await page.get_by_text("As code").click()
        address = f"{gateway.base_url}/llm/v1"
        await expect(page.get_by_text(f"{address}/chat/completions").first).to_be_visible()


async def test_it_works_below_a_prefix_without_a_slash_at_its_end(opened: Opened) -> None:
    """The proxy that takes the prefix off says which one it was."""
    outside: list[str] = []

    async def passed_on(route: Route) -> None:
        path = urlsplit(route.request.url).path
        if not path.startswith("/llm"):
            outside.append(path)
        url = f"{gateway.base_url}/{path.removeprefix('/llm').lstrip('/')}"
        headers = route.request.headers | {"x-forwarded-prefix": "/llm"}
        await route.continue_(url=url, headers=headers)

    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway)
        await expect(page.get_by_role("article")).to_have_count(1)
        await page.route("**", passed_on)
        page.on("framenavigated", lambda frame: outside.clear())  # what the page before asked
        await page.goto(f"{gateway.base_url}/llm")
        await expect(page.get_by_role("article")).to_have_count(1)
        await page.get_by_role("link", name="Chat", exact=True).click()
        await ask(page, "Hello?")
        await expect(page.get_by_text("Hello.")).to_be_visible()
        assert urlsplit(page.url).path == "/llm"
        assert outside == []


async def test_focus_stays_with_its_model_whatever_comes_before_it(opened: Opened) -> None:
    focused = "document.activeElement.closest('article')?.ariaLabel"
    two = {"a": reported(), "m": reported()}
    async with Upstream() as upstream, GatewayProcess(upstream, applications=two) as gateway:
        page = await opened(gateway)
        link = page.get_by_role("article", name="m", exact=True).get_by_text("Chat with it")
        await link.focus()
        gateway.directory.hear({"broken": failed(), **two})
        await expect(page.get_by_role("article")).to_have_count(3)
        assert await page.evaluate(focused) == "m"
        gateway.directory.hear({"m": {**reported(), "message": SENTENCE}})
        await expect(page.get_by_role("article")).to_have_count(1)
        await expect(link).to_be_focused()
        await page.context.set_offline(True)
        await expect(page.get_by_text("The gateway cannot be reached.")).to_be_visible()
        await expect(link).to_be_focused()
        await page.context.set_offline(False)
        await expect(page.get_by_text("The gateway cannot be reached.")).to_be_hidden()
        await expect(link).to_be_focused()

"""The page on a bad day of gateway, proxy, browser or key, and with names that nobody likes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Opened
from harness.browser import ask
from harness.scripted import GatewayProcess, reported, until
from playwright.async_api import Route, expect
from scripted_model import Model
from test_page_chat import answers
from test_page_keys import TEAM, give
from test_page_looks import PHONE, VIEWS
from test_page_pace import Watched

LATER = "Too many requests; come again in 40 s."

ROUTES = {
    "fleet": "**/fleet",
    "chat": "**/v1/chat/completions",
    "try": "**/tokenize",
    "charts": "**/metrics",
    "usage": "**/v1/usage?*",
}


async def too_many(route: Route) -> None:
    error = {"error": {"message": LATER, "code": "rate_limit_exceeded"}}
    await route.fulfill(status=429, headers={"retry-after": "40"}, json=error)


async def login(route: Route) -> None:
    """What a proxy answers to whoever has to log in."""
    await route.fulfill(body="<!doctype html><form>Who are you?</form>", content_type="text/html")


@pytest.mark.parametrize("answer", [too_many, login])
async def test_each_view_says_what_came_instead_of_an_answer(opened: Opened, answer: Any) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        select = page.get_by_role("combobox", name="Model", exact=True)
        await expect(select).to_have_value("m")
        for view in VIEWS:
            if view == "charts" and answer is login:
                continue  # any text without samples is a page of metrics
            await page.route(ROUTES[view], answer)
            await page.get_by_role("link", name=view.title(), exact=True).click()
            shown = page.locator(f"#view-{view}")
            if view == "chat":
                await ask(page, "Hello?")
            elif view == "try":
                part = shown.get_by_role("region", name="Tokenize")
                await part.get_by_role("button", name="Try").click()
            said = shown.get_by_role("alert")
            await expect(said).to_contain_text(
                LATER if answer is too_many else "no JSON" if view != "chat" else "broke off"
            )
            await page.unroute(ROUTES[view], answer)


async def test_it_comes_again_when_it_was_told_to(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        watched = Watched(await opened(gateway))
        await watched.begin()
        asked: list[Route] = []

        async def answer(route: Route) -> None:
            asked.append(route)
            await too_many(route)

        await watched.page.route("**/fleet", answer)
        await watched.asked_within(5)
        assert len(asked) == 1
        await watched.asked_within(30)
        assert len(asked) == 1
        await watched.asked_within(15)
        assert len(asked) == 2


async def test_a_browser_that_keeps_nothing_shows_it_all_the_same(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway)
        await page.add_init_script(
            "Object.defineProperty(window, 'sessionStorage',"
            " { get() { throw new DOMException('denied', 'SecurityError'); } })"
        )
        await page.reload()
        await page.get_by_role("link", name="Chat", exact=True).click()
        await ask(page, "Hello?")
        await expect(answers(page)).to_have_count(1)
        await page.get_by_role("button", name="Key").click()
        await give(page, TEAM[0], keep=True)
        await page.get_by_role("link", name="Fleet").click()
        await expect(page.get_by_role("article")).to_have_count(1)


async def test_a_key_whose_rights_go_meanwhile(opened: Opened, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"

    def write(**rights: Any) -> None:
        file.write_text(yaml.safe_dump([{"name": "team", "hash": TEAM[1], **rights}]))

    write(models=["m"])
    applications = {"m": reported(), "other": reported()}
    keys = {"file": str(file)}
    async with Model() as model, GatewayProcess(model, applications=applications, keys=keys) as it:
        page = await opened(it, "chat/m")
        await give(page, TEAM[0])
        await ask(page, "Hello?")
        await expect(answers(page)).to_have_count(1)
        write(models=["other"])
        it.app._keyring.refresh()
        await page.get_by_role("link", name="Fleet").click()
        await expect(page.get_by_role("article", name="other")).to_be_visible()
        await expect(page.get_by_role("article", name="m", exact=True)).to_have_count(0)
        await page.get_by_role("link", name="Chat", exact=True).click()
        select = page.get_by_role("combobox", name="Model", exact=True)
        await expect(select.locator("option:checked")).to_have_text("m (not here now)")
        await ask(page, "Still?")
        await expect(answers(page).get_by_role("alert")).to_be_visible()
        file.write_text("[]")
        it.app._keyring.refresh()
        await page.get_by_role("link", name="Fleet").click()
        await expect(page.get_by_role("dialog", name="API key")).to_be_visible()
        await expect(page.get_by_role("article")).to_have_count(0)


HORRID = [
    '<img src=x onerror="document.title=1">',
    "\N{RIGHT-TO-LEFT OVERRIDE}lamrofni \N{RIGHT-TO-LEFT MARK}m",
    "long-" * 60,
    "a/b?c#d&e=f%20 \"'`${x}",
]


async def test_no_name_is_too_odd_for_any_view(opened: Opened) -> None:
    applications = {name: reported() for name in HORRID}
    async with Model() as model, GatewayProcess(model, applications=applications) as gateway:
        for name in HORRID:
            gateway.board.publish(name, {f"r-{name}": (model.host, model.port)}, 8192)
        page = await opened(gateway, **PHONE)
        await expect(page.get_by_role("article")).to_have_count(len(HORRID))
        assert sorted(await page.get_by_role("heading", level=2).all_inner_texts()) == sorted(
            HORRID
        )
        for name in HORRID:
            await page.get_by_role("link", name="Fleet").click()
            card = page.get_by_role("article").filter(has=page.get_by_text(name, exact=True))
            await card.get_by_role("link", name="Chat with it").click()
            select = page.get_by_role("combobox", name="Model", exact=True)
            await expect(select).to_have_value(name)
        await ask(page, "Hello?")
        await expect(answers(page)).to_have_count(1)
        await page.get_by_text("As code").click()
        for view in VIEWS:
            await page.get_by_role("link", name=view.title(), exact=True).click()
            await expect(page.locator(f"#view-{view} > *").first).to_be_visible()
            width = await page.evaluate("document.documentElement.scrollWidth")
            assert width == 390, view
        assert await page.locator("main img").count() == 0
        assert "serve_app" in await page.title()


async def test_a_long_answer_is_no_wider_than_a_phone(opened: Opened) -> None:
    code = f"```\n{'x' * 5000}\n```\n"
    text = f"{'w' * 100_000}\n\n{code}\n\n\N{RIGHT-TO-LEFT OVERRIDE}{'שלום ' * 10_000}\n\nEnd."
    deltas = [{"content": text[at : at + 5000]} for at in range(0, len(text), 5000)]
    async with Model(deltas) as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat", **PHONE)
        await ask(page, "Hello?")
        await expect(answers(page)).to_have_count(1)
        await expect(page.get_by_text("End.", exact=True)).to_be_visible()
        assert await page.evaluate("document.documentElement.scrollWidth") == 390
        end = page.get_by_text("End.", exact=True)
        box = await end.bounding_box()
        assert box and box["x"] < 60
        await page.reload()
        await expect(answers(page).get_by_text("End.", exact=True)).to_be_visible()


async def test_by_keyboard_alone_a_conversation_goes_on(opened: Opened) -> None:
    async with Model([{"content": "One"}, {"content": " two"}]) as model:
        model.hold_after = 1
        async with GatewayProcess(model) as gateway:
            page = await opened(gateway, "chat")
            message = page.get_by_role("textbox", name="Message", exact=True)
            await ask(page, "Count.")
            await expect(page.get_by_text("One", exact=True)).to_be_visible()
            await expect(message).to_be_focused()
            while not await page.get_by_role("button", name="Stop").evaluate(
                "it => it === document.activeElement"
            ):
                await page.keyboard.press("Tab")
            await page.keyboard.press("Enter")
            await expect(answers(page)).to_have_count(1)
            await expect(message).to_be_focused()
            model.hold_after = None
            await page.get_by_role("button", name="Regenerate").focus()
            await page.keyboard.press("Enter")
            await expect(page.get_by_text("One two")).to_be_visible()
            await expect(message).to_be_focused()


@pytest.fixture
def held_port() -> Iterator[int]:
    """A port that nobody else gets while no gateway has it."""
    with socket.socket(proto=socket.IPPROTO_TCP) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


async def test_a_gateway_that_begins_anew_is_found_by_the_page_and_its_other_views(
    opened: Opened, held_port: int
) -> None:
    async with Model() as model:
        async with GatewayProcess(model, port=held_port) as gateway:
            page = await opened(gateway)
            await expect(page.get_by_role("article")).to_have_count(1)
            # Not wait_for_function, which asks by eval: the page's policy forbids that.
            await page.evaluate(
                """async () => {
                  const loaded = it => it.name.endsWith("/stream.js");
                  while (!performance.getEntriesByType("resource").some(loaded))
                    await new Promise(later => setTimeout(later, 20));
                }"""
            )
        await expect(page.get_by_text("The gateway cannot be reached.")).to_be_visible()
        await page.get_by_role("link", name="Try").click()  # its file is there already
        await expect(page.get_by_role("region", name="Tokenize")).to_be_visible()
        async with GatewayProcess(model, port=held_port):
            await page.get_by_role("link", name="Fleet").click()
            await expect(page.get_by_text("The gateway cannot be reached.")).to_be_hidden()
            await page.get_by_role("link", name="Chat", exact=True).click()
            await ask(page, "Hello?")
            await expect(answers(page)).to_have_count(1)


async def test_more_texts_than_a_picture_can_show_are_refused(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "try")
        part = page.get_by_role("region", name="Embeddings")
        await part.get_by_label("Texts").fill("\n".join(["a cat"] * 41))
        await part.get_by_role("button", name="Try").click()
        await expect(part.get_by_role("alert")).to_contain_text("41 texts")
        assert not model.exchanges
        await part.get_by_label("Texts").fill("\n".join(["a cat"] * 40))
        await part.get_by_role("button", name="Try").click()
        await expect(part.get_by_role("img")).to_be_visible()


async def test_two_tabs_have_conversations_of_their_own(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        one = await opened(gateway, "chat")
        await ask(one, "Hello?")
        await expect(answers(one)).to_have_count(1)
        other = await one.context.new_page()
        await other.goto(f"{gateway.base_url}/#chat")
        await expect(other.get_by_role("button", name="Send")).to_be_enabled()
        await expect(answers(other)).to_have_count(0)
        await ask(other, "Who?")
        await expect(answers(other)).to_have_count(1)
        await one.reload()
        await expect(one.get_by_text("Hello?")).to_be_visible()
        await expect(one.get_by_text("Who?")).to_have_count(0)
        assert await until(lambda: len(model.chats) == 2)

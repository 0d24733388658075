"""How the page looks: on a phone, in the dark, to a keyboard, to a screen reader; its size."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import Opened
from fleet_of_examples import example
from harness.browser import AXE_ABSENT, ask, axe
from harness.scripted import GatewayProcess, until
from PIL import Image
from playwright.async_api import Page, expect
from scripted_model import Model

from serve_app.gateway.static import FOLDER

VIEWS = ("fleet", "chat", "try", "charts", "usage")
PHONE: Any = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


async def fill(page: Page, view: str) -> None:
    """Have each view show what it can."""
    await page.get_by_role("link", name=view.title(), exact=True).click()
    if view == "chat":
        await ask(page, "Which planets have rings?")
        await expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
        await page.get_by_text("As code").click()
    elif view == "try":
        for part in ("Embeddings", "Rerank", "Tokenize"):
            region = page.get_by_role("region", name=part)
            await region.get_by_role("button", name="Try").click()
            await expect(region.get_by_text("As code")).to_be_visible()
    elif view == "charts":
        await expect(page.get_by_text("waiting in vLLM")).to_be_visible()
    elif view == "usage":
        await expect(page.get_by_role("alert")).to_be_visible()


async def test_on_a_phone_nothing_is_wider_than_the_screen(opened: Opened) -> None:
    async with example() as it:
        page = await opened(it.gateway, **PHONE)
        for view in VIEWS:
            await fill(page, view)
            width = await page.evaluate("document.documentElement.scrollWidth")
            assert width == 390, view


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing(opened: Opened, scheme: Any) -> None:
    script = await asyncio.to_thread(axe)
    if script is None:
        pytest.skip(AXE_ABSENT)
    async with example() as it:
        page = await opened(it.gateway, color_scheme=scheme, reduced_motion="reduce")
        await page.evaluate(script)
        for view in VIEWS:
            await fill(page, view)
            found = await page.evaluate("axe.run()")
            said = [
                (one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]
            ]
            assert said == [], view


async def test_dark_and_light_differ(opened: Opened) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    async with Model() as model, GatewayProcess(model) as gateway:
        light, dark = [
            await (await opened(gateway, color_scheme=scheme)).evaluate(back)
            for scheme in ("light", "dark")
        ]
    assert _brightness(light) > 600 and _brightness(dark) < 120


def _brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


async def test_a_keyboard_reaches_everything_and_shows_where_it_is(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway)
        await expect(page.get_by_role("article")).to_have_count(1)
        reached = []
        for _ in range(9):
            await page.keyboard.press("Tab")
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            name = await page.evaluate("document.activeElement.textContent.trim()")
            if name and await page.evaluate("document.activeElement !== document.body"):
                assert await page.evaluate(outline) != "none", name
                reached.append(name)
        assert reached[:6] == ["Fleet", "Chat", "Try", "Charts", "Usage", "Key"]
        assert "Chat with it" in reached


async def test_with_less_motion_nothing_moves(opened: Opened) -> None:
    async with example() as it:
        page = await opened(it.gateway, reduced_motion="reduce")
        await expect(page.get_by_role("article").first).to_be_visible()
        assert await page.evaluate("document.getAnimations().length") == 0


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 100_000


async def test_the_fleet_waits_for_no_other_view_s_files(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway)
        await page.route("**/fleet", lambda route: None)  # no answer yet
        asked: list[str] = []
        page.on("request", lambda request: asked.append(urlsplit(request.url).path))
        page.on("framenavigated", lambda frame: asked.clear())
        await page.reload()
        assert await until(lambda: "/fleet" in asked)
        others = {f"/-/page/{name}.js" for name in ("chat", "tryout", "charts", "usage")}
        assert not others & set(asked)
        await page.unroute("**/fleet")
        await page.reload()
        assert await until(lambda: others <= set(asked))


async def test_a_view_that_cannot_be_fetched_says_so(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway)
        await page.route("**/usage.js", lambda route: route.abort())
        await page.reload()
        await expect(page.get_by_role("article")).to_have_count(1)
        await page.get_by_role("link", name="Usage").click()
        await expect(page.get_by_text("reload the page")).to_be_visible()
        await page.get_by_role("link", name="Try").click()
        await expect(page.get_by_role("region", name="Tokenize")).to_be_visible()


async def test_it_asks_nobody_else(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for view in VIEWS:
            await page.get_by_role("link", name=view.title(), exact=True).click()
        await page.reload()
        await expect(page.get_by_role("heading", name="serve_app")).to_be_visible()
        assert asked and all(url.startswith(gateway.base_url) for url in asked)


async def test_its_pictures(opened: Opened, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Those of README and docs, which ``pytest --screenshots docs/page`` writes."""
    folder = request.config.getoption("--screenshots") or tmp_path
    async with example() as it:
        size: Any = {"width": 1200, "height": 900}
        page = await opened(it.gateway, viewport=size, reduced_motion="reduce")
        for view in ("fleet", "chat", "try", "charts"):
            if (
                view == "charts"
            ):  # points as this tab would have kept them, instead of an hour's wait
                kept = json.dumps(json.dumps(it.hour()))
                await page.add_init_script(f"sessionStorage['serve_app.charts'] = {kept}")
                await page.reload()
            await fill(page, view)
            await page.evaluate("scrollTo(0, 0)")
            await asyncio.to_thread(_save, await page.screenshot(), folder / f"{view}.png")
        page = await opened(it.gateway, color_scheme="dark", viewport=size, reduced_motion="reduce")
        await expect(page.get_by_role("article").first).to_be_visible()
        await asyncio.to_thread(_save, await page.screenshot(), folder / "fleet-dark.png")
    for file in folder.glob("*.png"):
        assert 5_000 < file.stat().st_size < 150_000, file.name


def _save(picture: bytes, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(200, dither=Image.Dither.NONE).save(file, optimize=True)

"""The page where there are keys: none, a wrong one, one without rights, an admin's."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from conftest import Opened
from harness.scripted import GatewayProcess, reported
from playwright.async_api import Page, expect
from scripted_model import Model

from serve_app.config import keys

TEAM, BOSS = keys.new(), keys.new()
MODELS = {"m": reported(), "secret": reported()}


@pytest.fixture
def key_file(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "keys.yaml"
    entries = [
        {"name": "team", "hash": TEAM[1], "models": ["m"]},
        {"name": "boss", "hash": BOSS[1], "admin": True},
    ]
    file.write_text(yaml.safe_dump(entries))
    return {"file": str(file)}


async def give(page: Page, key: str, keep: bool = False) -> None:
    dialog = page.get_by_role("dialog", name="API key")
    await dialog.get_by_label("Key", exact=True).fill(key)
    await dialog.get_by_label("Keep it").set_checked(keep)
    await dialog.get_by_role("button", name="Use it").click()


async def test_without_a_key_it_asks_for_one_and_says_what_is_wrong_with_it(
    opened: Opened, key_file: dict[str, str]
) -> None:
    async with Model() as model, GatewayProcess(model, keys=key_file) as gateway:
        page = await opened(gateway)
        dialog = page.get_by_role("dialog", name="API key")
        await expect(dialog.get_by_text("You must provide an API key")).to_be_visible()
        await give(page, "sk-wrong")
        await expect(dialog.get_by_text("The API key is not known here")).to_be_visible()
        await give(page, TEAM[0])
        await expect(dialog).to_be_hidden()
        await expect(page.get_by_role("article", name="m", exact=True)).to_be_visible()


async def test_a_key_that_is_not_given_is_not_asked_for_again_and_again(
    opened: Opened, key_file: dict[str, str]
) -> None:
    async with Model() as model, GatewayProcess(model, keys=key_file) as gateway:
        page = await opened(gateway)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(urlsplit(request.url).path))
        dialog = page.get_by_role("dialog", name="API key")
        await dialog.get_by_role("button", name="Cancel").click()
        await expect(page.get_by_role("alert")).to_contain_text("You must provide an API key")
        await page.get_by_role("link", name="Chat").click()
        await page.get_by_role("link", name="Fleet").click()
        await expect(dialog).to_be_hidden()
        assert [it for it in asked if not it.startswith("/-/page/")] == []
        await page.get_by_role("button", name="Key").click()
        await give(page, TEAM[0])
        await expect(page.get_by_role("article", name="m", exact=True)).to_be_visible()


async def test_a_key_sees_its_models_alone_and_is_told_what_it_may_not(
    opened: Opened, key_file: dict[str, str]
) -> None:
    async with (
        Model() as model,
        GatewayProcess(model, applications=MODELS, keys=key_file) as gateway,
    ):
        page = await opened(gateway)
        await give(page, TEAM[0])
        await expect(page.get_by_role("article")).to_have_count(1)
        await page.get_by_role("link", name="Charts").click()
        refusal = await gateway.client.get(
            "/metrics", headers={"authorization": f"Bearer {TEAM[0]}"}
        )
        assert refusal.status_code == 403
        said = page.get_by_role("alert").get_by_text(refusal.json()["error"]["message"])
        await expect(said).to_be_visible()

        await page.get_by_role("button", name="Change key").click()
        await give(page, BOSS[0])
        await expect(said).to_be_hidden()
        await page.get_by_role("link", name="Fleet").click()
        await expect(page.get_by_role("article")).to_have_count(2)


async def test_a_key_is_in_memory_alone_unless_it_shall_be_kept(
    opened: Opened, key_file: dict[str, str]
) -> None:
    stored = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
    async with Model() as model, GatewayProcess(model, keys=key_file) as gateway:
        page = await opened(gateway)
        await give(page, TEAM[0])
        await expect(page.get_by_role("article")).to_have_count(1)
        assert TEAM[0] not in await page.evaluate(stored)
        await page.reload()
        await give(page, TEAM[0], keep=True)
        await expect(page.get_by_role("article")).to_have_count(1)
        assert await page.evaluate("localStorage.length") == 0
        await page.reload()
        await expect(page.get_by_role("article")).to_have_count(1)
        await page.get_by_role("button", name="Change key").click()
        await page.get_by_role("button", name="Forget the key").click()
        await expect(page.get_by_text("You must provide an API key").first).to_be_visible()
        assert TEAM[0] not in await page.evaluate(stored)
        assert all(TEAM[0] not in it.target for it in model.exchanges)


async def test_a_key_that_no_header_can_have_is_told_in_a_sentence(
    opened: Opened, key_file: dict[str, str]
) -> None:
    async with Model() as model, GatewayProcess(model, keys=key_file) as gateway:
        page = await opened(gateway)
        await give(page, f"{TEAM[0]}\N{ZERO WIDTH SPACE}")
        dialog = page.get_by_role("dialog", name="API key")
        await expect(dialog.get_by_text("copy it again")).to_be_visible()

"""Usage as a table, and as a file."""

from __future__ import annotations

import asyncio
import csv
import io
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from conftest import Opened
from harness.scripted import GatewayProcess, reported, took, until
from playwright.async_api import Page, Route, expect
from scripted_model import Model
from test_page_keys import give

from serve_app.cluster.exchange import Usage
from serve_app.config import keys
from serve_app.config.document import USAGE_DB
from serve_app.gateway.usage import ship

TEAM, BOSS = keys.new(), keys.new()
CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "INTERVAL_S", 0.02)
    monkeypatch.delenv(USAGE_DB, raising=False)


async def test_usage_is_a_table_and_a_file_of_what_the_key_may_see(
    opened: Opened, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    entries = [
        {"name": "team", "hash": TEAM[1]},
        {"name": "boss", "hash": BOSS[1], "admin": True},
    ]
    file.write_text(yaml.safe_dump(entries))
    database = tmp_path / "usage.db"
    settings = {"keys": {"file": str(file)}, "usage_db": f"sqlite:///{database}"}
    async with Model() as model, GatewayProcess(model, **settings) as gateway:
        for key, usage in ((TEAM, Usage(1000, 400, 30)), (BOSS, Usage(7, 0, 3))):
            await gateway.client.post(
                CHAT, json={"model": "m"}, headers={"authorization": f"Bearer {key[0]}"}
            )
            (id,) = gateway.ledger._open
            gateway.ledger.report(took(id, usage), "r0")
        assert await until(lambda: _count(database) == 2)

        page = await opened(gateway, "usage")
        await give(page, TEAM[0])
        rows = page.locator(".usage tbody tr")
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        team = ["team", "m", today, "1", "0", "0", "1,000", "400", "30"]
        await expect(rows).to_have_count(1)
        assert await rows.locator("td").all_inner_texts() == team

        await page.get_by_role("button", name="Change key").click()
        await give(page, BOSS[0])
        await expect(rows).to_have_count(2)
        await page.get_by_role("checkbox", name="day").uncheck()
        await expect(page.get_by_role("columnheader", name="Day")).to_have_count(0)
        assert (await page.locator(".usage tfoot td").all_inner_texts())[3] == "1,007"

        async with page.expect_download() as downloading:
            await page.get_by_role("button", name="Save as CSV").click()
        download = await downloading.value
        assert download.suggested_filename == "usage.csv"
        text = await asyncio.to_thread((await download.path()).read_text)
        found = list(csv.DictReader(io.StringIO(text)))
        by_key = {row["key"]: row for row in found}
        assert by_key["team"]["prompt_tokens"] == "1000"
        assert by_key["boss"]["completion_tokens"] == "3"

        yesterday = f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"
        await page.get_by_label("To", exact=True).fill(yesterday)
        await expect(page.get_by_text("Nothing was used in these days.")).to_be_visible()


async def test_no_cell_of_the_file_is_a_formula(modules: Page) -> None:
    rows = '[{model: "=1+1", day: "a,\\"b"}]'
    text = await modules.evaluate(
        f"import('./-/page/usage.js').then((m) => m.csv({rows}, ['model', 'day']))"
    )
    (row,) = csv.DictReader(io.StringIO(text))
    assert (row["model"], row["day"]) == ("'=1+1", 'a,"b')


async def test_where_nothing_is_recorded_it_says_how_to(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model, applications={"m": reported()}) as gateway:
        page = await opened(gateway, "usage")
        await expect(page.get_by_role("alert")).to_contain_text("Usage is not recorded here")
        await expect(page.get_by_role("button", name="Save as CSV")).to_be_disabled()


def _count(database: Path) -> int:
    with sqlite3.connect(database) as connection:
        try:
            (count,) = connection.execute("select count(*) from serve_app_usage").fetchone()
        except sqlite3.OperationalError:
            return 0
    return int(count)


async def test_of_two_answers_the_one_to_the_later_question_counts(opened: Opened) -> None:
    held: list[Route] = []

    async def answer(route: Route) -> None:
        row = {"model": "m", "requests": 1, "refused": 0, "unreported": 0}
        row |= {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}
        if "key" not in parse_qs(urlsplit(route.request.url).query)["group_by"][0].split(","):
            await route.fulfill(json={"data": [row]})
        else:
            held.append(route)

    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway)
        await page.route("**/v1/usage?*", answer)
        await page.get_by_role("link", name="Usage").click()
        assert await until(lambda: held)
        await page.get_by_role("checkbox", name="key").uncheck()
        rows = page.locator(".usage tbody tr")
        await expect(rows).to_have_count(1)
        async with page.expect_response("**/v1/usage?*"):
            await held[0].fulfill(json={"data": []})
        await page.evaluate("new Promise((done) => setTimeout(done))")
        await expect(rows).to_have_count(1)


async def test_what_comes_for_a_key_that_was_forgotten_is_not_shown(opened: Opened) -> None:
    held: list[Route] = []

    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway)
        await page.route("**/v1/usage?*", lambda route: held.append(route))
        await page.get_by_role("link", name="Usage").click()
        assert await until(lambda: held)
        await page.get_by_role("link", name="Fleet").click()
        await page.get_by_role("button", name="Key").click()
        await give(page, TEAM[0])
        async with page.expect_response("**/v1/usage?*"):
            await held[0].fulfill(status=500, json={"error": {"message": "the other's"}})
        assert await until(lambda: len(held) == 2)
        await held[1].fulfill(json={"data": []})
        await page.get_by_role("link", name="Usage").click()
        assert await until(lambda: len(held) == 3)
        await expect(page.get_by_text("the other's")).to_have_count(0)
        await held[2].fulfill(json={"data": []})
        await expect(page.get_by_text("Nothing was used in these days.")).to_be_visible()

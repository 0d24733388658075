"""What becomes of each request's entry: rows in a database, lines in a folder, GET /v1/usage."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.scripted import GatewayProcess, Upstream, reported, took, until

from serve_app.cluster.exchange import Usage
from serve_app.config import keys
from serve_app.config.document import USAGE_DB
from serve_app.config.settings import GatewayConfig, parse
from serve_app.gateway.ledger import Entry
from serve_app.gateway.usage import ship
from serve_app.gateway.usage.database import MIGRATIONS, Database
from serve_app.gateway.usage.line import Line, encode, is_one
from serve_app.gateway.usage.record import Record
from serve_app.gateway.usage.report import report

CHAT = "/v1/chat/completions"
MODELS = {"m": reported({"served_as": ["org/m:1.0"]}), "asleep": reported({})}
SECRETS = {name: keys.new() for name in ("team-a", "team-b", "boss")}
NOTHING = {"requests": 0, "refused": 0, "unreported": 0}
NO_TOKENS = {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "INTERVAL_S", 0.02)
    monkeypatch.setattr(ship, "RETRY_S", 0.05)
    monkeypatch.delenv(USAGE_DB, raising=False)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/usage.db"


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    entries = [
        {"name": name, "hash": hash, "admin": name == "boss"} for name, (_, hash) in SECRETS.items()
    ]
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump(entries))
    return str(file)


def of(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRETS[name][0]}"}


async def chat(at: GatewayProcess, usage: Usage | None, model: str = "m", **more: Any) -> Any:
    """Ask, and report what the request took as its replica will."""
    answer = await at.client.post(CHAT, json={"model": model, "messages": "hush"}, **more)
    for id in list(at.ledger._open):
        if usage:
            at.ledger.report(took(id, usage), "r0")
        else:
            at.ledger._give_up(id)
    return answer


async def rows(at: GatewayProcess, query: str = "", **more: Any) -> list[dict[str, Any]]:
    answer = await at.client.get(f"/v1/usage{query}", **more)
    assert answer.status_code == 200, answer.text
    assert answer.json()["object"] == "list"
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def in_database(at: GatewayProcess, count: int) -> None:
    """Wait until the database has so many requests."""
    deadline = asyncio.get_running_loop().time() + 20
    while True:
        (total,) = await rows(at, headers=of("boss"))
        if total["requests"] + total["refused"] == count:
            return
        assert asyncio.get_running_loop().time() < deadline, total
        await asyncio.sleep(0.05)


async def test_a_key_sees_its_own_and_an_admin_all(url: str, key_file: str) -> None:
    settings: Any = {"keys": {"file": key_file}, "usage_db": url, "cold_start_timeout_s": 0}
    async with (
        Upstream() as upstream,
        GatewayProcess(upstream, applications=MODELS, **settings) as at,
    ):
        await chat(at, Usage(10, 4, 3), headers=of("team-a"))
        await chat(at, Usage(100, 0, 30), model="org/m:1.0", headers=of("team-a"))
        await chat(at, Usage(1000, 400, 300), headers=of("team-b"))
        await chat(at, None, headers=of("team-b"))
        refused = await chat(at, None, model="asleep", headers=of("team-b"))
        assert refused.status_code == 503
        await in_database(at, 5)
        a = {**NOTHING, "requests": 2, "prompt_tokens": 110, "cached_tokens": 4}
        a |= {"completion_tokens": 33}
        b = {**NOTHING, "requests": 2, "unreported": 1, "prompt_tokens": 1000}
        b |= {"cached_tokens": 400, "completion_tokens": 300}
        cold = {**NOTHING, **NO_TOKENS, "refused": 1}
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        assert await rows(at, headers=of("team-a")) == [a]
        assert await rows(at, "?group_by=key,model", headers=of("team-a")) == [
            {"key": "team-a", "model": "m", **a}
        ]
        assert await rows(at, "?group_by=key,model,day", headers=of("boss")) == [
            {"key": "team-a", "model": "m", "day": today, **a},
            {"key": "team-b", "model": "asleep", "day": today, **cold},
            {"key": "team-b", "model": "m", "day": today, **b},
        ]
        assert [
            (row["model_id"], row["requests"])
            for row in await rows(at, "?group_by=model_id", headers=of("team-a"))
        ] == [("m", 1), ("org/m:1.0", 1)]
        assert (await at.client.get("/v1/usage")).status_code == 401
        assert await rows(at, f"?from={today}&to={today}", headers=of("team-a")) == [a]
        tomorrow = f"{datetime.now(UTC) + timedelta(days=1):%Y-%m-%d}"
        assert await rows(at, f"?from={tomorrow}&to={tomorrow}", headers=of("team-a")) == [
            {**NOTHING, **NO_TOKENS}
        ]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("form=2026-11-01", "'form' is not a parameter of /v1/usage; did you mean 'from'?"),
        ("from=yesterday", "'from' is 'yesterday', but must be a day such as 2026-11-30"),
        ("to=9999-12-31", "'to' is '9999-12-31', but must be a day"),
        ("from=0001-01-01T00:00:00%2B14:00", "'from' is '0001-01-01T00:00:00+14:00', but must be"),
        ("from=2026-11-02&to=2026-11-01", "'from' must lie before 'to'."),
        ("group_by=user", "'group_by' has 'user', but can have key, model, model_id, day"),
        ("group_by=key;drop", "'group_by' has 'key;drop', but can have"),
    ],
)
async def test_a_wrong_parameter_is_named(url: str, query: str, said: str) -> None:
    async with GatewayProcess(usage_db=url) as at:
        answer = await at.client.get(f"/v1/usage?{query}")
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(said)


async def test_the_earliest_and_the_latest_moment(url: str) -> None:
    async with GatewayProcess(usage_db=url) as at:
        for query in ("?to=0001-01-02", "?from=0001-01-01&to=9999-12-30", "?to=2026-01-01T00:00Z"):
            assert await rows(at, query) == [{**NOTHING, **NO_TOKENS}]


async def test_without_a_database_it_tells_which_setting_to_add(tmp_path: Path) -> None:
    for config in ({}, {"usage_dir": str(tmp_path)}):
        async with GatewayProcess(**config) as at:
            answer = await at.client.get("/v1/usage")
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                404,
                "usage_not_recorded",
            )
            assert "usage_db: sqlite:////" in answer.json()["error"]["message"]


def all_text(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.iterdir()))


async def test_usage_dir_has_a_line_of_each_request_and_no_prompt(tmp_path: Path) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream, usage_dir=str(tmp_path)) as at:
        await chat(at, Usage(10, 4, 3), headers={"x-request-id": "mine"})
        await chat(at, None)
        text = await asyncio.to_thread(all_text, tmp_path)
        first, second = map(json.loads, text.splitlines())
        assert (
            first.items()
            >= {
                "request_id": "mine",
                "key": "",
                "model": "m",
                "model_id": "m",
                "path": CHAT,
                "replica": "r0",
                "status": 200,
                "outcome": "answered",
                "prompt_tokens": 10,
                "cached_tokens": 4,
                "completion_tokens": 3,
            }.items()
        )
        assert second["prompt_tokens"] is None
        assert first["id"] != second["id"]
        assert "hush" not in text


async def test_while_the_database_is_away_requests_wait_on_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here a folder that is not one; the next process ships what this one has left."""
    away = tmp_path / "away"
    away.write_text("")
    settings: Any = {
        "usage_db": f"sqlite:///{away}/usage.db",
        "usage_spool": str(tmp_path / "spool"),
    }
    async with Upstream() as upstream:
        async with GatewayProcess(upstream, **settings) as at:
            with caplog.at_level(logging.ERROR, "ray.serve"):
                for _ in range(3):
                    await chat(at, Usage(10, 4, 3))
                assert await until(lambda: at.record.problem)
            ready = (await at.client.get("/ready")).json()
            assert ready["status"] == "ready"
            assert ready["usage"].startswith("usage_db has not been written since ")
            assert str(tmp_path / "spool") in ready["usage"]
            assert sum("usage_db has not been written" in m for m in caplog.messages) == 1
            answer = await at.client.get("/v1/usage")
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                503,
                "usage_unavailable",
            )
        away.unlink()
        async with GatewayProcess(upstream, **settings) as at:
            await chat(at, Usage(1, 0, 1))
            await in_database(at, 4)
            (total,) = await rows(at)
            assert total["prompt_tokens"] == 31
            assert await until(lambda: not at.record.problem)
            assert "usage" not in (await at.client.get("/ready")).json()
    assert await asyncio.to_thread(all_text, tmp_path / "spool") == ""


def line(id: str = "1" * 32) -> bytes:
    fields: dict[str, Any] = {
        "id": id, "request_id": "r", "key": "k", "model": "m", "model_id": "m", "path": CHAT,
        "replica": "r0", "end": "answered", "status": 200, "arrived": 1_700_000_000.25,
        "queued_s": 0.0, "first_byte_s": None, "duration_s": 1.0, "retries": 0,
        "usage": Usage(10, 4, 3),
    }  # fmt: skip
    return encode(Entry(**fields))


def test_a_request_that_comes_twice_counts_once(url: str) -> None:
    database = Database(url)
    database.insert([line(), line("2" * 32)])
    database.insert([line("2" * 32), line("3" * 32)])
    (total,) = database.totals(datetime(2020, 1, 1), datetime(2030, 1, 1), [], None)
    assert (total["requests"], total["prompt_tokens"]) == (3, 30)


def test_a_newer_schema_is_refused_and_left_as_it_is(url: str, tmp_path: Path) -> None:
    Database(url).prepare()
    with sqlite3.connect(tmp_path / "usage.db") as other:
        other.execute("UPDATE serve_app_usage_schema SET version = 99")
    other.close()
    with pytest.raises(Exception, match=f"schema is version 99, .* knows {len(MIGRATIONS)}; upgr"):
        Database(url).insert([line()])
    with sqlite3.connect(tmp_path / "usage.db") as other:
        assert other.execute("SELECT count(*) FROM serve_app_usage").fetchone() == (0,)
        assert other.execute("SELECT * FROM serve_app_usage_schema").fetchall() == [(99,)]
    other.close()


def test_a_file_that_was_deleted_is_made_anew(url: str, tmp_path: Path) -> None:
    database = Database(url)
    database.insert([line()])
    (tmp_path / "usage.db").unlink()
    with pytest.raises(Exception, match="no such table"):
        database.insert([line("2" * 32)])
    database.insert([line("2" * 32)])
    (total,) = database.totals(datetime(2020, 1, 1), datetime(2030, 1, 1), [], None)
    assert total["requests"] == 1


def test_a_line_of_an_older_version_is_still_one(url: str) -> None:
    """So an upgraded gateway ships what the old one has left."""
    old = (
        b'{"id":"a","request_id":"b","key":"k","model":"m","model_id":"m","path":"/v1/completions",'
        b'"replica":"r0","outcome":"answered","status":200,"day":"2026-11-27",'
        b'"arrived":"2026-11-27 06:40:00.500000","queued_s":0.1,"first_byte_s":0.2,'
        b'"duration_s":1.5,"retries":0,"prompt_tokens":1,"cached_tokens":0,"completion_tokens":2}'
    )
    assert is_one(old)
    database = Database(url)
    database.insert([old])
    (total,) = database.totals(
        datetime(2026, 11, 27, 6, 40), datetime(2026, 11, 27, 6, 41), ["day"], "k"
    )
    assert (str(total["day"]), total["completion_tokens"]) == ("2026-11-27", 2)


def test_a_line_has_the_columns_of_the_table(url: str, tmp_path: Path) -> None:
    Database(url).prepare()
    with sqlite3.connect(tmp_path / "usage.db") as other:
        columns = [row[1] for row in other.execute("PRAGMA table_info(serve_app_usage)")]
    other.close()
    assert tuple(columns) == Line.__struct_fields__


def test_a_line_that_cannot_be_read_is_kept_and_stops_no_other(url: str, tmp_path: Path) -> None:
    from serve_app.gateway.usage.journal import Journal

    database, folder = Database(url), tmp_path / "spool"
    spool = Journal(folder, max_file_bytes=1000, max_file_age_s=60)
    spool.append(b"what is this\n")
    spool.append(line())
    ship.Shipper(spool, database).ship()
    (total,) = database.totals(datetime(2020, 1, 1), datetime(2030, 1, 1), [], None)
    assert total["requests"] == 1
    (kept,) = folder.iterdir()
    assert kept.suffix == ".unread"
    assert kept.read_bytes().startswith(b"what is this\n")


async def test_a_spool_has_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What came first stays; what comes then is counted as not recorded, and no request fails."""
    monkeypatch.setattr(ship, "MOST_BYTES", 100)
    (tmp_path / "away").write_text("")
    url, spool = f"sqlite:///{tmp_path}/away/usage.db", tmp_path / "spool"
    async with (
        Upstream() as upstream,
        GatewayProcess(upstream, usage_db=url, usage_spool=str(spool)) as at,
    ):
        await chat(at, Usage(10, 4, 3))
        assert await until(lambda: at.record._shipper.is_full)
        before = await asyncio.to_thread(all_text, spool)
        with caplog.at_level(logging.ERROR, "ray.serve"):
            answer = await chat(at, Usage(10, 4, 3))
            said = "1 requests were not recorded so far"
            assert await until(lambda: said in caplog.text)
        assert answer.status_code == 200
        assert await asyncio.to_thread(all_text, spool) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"usage_db": {"secret_env": "NOT_SET"}}, "environment variable NOT_SET is not set"),
        ({"usage_dir": "/dev/null/x"}, "usage_dir: /dev/null/x cannot be written"),
    ],
)
async def test_a_record_that_cannot_be_kept_is_refused(settings: Any, said: str) -> None:
    with pytest.raises(keys.ConfigError, match=said):
        await GatewayProcess(**settings).__aenter__()


@pytest.mark.parametrize(
    "given",
    [
        "postgres//u:hidden@h/d",
        ["postgresql://u:hidden@h/d"],
        {"url": ["postgresql://u:hidden@h/d"]},
        {"url": {"is": "postgresql://u:hidden@h/d"}},
    ],
)
def test_what_may_have_a_password_is_not_repeated(given: Any) -> None:
    with pytest.raises(keys.ConfigError, match=r"usage_db\.url: must be sqlite:///FILE") as error:
        parse(GatewayConfig, {"usage_db": given}, "args")
    assert "hidden" not in str(error.value)


async def test_the_url_may_be_in_a_variable(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", url)
    async with GatewayProcess(usage_db={"secret_env": "OURS"}) as at:
        assert await rows(at) == [{**NOTHING, **NO_TOKENS}]
    monkeypatch.setenv(USAGE_DB, url)
    async with GatewayProcess() as at:
        assert await rows(at) == [{**NOTHING, **NO_TOKENS}]
    monkeypatch.setenv(USAGE_DB, "mysql://u:hidden@h/d")
    with pytest.raises(keys.ConfigError, match="SERVE_APP_USAGE_DB must be sqlite") as error:
        await GatewayProcess().__aenter__()
    assert "hidden" not in str(error.value)


async def test_more_rows_than_an_answer_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    class Many(Record):
        has_database = True

        async def totals(self, *asked: Any) -> list[dict[str, Any]]:
            return [{}] * 10_001

    with pytest.raises(Exception, match="more than 10000 rows; ask for a shorter time"):
        await report(Many(None, None, None), None, {})

"""The usage database is a real PostgreSQL: it goes away under load, and misses nothing after."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from harness import postgres
from harness.postgres import Postgres
from harness.scripted import GatewayProcess, Upstream, took, until

from serve_app.cluster.exchange import Usage
from serve_app.gateway.ledger import Entry
from serve_app.gateway.usage import ship
from serve_app.gateway.usage.database import Database
from serve_app.gateway.usage.line import encode

pytestmark = pytest.mark.skipif(
    postgres.programs() is None, reason="no PostgreSQL here; apt-get install postgresql"
)

ALL = (datetime(2020, 1, 1), datetime(2030, 1, 1))

WRITER = """
import sys, time
from serve_app.config.settings import GatewayConfig
from serve_app.cluster.exchange import Usage
from serve_app.gateway.ledger import Entry
from serve_app.gateway.usage import ship
from serve_app.gateway.usage.record import Record

ship.INTERVAL_S = ship.RETRY_S = 0.01
name, url, spool = sys.argv[1:]
record = Record.of(GatewayConfig(usage_db=url, usage_spool=spool))
for number in range(1_000_000):
    id = f"{name}-{number}"
    record.entered(Entry(id, "r", name, "m", "m", "/v1/completions", "r0", "answered", 200,
                         time.time(), 0.0, 0.1, 0.2, 0, Usage(3, 2, 1)))
    print(id, flush=True)  # after it was entered
    time.sleep(0.0005)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def database(server: Postgres) -> Iterator[Database]:
    engine = sa.create_engine(sa.make_url(server.url).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS serve_app_usage, serve_app_usage_schema")
    engine.dispose()
    database = Database(server.url)
    yield database
    database.close()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "INTERVAL_S", 0.02)
    monkeypatch.setattr(ship, "RETRY_S", 0.05)


async def test_requests_go_on_while_it_is_stopped_and_each_is_there_once(
    server: Postgres, database: Database, tmp_path: Path
) -> None:
    """Stopped in an orderly way, then killed, under load through the gateway."""
    async with Upstream() as upstream:
        gateway = GatewayProcess(upstream, usage_db=server.url, usage_spool=str(tmp_path))
        async with gateway as at:
            done, asked = asyncio.Event(), 0

            async def client() -> None:
                nonlocal asked
                while not done.is_set():
                    answer = await at.client.post("/v1/completions", json={"model": "m"})
                    assert answer.status_code == 200
                    asked += 1
                    for id in list(at.ledger._open):
                        at.ledger.report(took(id, Usage(5, 2, 1)), "r0")

            clients = [asyncio.create_task(client()) for _ in range(8)]
            for mode in ("fast", "immediate"):
                before = asked
                assert await until(lambda n=before: asked >= n + 50, 60)
                await asyncio.to_thread(server.stop, mode)
                before = asked
                assert await until(lambda n=before: asked >= n + 50 and at.record.problem, 60)
                answer = await at.client.get("/v1/usage")
                assert answer.json()["error"]["code"] == "usage_unavailable"
                await asyncio.to_thread(server.start)
            done.set()
            await asyncio.gather(*clients)
            assert await until(lambda: not at.record.problem, 60)
    (total,) = database.totals(*ALL, [], None)
    assert asked >= 200
    assert total == {
        "requests": asked,
        "refused": 0,
        "unreported": 0,
        "prompt_tokens": 5 * asked,
        "cached_tokens": 2 * asked,
        "completion_tokens": asked,
    }
    assert await asyncio.to_thread(os.listdir, tmp_path) == []


def test_killed_processes_leave_what_they_entered_to_the_next(
    server: Postgres, database: Database, tmp_path: Path
) -> None:
    """Two gateways of one machine, killed while they write and ship; the next ships the rest."""
    said: list[str] = []
    for round in range(3):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, f"{round}{name}", server.url, str(tmp_path)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in "ab"
        ]
        for writer in writers:
            assert writer.stdout
            said += [writer.stdout.readline().strip() for _ in range(500)]
        if round == 1:
            server.stop("immediate")
        for writer in writers:
            assert writer.stdout
            said += [writer.stdout.readline().strip() for _ in range(200)]
            writer.send_signal(signal.SIGKILL)
            said += writer.stdout.read().split("\n")[:-1]
            writer.wait()
            writer.stdout.close()
        if round == 1:
            server.start()
    journal = ship.Journal(tmp_path, max_file_bytes=2**20, max_file_age_s=60)
    ship.Shipper(journal, database).ship()
    engine = sa.create_engine(sa.make_url(server.url).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        ids = set(connection.scalars(sa.text("SELECT id FROM serve_app_usage")))
    engine.dispose()
    assert set(said) <= ids
    assert len(ids) <= len(said) + 6  # killed between its being entered and its being told
    for unnamed in tmp_path.glob(".*.new"):  # killed while it made the next file
        assert unnamed.stat().st_size == 0
        os.utime(unnamed, (0, 0))
    ship.Shipper(journal, database).ship()
    assert os.listdir(tmp_path) == []


def test_several_processes_may_make_the_schema_at_once(
    server: Postgres, database: Database
) -> None:
    errors: list[Exception] = []

    def prepare() -> None:
        one = Database(server.url)
        try:
            one.prepare()
        except Exception as error:
            errors.append(error)
        finally:
            one.close()

    threads = [threading.Thread(target=prepare) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [total["requests"] for total in database.totals(*ALL, [], None)] == [0]


def test_what_a_client_may_put_into_a_text(database: Database) -> None:
    said = "a\0b 'DROP TABLE\"; ☃ " + "long" * 200
    entry = Entry(
        "1", said, "k", "m", "m", said, "r0", "left", 499, 1.7e9, 0.0, None, 0.5, 0,
        Usage(2**40, 0, 0),
    )  # fmt: skip
    database.insert([encode(entry)])
    (total,) = database.totals(*ALL, ["day"], "k")
    assert str(total["day"]) == "2023-11-14"
    assert total["prompt_tokens"] == 2**40


async def test_a_wrong_password_is_told_and_not_repeated(server: Postgres, tmp_path: Path) -> None:
    url = server.url.replace("pass%2Fword", "hidden")
    async with GatewayProcess(usage_db=url, usage_spool=str(tmp_path)) as at:
        assert await until(lambda: at.record.problem)
        said = (await at.client.get("/ready")).json()["usage"]
        assert 'password authentication failed for user "tester"' in said
        assert "hidden" not in said

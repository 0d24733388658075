"""The access log: which requests get a line, and what it says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.scripted import GatewayProcess, Upstream, took, until

from serve_app.cluster.exchange import Usage
from serve_app.config import keys
from serve_app.config.settings import GatewayConfig
from serve_app.gateway import access_log
from serve_app.gateway.access_log import ACCESS_LOG, AccessLog

CHAT = "/v1/chat/completions"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(it) for file in folder.glob("*.log") for it in file.read_text().splitlines()]


async def test_a_request_is_a_line_without_its_text(tmp_path: Path) -> None:
    secret, hash = keys.new()
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump([{"name": "team-a", "hash": hash}]))
    log = AccessLog(tmp_path / "logs")
    async with (
        Upstream() as upstream,
        GatewayProcess(upstream, access_log=log, keys={"file": str(tmp_path / "keys.yaml")}) as at,
    ):
        bearer = {"authorization": f"Bearer {secret}"}
        body = {"model": "org/m:1.0", "messages": "hush"}
        await at.client.post(CHAT, json=body, headers={**bearer, "x-request-id": "mine"})
        for id in list(at.ledger._open):
            at.ledger.report(took(id, Usage(10, 4, 3)), "r0")
        assert await until(lambda: len(lines(tmp_path / "logs")) == 1)
        (line,) = lines(tmp_path / "logs")
        said = {k: line[k] for k in ("request_id", "key", "model", "model_id", "path", "replica")}
        assert said == {
            "request_id": "mine",
            "key": "team-a",
            "model": "m",
            "model_id": "org/m:1.0",
            "path": CHAT,
            "replica": "r0",
        }
        assert (line["outcome"], line["status"], line["retries"]) == ("answered", 200, 0)
        assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (
            10,
            4,
            3,
        )
        assert 0 <= line["queued_s"] <= line["first_byte_s"] <= line["duration_s"]
        (file,) = (tmp_path / "logs").glob("*.log")
        assert "hush" not in file.read_text() and secret not in file.read_text()


async def test_a_request_that_was_refused_before_a_model_was_known_is_one_too(
    tmp_path: Path,
) -> None:
    _, hash = keys.new()
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump([{"name": "team-a", "hash": hash}]))
    log = AccessLog(tmp_path / "logs")
    async with GatewayProcess(access_log=log, keys={"file": str(tmp_path / "keys.yaml")}) as at:
        assert (await at.client.post(CHAT, json={"model": "m"})).status_code == 401
        assert (await at.client.get("/health")).status_code == 200
        assert (await at.client.get(f"/{'x' * 5000}%0a%22")).status_code == 401
        assert await until(lambda: len(lines(tmp_path / "logs")) == 2)
        (first, second) = lines(tmp_path / "logs")
        assert (first["status"], first["outcome"], first["path"]) == (401, "refused", CHAT)
        assert len(second["path"]) == 200


async def test_the_id_of_a_stored_response_is_not_told(tmp_path: Path) -> None:
    async with (
        Upstream() as upstream,
        GatewayProcess(upstream, access_log=AccessLog(tmp_path)) as at,
    ):
        await at.client.get("/v1/responses/resp_secret?model=m")
        await at.client.post("/v1/responses/resp_secret/cancel?model=none")
        for id in list(at.ledger._open):
            at.ledger.report(took(id, Usage()), "r0")
    said = [line["path"] for line in lines(tmp_path)]
    assert sorted(said) == ["/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"]


async def test_a_full_disk_stops_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = AccessLog(tmp_path)
    (tmp_path / log._file.baseFilename).symlink_to("/dev/full")
    async with GatewayProcess(access_log=log) as at:
        assert (await at.client.post(CHAT, json={"model": "none"})).status_code == 404
        assert (await at.client.post(CHAT, json={"model": "none"})).status_code == 404
    assert capsys.readouterr().err == ""


async def test_files_are_rotated_and_the_oldest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "_FILE_BYTES", 1000)
    monkeypatch.setattr(access_log, "_WRITE_S", 0)
    log = AccessLog(tmp_path)
    for status in range(400, 419):
        log.refused("/", status, "")
        assert await until(lambda: not log._lines)
    log.refused("/", 419, "")
    log.close()
    sizes = await asyncio.to_thread(lambda: [it.stat().st_size for it in tmp_path.iterdir()])
    assert len(sizes) == 3 and max(sizes) <= 1000
    assert lines(tmp_path)[-1]["status"] == 419


@pytest.mark.parametrize(
    ("setting", "variable", "on"),
    [(None, None, False), (None, "1", True), (False, "1", False), (True, None, True)],
)
def test_it_is_on_in_the_images_unless_the_args_say_otherwise(
    setting: bool | None,
    variable: str | None,
    on: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # without a Ray, its logs are here
    monkeypatch.delenv(ACCESS_LOG, raising=False)
    if variable:
        monkeypatch.setenv(ACCESS_LOG, variable)
    assert bool(AccessLog.of(GatewayConfig(access_log=setting))) is on
    images = Path(__file__).parents[2].joinpath("Dockerfile").read_text().split("\nFROM ")
    assert sum(f"{ACCESS_LOG}=1" in image for image in images) == 2

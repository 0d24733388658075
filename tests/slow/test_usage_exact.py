"""A thousand mixed requests, a third of them cut off: the usage is what the engines counted."""

from __future__ import annotations

import asyncio
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from harness.local_run import Run
from harness.processes import REPO, eventually, free_port

from serve_app.config import keys

REQUESTS = 1000
CHAT, EMBED = "smollm2-135m", "all-minilm-l6-v2"
COUNTED = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "completion_tokens": "vllm:generation_tokens_total",
}


class Team(Run):
    """``configs/team.yaml`` with two gateways, and keys without limits."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.secrets = {name: keys.new() for name in ("team-a", "team-b", "ops")}
        entries = [
            {"name": name, "hash": hash, "admin": name == "ops"}
            for name, (_, hash) in self.secrets.items()
        ]
        (folder / "keys.yaml").write_text(yaml.safe_dump(entries))
        document = yaml.safe_load((REPO / "configs/team.yaml").read_text())
        document["http_options"]["port"] = self.port = free_port()
        *models, gateway = document["applications"]
        for model in models:
            model["args"]["model"] = str(REPO / model["args"]["model"])
        gateway["args"] |= {
            "replicas": 2,
            "num_cpus": 0,
            "keys": {"file": str(folder / "keys.yaml")},
            "usage_db": f"sqlite:///{folder}/usage.db",
        }
        self.config.write_text(yaml.safe_dump(document))

    def of(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secrets[key][0]}"}

    def get(self, path: str) -> httpx.Response:
        url = f"http://127.0.0.1:{self.port}{path}"
        answer = httpx.get(url, headers=self.of("ops"), timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer

    def counted(self) -> dict[tuple[str, str], float]:
        """What the engines have counted, by model and kind."""
        page = self.get("/metrics").text
        found: dict[tuple[str, str], float] = {}
        for kind, name in COUNTED.items():
            for labels, value in re.findall(rf"^{name}\{{([^}}]*)\}} (\S+)$", page, re.M):
                model = re.search(r'(?:^|,)model="([^"]*)"', labels)
                assert model
                place = model[1], kind
                found[place] = found.get(place, 0) + float(value)
        return found

    def recorded(self, group_by: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.get(f"/v1/usage?group_by={group_by}").json()["data"]
        return rows


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    run = Team(tmp_path_factory.mktemp("team"))
    run.start()
    try:
        run.wait_until_ready()
        yield run
        assert run.end(signal.SIGINT) == {}
    finally:
        run.kill()


def asks() -> list[tuple[str, str, dict[str, Any], int | None]]:
    """Key, path, body, and after how many events its client goes away: a third, all streams."""
    chance = random.Random(1)
    made = []
    for number in range(REQUESTS):
        key = chance.choice(["team-a", "team-a", "team-b"])
        words = "once upon a time " * chance.randint(1, 20)
        cut = chance.randint(0, 3) if number % 3 == 0 else None
        if cut is None and chance.random() < 0.4:
            made.append((key, "/v1/embeddings", {"model": EMBED, "input": [words, "It"]}, None))
            continue
        body: dict[str, Any] = {"model": CHAT, "max_tokens": chance.randint(1, 12)}
        body |= {"ignore_eos": True, "stream": cut is not None or chance.random() < 0.3}
        if chance.random() < 0.2:
            body["n"] = 2
        if chance.random() < 0.5:
            made.append((key, "/v1/completions", {**body, "prompt": [words, "It"]}, cut))
        else:
            messages = [{"role": "user", "content": words}]
            made.append((key, "/v1/chat/completions", {**body, "messages": messages}, cut))
    return made


async def send_all(team: Team) -> None:
    gate = asyncio.Semaphore(24)
    limits = httpx.Limits(max_connections=None)
    url = f"http://127.0.0.1:{team.port}"
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one(key: str, path: str, body: dict[str, Any], events: int | None) -> None:
            headers = team.of(key)
            async with gate, client.stream("POST", path, json=body, headers=headers) as answer:
                assert answer.status_code == 200, await answer.aread()
                seen = 0
                async for line in answer.aiter_lines():
                    seen += line.startswith("data:")  # a keepalive comes while it still queues
                    if events is not None and seen > events:
                        return

        await asyncio.gather(*(one(*ask) for ask in asks()))


def test_the_usage_is_what_the_engines_counted(team: Team) -> None:
    before = team.counted()
    assert {model for model, _ in before} == {CHAT, EMBED}
    asyncio.run(send_all(team))

    def all_are_recorded() -> bool:
        return sum(it["requests"] for it in team.recorded("model")) >= REQUESTS

    assert eventually(all_are_recorded, 60), team.recorded("key,model")

    def engines() -> dict[tuple[str, str], float]:
        return {place: value - before[place] for place, value in team.counted().items()}

    def usage() -> dict[tuple[str, str], float]:
        rows = team.recorded("model")
        return {(row["model"], kind): row[kind] for row in rows for kind in COUNTED}

    # A statistic may come a moment after the answer that it is of.
    assert eventually(lambda: engines() == usage(), 20), (engines(), usage())
    rows = team.recorded("key,model")
    assert sum(it["requests"] for it in rows) == REQUESTS
    assert not any(it["refused"] or it["unreported"] for it in rows)
    sent = asks()
    for key in ("team-a", "team-b"):
        ours = sum(it["requests"] for it in rows if it["key"] == key)
        assert ours == sum(it[0] == key for it in sent)
    assert all(it["prompt_tokens"] for it in rows)
    assert usage()[CHAT, "completion_tokens"] > usage()[EMBED, "completion_tokens"] == 0

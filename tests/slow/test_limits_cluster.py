"""Limits at two gateways that are processes of their own, by the actor of a real Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from harness.processes import REPO, eventually
from harness.scripted import GatewayProcess, Upstream, until

from serve_app.cluster import kv, limits_actor
from serve_app.cluster.limits_actor import Coordinator
from serve_app.config import keys
from serve_app.gateway.leases import Leases
from serve_app.gateway.limits import Limits

LIMITS = {"tokens_per_day": 100_000, "model_limits": {"m": {"requests_per_minute": 40}}}


class _Gateway:
    """A gateway with its own replica, and a client."""

    async def start(self, file: str, key: str) -> None:
        self._key = key
        self._held = contextlib.AsyncExitStack()
        upstream = await self._held.enter_async_context(Upstream())
        self._limits = Limits()
        self._at = await self._held.enter_async_context(
            GatewayProcess(upstream, keys={"file": file}, limits=self._limits)
        )
        leases = Leases(self._limits.counts, Coordinator, lambda: True)
        self._exchanging = asyncio.create_task(leases.run())

    async def knows(self, gateways: int) -> bool:
        return bool(await until(lambda: self._limits.counts._live == gateways, 60))

    async def ask(self, number: int, max_tokens: int) -> list[tuple[int, dict[str, str]]]:
        """The status and the headers of so many requests at once."""
        answers = await asyncio.gather(
            *(
                self._at.client.post(
                    "/v1/chat/completions",
                    json={"model": "m", "max_tokens": max_tokens},
                    headers={"authorization": f"Bearer {self._key}"},
                )
                for _ in range(number)
            )
        )
        return [(answer.status_code, dict(answer.headers)) for answer in answers]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    paths = [REPO, REPO / "tests", Path(__file__).parent]
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        namespace="serve",
        runtime_env={"env_vars": {"PYTHONPATH": ":".join(map(str, paths))}},
    )
    yield
    ray.shutdown()


def test_two_gateways_have_one_limit(cluster: None, tmp_path: Path) -> None:
    key, hash = keys.new()
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump([{"name": "a", "hash": hash, **LIMITS}]))
    remote: Any = ray.remote(num_cpus=0)(_Gateway)

    def started(number: int) -> list[Any]:
        found = [remote.remote() for _ in range(number)]
        ray.get([gateway.start.remote(str(file), key) for gateway in found])
        return found

    def ask(gateways: list[Any], number: int, tokens: int = 1000) -> list[list[int]]:
        asked = ray.get([gateway.ask.remote(number, tokens) for gateway in gateways])
        return [[status for status, _ in answers] for answers in asked]

    def left(gateway: Any, kind: str) -> int:
        [(_, headers)] = ray.get(gateway.ask.remote(1, 10**6))  # more than it may ever have
        return int(headers[f"x-ratelimit-remaining-{kind}"])

    def end_actor() -> None:
        ray.kill(ray.get_actor(limits_actor._NAME), no_restart=True)

    first, second = both = started(2)
    assert all(ray.get([gateway.knows.remote(2) for gateway in both]))
    took = [statuses.count(200) for statuses in ask(both, 40)]
    assert min(took) >= 20, took  # a lease of each
    assert sum(took) <= 60, took  # the limit, and one more lease
    assert eventually(lambda: [left(gateway, "requests") for gateway in both] == [0, 0])
    assert [s.count(200) for s in ask(both, 5)] == [0, 0]

    # What was taken today is known to whoever comes later, though all have ended before.
    spent = sum(took) * 1000
    assert eventually(lambda: 0 < left(first, "tokens") < 100_001 - spent)
    known = left(first, "tokens")
    assert eventually(lambda: left(second, "tokens") == known)
    assert eventually(lambda: (kv.get("limits/days") or b"").count(b"tokens_per_day") == 2)
    end_actor()
    assert {s for statuses in ask(both, 1, 10) for s in statuses} <= {200, 429}
    ray.kill(first)
    ray.kill(second)
    with contextlib.suppress(ValueError):  # one that the gateways have started since
        end_actor()
    [third] = started(1)
    assert eventually(lambda: abs(left(third, "tokens") - known) < 100)

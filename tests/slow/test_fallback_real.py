"""A fallback answers for a model whose replica was killed, and for one that is scaled to zero.

Real Serve and real engines on the CPU. No time is asserted on: what was measured is printed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from harness import servers
from harness.processes import eventually, free_port
from harness.servers import Cluster

BIG, SMALL, COLD = "big", "small", "cold"
HEADER = "x-fallback-model"
ASK = {"messages": [{"role": "user", "content": "What is the capital of France?"}],
       "max_tokens": 8, "temperature": 0}  # fmt: skip
BACK_S = 240.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """``big`` and ``small`` run, ``cold`` is scaled to zero; ``small`` answers for both."""
    args = servers.demo_args("smollm2-135m") | {"served_as": []}
    scaling = {"min_replicas": 0, "max_replicas": 1}
    config = servers.document(
        free_port(),
        servers.application(BIG, **args, fallback=["gone", SMALL], fallback_after_s=1),
        servers.application(SMALL, **args),
        servers.application(COLD, **args, fallback=[SMALL], fallback_after_s=0,
                            autoscaling=scaling),
    )  # fmt: skip
    cluster = Cluster.start(config, tmp_path_factory.mktemp("fallback"), "haproxy")
    try:
        cluster.wait_until_ready(BACK_S)
        yield cluster
    finally:
        left = cluster.interrupt()
    assert not left, f"Ctrl-C left {left}"


def ask(cluster: Cluster, model: str) -> str:
    """The model that answered, by the answer's header and its body alike."""
    answer = httpx.post(
        f"{cluster.base_url}/v1/chat/completions", json=ASK | {"model": model}, timeout=120
    )
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert "Paris" in body["choices"][0]["message"]["content"]
    assert body["model"] == answer.headers.get(HEADER, model)
    return str(body["model"])


def test_the_requests_of_a_killed_replica_are_answered_until_it_is_back(fleet: Cluster) -> None:
    assert ask(fleet, BIG) == BIG
    [pid] = fleet.replicas(BIG).values()
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    answers, first_s = [], 0.0
    while not answers or (answers[-1] == SMALL and time.monotonic() - killed < BACK_S):
        answers.append(ask(fleet, BIG))
        first_s = first_s or time.monotonic() - killed
        time.sleep(0.5)
    back_s = time.monotonic() - killed
    assert set(answers[:-1]) == {SMALL}
    assert answers[-1] == BIG
    print(
        f"\nMEASURED kill -9: the first answer after {first_s:.1f} s, {len(answers) - 1} by the "
        f"fallback without an error, the model itself after {back_s:.1f} s"
    )


def test_a_cold_model_wakes_though_nobody_waits_for_it(fleet: Cluster) -> None:
    assert fleet.replicas(COLD) == {}
    began = time.monotonic()
    assert ask(fleet, COLD) == SMALL
    first_s = time.monotonic() - began
    assert eventually(lambda: len(fleet.replicas(COLD)) == 1, BACK_S, 0.5)
    assert eventually(lambda: ask(fleet, COLD) == COLD, 30)
    print(
        f"\nMEASURED cold: an answer after {first_s:.1f} s, the model itself after "
        f"{time.monotonic() - began:.1f} s"
    )


def test_openais_sdk_gets_a_stream_of_the_fallback(fleet: Cluster) -> None:
    [pid] = fleet.replicas(BIG).values()
    os.kill(pid, signal.SIGKILL)
    sdk = openai.OpenAI(base_url=f"{fleet.base_url}/v1", api_key="none", max_retries=0)
    with sdk.chat.completions.with_streaming_response.create(
        model=BIG,
        stream=True,
        **ASK,  # type: ignore[call-overload]
    ) as answer:
        assert answer.headers[HEADER] == SMALL
        assert {chunk.model for chunk in answer.parse()} == {SMALL}
    usage = fleet.ready()[1]["models"]
    assert usage[SMALL]["replicas"] == 1

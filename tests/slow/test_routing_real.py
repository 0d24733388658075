"""Routing by what is cached, with real engines: what is predicted is what vLLM finds."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
from harness import servers
from harness.processes import eventually, free_port
from harness.servers import CHAT, Cluster
from prometheus_client.parser import text_string_to_metric_families

CUSTOMERS, QUESTIONS = 6, 5


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two replicas of the chat model behind two gateways, which get requests in no order."""
    model = servers.application(CHAT, **servers.demo_args("smollm2-135m") | {"replicas": 2})
    config = servers.document(free_port(), model, gateways=2)
    with servers.running(config, tmp_path_factory.mktemp("routing"), "python") as cluster:
        assert eventually(lambda: len(cluster.replicas(CHAT)) == 2, 180, 0.5)
        yield cluster


def manual_of(customer: int) -> str:
    """About 600 tokens that are one customer's own."""
    return f"Customer {customer}. " + " ".join(
        f"Rule {n} of customer {customer} is {(n * 7919 + customer) % 1000}." for n in range(40)
    )


def counted(page: str, name: str, label: str) -> dict[str, float]:
    """At all gateways together."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == f"serve_app_gateway_{name}":
                found[sample.labels[label]] += sample.value  # type: ignore[assignment]
    return dict(found)


def gateways_of(page: str) -> int:
    """How many have chosen replicas."""
    return len({
        sample.labels["gateway"]
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "serve_app_gateway_routing_choices_total"
    })  # fmt: skip


def test_the_hits_that_are_predicted_are_those_that_vllm_reports(two: Cluster) -> None:
    with httpx.Client(base_url=two.base_url, timeout=120) as client:
        for question in range(QUESTIONS):
            for customer in range(CUSTOMERS):
                said = client.post(
                    "/v1/chat/completions",
                    json={
                        "model": CHAT,
                        "messages": [
                            {"role": "system", "content": manual_of(customer)},
                            {"role": "user", "content": f"What is rule {question + 3}?"},
                        ],
                        "max_tokens": 8,
                    },
                )
                assert said.status_code == 200, said.text
        sent = CUSTOMERS * QUESTIONS

        def page() -> str:
            return client.get("/metrics").text

        assert eventually(
            lambda: sum(counted(page(), "routing_choices_total", "reason").values()) == sent
        )
        assert eventually(lambda: "cached" in counted(page(), "routing_tokens_total", "kind"), 10)
        assert gateways_of(page()) == 2
        reasons = counted(page(), "routing_choices_total", "reason")
        tokens = counted(page(), "routing_tokens_total", "kind")
    print(f"\nMEASURED routing with real engines: {reasons}, tokens {tokens}")
    assert reasons == {"cold": CUSTOMERS, "warm": sent - CUSTOMERS}
    # These prompts are of two blocks and a half, and what is known of one ends with a block.
    assert 0.65 < tokens["predicted"] / tokens["cached"] < 1.2
    assert tokens["cached"] > 0.6 * tokens["prompt"]


def test_a_reset_of_the_prefix_cache_is_known(two: Cluster) -> None:
    with httpx.Client(base_url=two.base_url, timeout=120) as client:

        def cold() -> float:
            return counted(client.get("/metrics").text, "routing_choices_total", "reason")["cold"]

        def ask() -> None:
            messages = [{"role": "system", "content": manual_of(0)}]
            body = {"model": CHAT, "messages": messages, "max_tokens": 1}
            assert client.post("/v1/chat/completions", json=body).status_code == 200

        ask()
        before = cold()
        done = subprocess.run(
            [servers.BIN / "serve-app", "admin", CHAT, "reset-prefix-cache", "--address",
             two.gcs_address],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.stdout.count("prefix cache reset") == 2, done.stderr
        assert eventually(lambda: (ask(), cold() > before)[1], 10, 0.5)

"""``GET /metrics`` of a running cluster: both models' vLLM, and each gateway."""

from __future__ import annotations

from collections import Counter

import httpx
import pytest
from harness import prometheus
from harness.processes import eventually
from harness.queries import every_query, queried
from harness.servers import CHAT, EMBED, Cluster
from prometheus_client.parser import text_string_to_metric_families

from serve_app.config.document import GATEWAY_DEPLOYMENT

ASK = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


def page(http: httpx.Client) -> str:
    answer = http.get("/metrics")
    assert answer.status_code == 200
    return answer.text


def samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    families = text_string_to_metric_families(text)
    return [(s.name, s.labels, s.value) for family in families for s in family.samples]


def test_it_has_vllm_s_series_of_both_models(cluster: Cluster, http: httpx.Client) -> None:
    found = samples(page(http))
    for model in (CHAT, EMBED):
        (replica,) = cluster.replicas(model)
        running = [labels for name, labels, _ in found if name == "vllm:num_requests_running"]
        (labels,) = [it for it in running if it["model"] == model]
        assert labels["replica"] == replica
        assert labels["model_name"] == model
        up = {"model": model, "replica": replica}
        assert ("serve_app_gateway_replica_scrape_up", up, 1) in found


def test_it_counts_at_every_gateway(cluster: Cluster, http: httpx.Client) -> None:
    """Each answers a part of the requests; a page from any of them has all."""
    gateways = cluster.replicas("gateway", deployment=GATEWAY_DEPLOYMENT).keys()

    def counted() -> dict[str, float]:
        return {
            labels["gateway"]: value
            for name, labels, value in samples(page(http))
            if name == "serve_app_gateway_requests_total"
            and labels["model"] == CHAT
            and labels["code"] == "200"
        }

    def ask_until_all_count() -> bool:
        for _ in range(2):  # with the page three: two would always reach the same gateway each
            asked = httpx.post(f"{cluster.base_url}/v1/chat/completions", json=ASK, timeout=180)
            assert asked.status_code == 200
        return counted().keys() == gateways

    assert eventually(ask_until_all_count, 60)
    pages = [samples(page(http)) for _ in range(6)]
    for found in pages:
        assert ("serve_app_gateway_peers_scrape_up", {}, 1) in found
        shown = {labels["gateway"] for _, labels, _ in found if "gateway" in labels}
        assert shown == gateways
    assert counted() == counted()


def test_no_series_is_there_twice(http: httpx.Client) -> None:
    found = Counter((name, *sorted(labels.items())) for name, labels, _ in samples(page(http)))
    assert [series for series, count in found.items() if count > 1] == []


def test_dashboards_and_alerts_ask_for_names_that_it_has(http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json=ASK | {"stream": True}).raise_for_status()
    text = page(http)
    ends = ("", "_bucket", "_count", "_sum")
    declared = {line.split()[2] + end for line in text.splitlines() if line[:6] == "# TYPE"
                for end in ends}  # fmt: skip
    asked = set().union(*map(queried, every_query()))
    asked = {name for name in asked if name.startswith(("vllm:", "serve_app_gateway_"))}
    assert asked and asked - declared == set()


@pytest.mark.skipif(prometheus.PROMTOOL is None, reason=prometheus.ABSENT)
def test_promtool_can_read_it(http: httpx.Client) -> None:
    said = prometheus.complaints(page(http))
    assert [line for line in said if not line.startswith("vllm:")] == []

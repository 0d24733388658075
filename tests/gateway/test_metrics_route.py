"""``GET /metrics``: what the gateways counted, and vLLM's series of every replica."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import prometheus
from harness.prometheus import ABSENT, PROMETHEUS, PROMTOOL, Prometheus
from harness.scripted import CREDENTIAL, Exchange, GatewayProcess, Upstream, ok, took, until
from prometheus_client.parser import text_string_to_metric_families

from serve_app.cluster.exchange import Load, Usage
from serve_app.config import keys
from serve_app.gateway import exposition
from serve_app.gateway.exposition import OWN, Families
from serve_app.gateway.metrics import Metrics

CHAT = "/v1/chat/completions"
OURS = "serve_app_gateway_"
KEY, HASH = keys.new()
ADMIN, ADMIN_HASH = keys.new()

VLLM = """\
# HELP python_info Python platform information
# TYPE python_info gauge
python_info{version="3.12"} 1.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="org/m"} 3.0
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="org/m"} 7.0
# HELP vllm:odd A label that has everything, and a sample that has none.
# TYPE vllm:odd gauge
vllm:odd{said="a } b\\\\n \\" {"} 1.0
vllm:odd 2.0
# HELP vllm:e2e_request_latency_seconds Histogram of e2e request latency in seconds.
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{engine="0",le="0.3",model_name="org/m"} 1.0
vllm:e2e_request_latency_seconds_bucket{engine="0",le="+Inf",model_name="org/m"} 2.0
vllm:e2e_request_latency_seconds_count{engine="0",model_name="org/m"} 2.0
vllm:e2e_request_latency_seconds_sum{engine="0",model_name="org/m"} 4.5
"""


async def engine(exchange: Exchange) -> None:
    """Shows vLLM's metrics to the gateway alone; streams two events to anybody."""
    if exchange.target == "/metrics":
        assert exchange.header("x-serve-app-credential") == [CREDENTIAL]
        await exchange.answer(VLLM.encode(), "content-type: text/plain; version=0.0.4")
    else:
        await exchange.sse(b"data: 1\n\n")
        await exchange.chunk(b"data: [DONE]\n\n")
        await exchange.chunk(b"")


def key_file(folder: Path, **limits: int) -> dict[str, str]:
    file = folder / "keys.yaml"
    entries = [
        {"name": "team", "hash": HASH, **limits},
        {"name": "boss", "hash": ADMIN_HASH, "admin": True},
    ]
    file.write_text(yaml.safe_dump(entries))
    return {"file": str(file)}


async def page(gateway: GatewayProcess, key: str = ADMIN) -> str:
    answer = await gateway.client.get("/metrics", headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return answer.text


def value(page: str, name: str, **labels: str) -> float:
    """The one sample of this name with these labels among its own."""
    (found,) = values(page, name, **labels)
    return found


def values(page: str, name: str, **labels: str) -> list[float]:
    return [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


async def chat(gateway: GatewayProcess, key: str = KEY, **more: Any) -> int:
    body = {"model": "m", "stream": True, **more}
    headers = {"authorization": f"Bearer {key}"}
    return (await gateway.client.post(CHAT, json=body, headers=headers)).status_code


# --- ours ----------------------------------------------------------------------------------------


async def test_what_a_request_did_is_counted(tmp_path: Path) -> None:
    async with (
        Upstream(engine) as upstream,
        GatewayProcess(upstream, keys=key_file(tmp_path)) as gateway,
    ):
        assert await chat(gateway) == 200
        (id,) = gateway.ledger._open
        gateway.ledger.report(took(id, Usage(30, 20, 11), "team"), "r0")
        assert await chat(gateway, "nobody's") == 401
        assert await chat(gateway, model="other") == 404
        said = await page(gateway)
    assert value(said, f"{OURS}requests_total", model="m", key="team", code="200") == 1
    assert value(said, f"{OURS}requests_total", model="", key="", code="401") == 1
    assert value(said, f"{OURS}requests_total", model="", key="team", code="404") == 1
    for kind, tokens in {"prompt": 30, "cached": 20, "completion": 11}.items():
        assert value(said, f"{OURS}tokens_total", model="m", key="team", kind=kind) == tokens
    for name in (
        "request_duration_seconds", "time_to_first_byte_seconds", "queue_time_seconds",
        "relay_overhead_seconds", "time_per_output_token_seconds",
    ):  # fmt: skip
        assert value(said, f"{OURS}{name}_count", model="m") == 1, name
        assert value(said, f"{OURS}{name}_sum", model="m") > 0, name
    whole = value(said, f"{OURS}request_duration_seconds_sum", model="m")
    first = value(said, f"{OURS}time_to_first_byte_seconds_sum", model="m")
    per_token = value(said, f"{OURS}time_per_output_token_seconds_sum", model="m")
    assert per_token == pytest.approx((whole - first) / 10)
    overhead = value(said, f"{OURS}relay_overhead_seconds_sum", model="m")
    assert 0 < overhead + value(said, f"{OURS}queue_time_seconds_sum", model="m") < first


async def test_an_answer_that_is_no_stream_has_no_time_per_token() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        assert await chat(gateway) == 200
        (id,) = gateway.ledger._open
        gateway.ledger.report(took(id, Usage(3, 0, 11)), "r0")
        said = await page(gateway)
    assert value(said, f"{OURS}tokens_total", kind="completion", key="") == 11
    assert values(said, f"{OURS}time_per_output_token_seconds_count") == []


async def test_a_retry_is_counted_and_its_time_is_no_overhead() -> None:
    async def dies(exchange: Exchange) -> None:
        exchange.die()

    async with (
        Upstream(dies) as first,
        Upstream(engine) as second,
        GatewayProcess(first, second) as gateway,
    ):
        assert await chat(gateway) == 200
        said = await page(gateway)
    assert value(said, f"{OURS}retries_total", model="m", reason="connection closed") == 1
    assert values(said, f"{OURS}relay_overhead_seconds_count") == []


async def test_a_limit_that_refuses_is_counted_by_its_name(tmp_path: Path) -> None:
    async with Upstream(engine) as upstream:
        limited = key_file(tmp_path, requests_per_minute=1)
        async with GatewayProcess(upstream, keys=limited) as gateway:
            assert [await chat(gateway) for _ in range(3)] == [200, 429, 429]
            said = await page(gateway)
    labels = {"model": "m", "key": "team", "limit": "requests_per_minute"}
    assert value(said, f"{OURS}limits_hit_total", **labels) == 2
    assert value(said, f"{OURS}requests_total", key="team", code="429") == 2


async def test_a_request_that_no_file_takes_is_counted(tmp_path: Path) -> None:
    lines = tmp_path / "usage"
    async with (
        Upstream(engine) as upstream,
        GatewayProcess(upstream, usage_dir=str(lines)) as gateway,
    ):
        await asyncio.to_thread(shutil.rmtree, lines)
        assert await chat(gateway) == 200
        (id,) = gateway.ledger._open
        gateway.ledger.report(took(id, Usage(1, 0, 1)), "r0")
        assert value(await page(gateway), f"{OURS}usage_unrecorded_total") == 1


async def test_what_waits_is_shown_and_for_how_long() -> None:
    go = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        if exchange.target == "/metrics":
            await engine(exchange)
        else:
            await go.wait()
            await ok(exchange)

    async with Upstream(slow) as upstream, GatewayProcess(upstream) as gateway:
        assert value(await page(gateway), f"{OURS}queued_requests", model="m") == 0
        gateway.board.report("r0", Load(0, 0, 1, 0.0))  # it runs one, and is sent four more
        asked = [asyncio.create_task(chat(gateway)) for _ in range(8)]
        assert await until(lambda: gateway.metrics._running.get("m") == 8)
        said = await page(gateway)
        assert value(said, f"{OURS}queued_requests", model="m") == 3
        assert value(said, f"{OURS}longest_wait_seconds", model="m") > 0
        assert value(said, f"{OURS}inflight_requests", model="m") == 8
        go.set()
        assert set(await asyncio.gather(*asked)) == {200}
        assert value(await page(gateway), f"{OURS}inflight_requests", model="m") == 0


async def test_gateways_of_one_process_count_apart() -> None:
    async with (
        Upstream(engine) as upstream,
        GatewayProcess(upstream) as one,
        GatewayProcess(upstream) as other,
    ):
        assert await chat(one) == 200
        assert value(await page(one), f"{OURS}requests_total", code="200") == 1
        assert values(await page(other), f"{OURS}requests_total") == []


class Peers:
    """Two gateways: the one under test, and another that has counted a request."""

    own = "here"

    def __init__(self, *, answer: bool = True) -> None:
        self._answer = answer
        self._other = Metrics()
        self._other.refused(401, None)

    async def ask(self, method: str, timeout_s: float) -> tuple[list[Any], bool]:
        assert method == OWN
        if not self._answer:
            return [], False
        return [("there", exposition.generate_latest(self._other.registry).decode())], True


async def test_one_page_tells_of_all_gateways() -> None:
    async with (
        Upstream(engine) as upstream,
        GatewayProcess(upstream, gateways=Peers()) as gateway,
    ):
        assert await chat(gateway) == 200
        said = await page(gateway)
    assert value(said, f"{OURS}requests_total", gateway="here", code="200", model="m") == 1
    assert value(said, f"{OURS}requests_total", gateway="there", code="401", model="") == 1
    assert value(said, f"{OURS}peers_scrape_up") == 1
    assert_families_are_whole(said)


async def test_a_gateway_that_is_silent_is_left_out_and_told() -> None:
    async with (
        Upstream(engine) as upstream,
        GatewayProcess(upstream, gateways=Peers(answer=False)) as gateway,
    ):
        assert await chat(gateway) == 200
        said = await page(gateway)
    assert value(said, f"{OURS}requests_total", gateway="here") == 1
    assert value(said, f"{OURS}peers_scrape_up") == 0


# --- vLLM's --------------------------------------------------------------------------------------


def assert_families_are_whole(page: str) -> None:
    """One head for each family, before its samples, which stand together."""
    heads = re.findall(r"^# (HELP|TYPE) (\S+)", page, re.MULTILINE)
    names = [name for _, name in heads]
    assert heads == [(kind, name) for name in names[::2] for kind in ("HELP", "TYPE")]
    assert len(set(names)) == len(heads) / 2
    of = ""
    for line in page.splitlines():
        if line.startswith("#"):
            of = line.split()[2]
        else:
            assert re.fullmatch(rf"{of}(_bucket|_sum|_count)?", re.split("[{ ]", line)[0]), line


async def test_every_replica_s_series_have_its_labels() -> None:
    async with (
        Upstream(engine) as one,
        Upstream(engine) as two,
        GatewayProcess(one, two) as gateway,
    ):
        at = {"r0": one.port, "r0-1": 1, "r1": two.port}
        gateway.board.publish("m", {id: ("127.0.0.1", port) for id, port in at.items()})
        said = await page(gateway)
    for replica in ("r0", "r1"):
        its = {"model": "m", "replica": replica}
        of_vllm = {**its, "model_name": "org/m", "engine": "0"}
        assert value(said, "vllm:num_requests_running", **of_vllm) == 3
        assert value(said, "vllm:generation_tokens_total", **of_vllm) == 7
        assert value(said, "vllm:e2e_request_latency_seconds_bucket", le="+Inf", **of_vllm) == 2
        assert value(said, "vllm:odd", said='a } b\\n " {', **its) == 1
        assert values(said, "vllm:odd", **its) == [1, 2]
        assert value(said, f"{OURS}replica_scrape_up", **its) == 1
    assert len(values(said, f"{OURS}replica_scrape_up")) == 2  # a further front end has none
    assert "python_info" not in said
    assert_families_are_whole(said)


async def test_a_replica_that_does_not_answer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.head("content-length: 100")
        await exchange.client_gone()

    async def refuses(exchange: Exchange) -> None:
        await exchange.answer(b"asleep", status="503 Service Unavailable")

    async def garbled(exchange: Exchange) -> None:
        await exchange.answer(b"vllm:\xff 1\n")

    monkeypatch.setattr(exposition, "PATIENCE_S", 0.3)
    async with (
        Upstream(engine) as up,
        Upstream(silent) as a,
        Upstream(refuses) as b,
        Upstream(garbled) as c,
        GatewayProcess(up, a, b, c, 1) as gateway,
    ):
        said = await page(gateway)
    seen = [value(said, f"{OURS}replica_scrape_up", replica=f"r{n}") for n in range(5)]
    assert seen == [1, 0, 0, 0, 0]
    assert values(said, "vllm:num_requests_running") == [3]


async def test_those_who_ask_at_once_get_one_page() -> None:
    async with Upstream(engine) as upstream, GatewayProcess(upstream) as gateway:
        said = await asyncio.gather(*(page(gateway) for _ in range(5)))
        assert len(said) == 5
        assert len(upstream.exchanges) < 5
        assert {value(it, "vllm:num_requests_running") for it in said} == {3}


def test_a_label_s_value_may_have_anything() -> None:
    families = Families()
    families.add(VLLM, {"model": 'a"b\\c\nd'}, "vllm:num")
    (family,) = text_string_to_metric_families(families.text())
    assert family.samples[0].labels["model"] == 'a"b\\c\nd'


# --- who may see it, and Prometheus --------------------------------------------------------------


async def test_with_keys_it_is_for_admins(tmp_path: Path) -> None:
    async with (
        Upstream(engine) as upstream,
        GatewayProcess(upstream, keys=key_file(tmp_path)) as gateway,
    ):
        for headers, status, code in (
            ({}, 401, "missing_api_key"),
            ({"authorization": "Bearer sk-wrong"}, 401, "invalid_api_key"),
            ({"authorization": f"Bearer {KEY}"}, 403, "admin_only"),
        ):
            answer = await gateway.client.get("/metrics", headers=headers)
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == code
        assert upstream.exchanges == []
        assert "vllm:num_requests_running" in await page(gateway)
        posted = await gateway.client.post("/metrics", headers={"x-api-key": ADMIN})
        assert (posted.status_code, posted.headers["allow"]) == (405, "GET, HEAD")


async def full_page(upstream: Upstream) -> str:
    """The page of two gateways after a request, with a sample of each series that it can have."""
    async with GatewayProcess(upstream, gateways=Peers()) as gateway:
        assert await chat(gateway) == 200
        (id,) = gateway.ledger._open
        gateway.ledger.report(took(id, Usage(30, 20, 11)), "r0")
        return await page(gateway)


@pytest.mark.skipif(PROMTOOL is None, reason=ABSENT)
async def test_promtool_has_nothing_to_say() -> None:
    async with Upstream(engine) as upstream:
        said = await full_page(upstream)
    # Of vLLM's own page it says the same: names with colons are for recording rules.
    theirs = set(await asyncio.to_thread(prometheus.complaints, VLLM))
    ours = set(await asyncio.to_thread(prometheus.complaints, said))
    assert ours <= theirs
    assert await asyncio.to_thread(prometheus.complaints, said + "broken {")  # it does look


@pytest.mark.skipif(PROMETHEUS is None, reason=ABSENT)
async def test_a_real_prometheus_scrapes_it_with_an_admin_s_key(tmp_path: Path) -> None:
    async with (
        Upstream(engine) as upstream,
        GatewayProcess(upstream, keys=key_file(tmp_path), gateways=Peers()) as gateway,
    ):
        assert await chat(gateway) == 200
        job = {
            "job_name": "serve_app",
            "authorization": {"credentials": ADMIN},
            "static_configs": [{"targets": [f"127.0.0.1:{gateway.port}"]}],
        }

        def asked() -> list[Any]:
            with Prometheus(job, tmp_path) as real:
                return [
                    real.query(f"sum by (gateway, code) ({OURS}requests_total)"),
                    real.query("sum by (model, replica) (vllm:num_requests_running)"),
                    real.query(f"histogram_quantile(0.5, {OURS}queue_time_seconds_bucket)"),
                    real.query("up"),
                ]

        requests, running, quantiles, up = await asyncio.to_thread(asked)
    assert ({"gateway": "here", "code": "200"}, 1) in requests
    assert ({"gateway": "there", "code": "401"}, 1) in requests
    assert running == [({"model": "m", "replica": "r0"}, 3)]
    assert quantiles[0][0]["gateway"] == "here"
    assert [value for _, value in up] == [1]

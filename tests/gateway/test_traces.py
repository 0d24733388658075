"""What a receiver of OpenTelemetry's gets of each request, and the replica of its trace."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from harness.otlp import Receiver, Span
from harness.processes import free_port
from harness.scripted import Exchange, GatewayProcess, Upstream, reported, took, until

from serve_app.cluster.exchange import Report, Usage
from serve_app.config import keys
from serve_app.config.settings import GatewayConfig, parse
from serve_app.errors import ConfigError
from serve_app.gateway import traces

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "org/m:1.0", "messages": [{"role": "user", "content": "hush"}]}
STREAM = {**ASK, "stream": True}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SERVER, ERROR = 2, 2  # as the protocol has kind and status
COLLECTOR = shutil.which("otelcol") or shutil.which("otelcol-contrib")


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with Receiver() as receiver:
        yield receiver


async def ask(
    at: GatewayProcess,
    body: Any = ASK,
    path: str = CHAT,
    usage: Usage | None = None,
    **more: Any,
) -> httpx.Response:
    """Ask, and report what the request took as its replica will."""
    answer = await at.client.post(path, json=body, **more)
    report(at, usage or Usage(11, 4, 7))
    return answer


def report(at: GatewayProcess, usage: Usage) -> None:
    for id in list(at.ledger._open):
        at.ledger.report(took(id, usage), "r0")


async def only(receiver: Receiver) -> Span:
    assert await until(lambda: receiver.spans), "no span came"
    [span] = receiver.spans
    return span


async def events(exchange: Exchange) -> None:
    await exchange.sse(b"data: 1\n\n", b"data: 2\n\n")
    await exchange.send(b"0\r\n\r\n")


async def dies(exchange: Exchange) -> None:
    exchange.die()


async def test_a_span_has_the_key_the_session_and_the_tokens(
    receiver: Receiver, tmp_path: Path
) -> None:
    key, hash = keys.new()
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump([{"name": "team-a", "hash": hash}]))
    settings: Any = {"otlp_endpoint": receiver.url, "keys": {"file": str(tmp_path / "keys.yaml")}}
    headers = {"authorization": f"Bearer {key}", "x-session-id": "s" * 300, "x-request-id": "mine"}
    before = time.time()
    async with Upstream(events) as upstream, GatewayProcess(upstream, **settings) as at:
        await ask(at, STREAM, headers=headers)
        span = await only(receiver)
    assert (span.name, span.kind, span.status) == ("chat org/m:1.0", SERVER, 0)
    assert before <= span.start_s <= span.end_s <= time.time()
    found = span.attributes
    waited = found.pop("gen_ai.response.time_to_first_chunk")
    assert 0 < waited <= span.end_s - span.start_s
    assert found.pop("langfuse.observation.completion_start_time").endswith("+00:00")
    assert 0 <= found.pop("serve_app.queued_s") <= waited
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "org/m:1.0",
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "m",
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 7,
        "http.response.status_code": 200,
        "http.route": CHAT,
        "serve_app.end": "answered",
        "serve_app.replica": "r0",
        "serve_app.request_id": "mine",
        "session.id": "s" * 200,
        "user.id": "team-a",
    }
    assert span.resource["service.name"] == "serve_app"


async def test_the_replica_continues_the_span_and_the_span_the_client(receiver: Receiver) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    async with Upstream() as upstream, GatewayProcess(upstream, otlp_endpoint=receiver.url) as at:
        await ask(at, headers=headers)
        span = await only(receiver)
    assert (span.trace_id, span.parent_id, span.trace_state) == (TRACE, PARENT, "vendor=1")
    [got] = upstream.exchanges
    assert got.header("traceparent") == [f"00-{TRACE}-{span.span_id}-01"]
    assert got.header("tracestate") == ["vendor=1"]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("traceparent", "bogus")],
        [("traceparent", f"00-{'0' * 32}-{PARENT}-01")],
        [("traceparent", f"00-{TRACE}-{PARENT}-01"), ("traceparent", f"00-{TRACE}-{PARENT}-01")],
        [("traceparent", "00-" + "a" * 5000), ("tracestate", "vendor=1")],
        [("traceparent", b"\xff\xfe"), ("tracestate", b"\xff")],
    ],
)
async def test_without_a_trace_that_can_be_continued_one_begins(
    receiver: Receiver, headers: Any
) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream, otlp_endpoint=receiver.url) as at:
        assert (await ask(at, headers=headers)).status_code == 200
        span = await only(receiver)
    assert span.parent_id == ""
    assert span.trace_id not in (TRACE, "0" * 32)
    [got] = upstream.exchanges
    [sent] = got.header("traceparent")
    assert sent[:53] == f"00-{span.trace_id}-{span.span_id}-"[:53]
    assert int(sent[53:], 16) & 1
    assert got.header("tracestate") == []


@pytest.mark.parametrize(
    ("ratio", "flags"), [(1.0, "00"), (0.0, None)], ids=["client's choice", "ratio"]
)
async def test_what_is_not_sampled_is_not_sent_and_the_replica_knows(
    receiver: Receiver, ratio: float, flags: str | None
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"} if flags else {}
    settings: Any = {"otlp_endpoint": receiver.url, "trace_sample_ratio": ratio}
    async with Upstream() as upstream, GatewayProcess(upstream, **settings) as at:
        await ask(at, headers=headers)
        await ask(at, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        span = await only(receiver)  # that of the second request, whatever the ratio
    assert span.trace_id == TRACE
    first, second = [exchange.header("traceparent")[0] for exchange in upstream.exchanges]
    assert int(first[-2:], 16) & 1 == 0
    assert second == f"00-{TRACE}-{span.span_id}-01"
    assert not flags or (TRACE in first and PARENT not in first)


async def test_without_an_endpoint_the_clients_headers_pass() -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    async with Upstream() as upstream, GatewayProcess(upstream) as at:
        await ask(at, headers=headers)
    [got] = upstream.exchanges
    assert got.header("traceparent") == [headers["traceparent"]]
    assert got.header("tracestate") == [headers["tracestate"]]


def test_without_an_endpoint_no_exporter_is_imported() -> None:
    program = (
        "import sys, serve_app.gateway, serve_app.gateway.asgi;"
        "print([it for it in sys.modules if it.startswith('opentelemetry.exporter.otlp')])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


# What goes wrong.


async def test_a_refused_request_has_a_span(receiver: Receiver) -> None:
    settings: Any = {"otlp_endpoint": receiver.url, "cold_start_timeout_s": 0}
    async with GatewayProcess(applications={"cold": reported({})}, **settings) as at:
        assert (await ask(at, {**ASK, "model": "cold"})).status_code == 503
        span = await only(receiver)
    assert span.status == ERROR
    assert span.attributes["error.type"] == "503"
    assert span.attributes["serve_app.end"] == "refused"
    assert "serve_app.replica" not in span.attributes
    assert "gen_ai.usage.output_tokens" not in span.attributes


async def test_the_clients_mistake_is_no_error_of_the_server(receiver: Receiver) -> None:
    async def refuses(exchange: Exchange) -> None:
        await exchange.answer(b'{"error": {}}', status="400 Bad Request")

    async with (
        Upstream(refuses) as upstream,
        GatewayProcess(upstream, otlp_endpoint=receiver.url) as at,
    ):
        await ask(at)
        span = await only(receiver)
    assert (span.status, span.attributes["error.type"]) == (0, "400")


async def test_a_retry_is_noted(receiver: Receiver) -> None:
    async with (
        Upstream(dies) as bad,
        Upstream() as good,
        GatewayProcess(bad, good, otlp_endpoint=receiver.url) as at,
    ):
        await at.client.post(CHAT, json=ASK)
        for id in list(at.ledger._open):
            at.ledger.report(took(id, Usage(1, 0, 1)), "r1")
        span = await only(receiver)
    assert span.attributes["serve_app.retries"] == ["connection closed"]
    assert (span.status, span.attributes["serve_app.replica"]) == (0, "r1")
    [first], [second] = [[e.header("traceparent") for e in it.exchanges] for it in (bad, good)]
    assert first == second == [f"00-{span.trace_id}-{span.span_id}-{first[0][-2:]}"]


async def test_a_replica_that_is_lost_and_never_reports(receiver: Receiver) -> None:
    async def breaks(exchange: Exchange) -> None:
        await exchange.sse(b"data: 1\n\n")
        await asyncio.sleep(0.1)
        exchange.die()

    async with (
        Upstream(breaks) as upstream,
        GatewayProcess(upstream, otlp_endpoint=receiver.url) as at,
    ):
        await at.client.post(CHAT, json=STREAM)
        [id] = at.ledger._open
        at.ledger._give_up(id)
        span = await only(receiver)
    assert (span.status, span.attributes["serve_app.end"]) == (ERROR, "lost")
    assert span.attributes["http.response.status_code"] == 502
    assert "gen_ai.usage.input_tokens" not in span.attributes


async def test_a_client_that_leaves(receiver: Receiver) -> None:
    async def waits(exchange: Exchange) -> None:
        await exchange.client_gone()

    async with (
        Upstream(waits) as upstream,
        GatewayProcess(upstream, otlp_endpoint=receiver.url) as at,
    ):
        asking = asyncio.create_task(at.client.post(CHAT, json=ASK))
        assert await until(lambda: upstream.exchanges)
        asking.cancel()
        assert await until(lambda: any(it.entry for it in at.ledger._open.values()))
        report(at, Usage(11, 0, 3))
        span = await only(receiver)
    assert (span.status, span.attributes["error.type"]) == (0, "499")
    assert span.attributes["gen_ai.usage.output_tokens"] == 3


async def test_what_is_still_made_in_the_background_at_the_end_has_a_span(
    receiver: Receiver,
) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream, otlp_endpoint=receiver.url) as at:
        await at.client.post("/v1/responses", json={**ASK, "background": True})
        [id] = at.ledger._open
        at.ledger.report(Report(took(id, Usage()).called, None), "r0")
    span = await only(receiver)
    assert (span.name, span.attributes["serve_app.end"]) == ("chat org/m:1.0", "answered")
    assert "gen_ai.usage.output_tokens" not in span.attributes


async def test_the_id_of_a_stored_response_is_not_told(receiver: Receiver) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream, otlp_endpoint=receiver.url) as at:
        await at.client.get("/v1/responses/resp_secret?model=m")
        report(at, Usage())
        span = await only(receiver)
    assert span.attributes["http.route"] == "/v1/responses/{response_id}"
    assert "secret" not in str(span)


# The receiver.


@pytest.mark.parametrize("how", ["away", "refuses", "hangs"])
async def test_a_receiver_that_takes_nothing_costs_no_request(
    how: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setattr(traces, "_CLOSE_S", 0.2)
    monkeypatch.setattr(logging.getLogger("opentelemetry"), "handlers", [])  # what was said is anew
    # caplog hears of this logger or not, as other tests have left it.
    said: list[str] = []
    heard = logging.Handler()
    monkeypatch.setattr(heard, "emit", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [heard])
    url = f"http://127.0.0.1:{free_port()}" if how == "away" else receiver.url
    receiver.status, receiver.delay_s = (401, 0) if how == "refuses" else (200, 2)
    async with Upstream() as upstream, GatewayProcess(upstream, otlp_endpoint=url) as at:
        for _ in range(40):
            assert (await ask(at)).status_code == 200
        assert at.traces is not None
        assert len(at.traces._begun) == 0
        assert len(at.traces._processor._batch_processor._queue) <= 8
        if how == "refuses":
            assert await until(lambda: any("code: 401" in it for it in said))
    assert len(upstream.exchanges) == 40
    assert len(set(said)) == len(said) <= 2, "the log is not to be filled"


async def test_the_headers_are_in_the_environment(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Basic cGs6c2s=,x-more=a%20b")
    endpoint = f"{receiver.url}/api/public/otel/"
    async with Upstream() as upstream, GatewayProcess(upstream, otlp_endpoint=endpoint) as at:
        await ask(at)
        await only(receiver)
    path, headers, _ = receiver.posts[0]
    headers = {name.lower(): value for name, value in headers.items()}
    assert path == "/api/public/otel/v1/traces"
    assert (headers["authorization"], headers["x-more"]) == ("Basic cGs6c2s=", "a b")
    assert headers["content-type"] == "application/x-protobuf"


async def test_what_waits_at_the_end_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    with Receiver() as receiver:
        endpoint = f"{receiver.url}/v1/traces"
        async with Upstream() as upstream, GatewayProcess(upstream, otlp_endpoint=endpoint) as at:
            await ask(at)
            assert receiver.spans == []
        assert [span.name for span in receiver.spans] == ["chat org/m:1.0"]
        assert receiver.posts[0][0] == "/v1/traces"


@pytest.mark.skipif(COLLECTOR is None, reason="no OpenTelemetry Collector (otelcol) here")
async def test_opentelemetrys_own_collector_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    assert COLLECTOR
    endpoint, written = f"127.0.0.1:{free_port()}", tmp_path / "spans.json"
    config = {
        "receivers": {"otlp": {"protocols": {"http": {"endpoint": endpoint}}}},
        "exporters": {"file": {"path": str(written), "flush_interval": "50ms"}},
        "service": {
            "telemetry": {"metrics": {"level": "none"}},
            "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["file"]}},
        },
    }
    file = tmp_path / "otelcol.yaml"
    file.write_text(yaml.safe_dump(config))
    collector = await asyncio.create_subprocess_exec(COLLECTOR, "--config", str(file))
    try:
        async with (
            Upstream(events) as upstream,
            GatewayProcess(upstream, otlp_endpoint=f"http://{endpoint}", trace_content=True) as at,
        ):
            await ask(at, STREAM, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
            assert await until(lambda: written.is_file() and written.read_text(), 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            collector.terminate()
        await collector.wait()
    [resource] = json.loads(written.read_text())["resourceSpans"]
    [span] = resource["scopeSpans"][0]["spans"]
    assert (span["traceId"], span["parentSpanId"], span["kind"]) == (TRACE, PARENT, SERVER)
    found = {it["key"]: it["value"] for it in span["attributes"]}
    assert found["gen_ai.usage.input_tokens"] == {"intValue": "11"}
    assert "hush" in found["gen_ai.input.messages"]["stringValue"]


# The prompt.


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hush"}]}),
        ("/v1/completions", {"prompt": "hush"}),
        ("/v1/embeddings", {"input": ["hush"]}),
        ("/v1/rerank", {"query": "hush", "documents": ["hush"]}),
    ],
)
async def test_no_text_leaves_unless_it_is_asked_for(
    receiver: Receiver, path: str, body: Any
) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream, otlp_endpoint=receiver.url) as at:
        await ask(at, {"model": "m", **body}, path)
        await only(receiver)
    assert not any(b"hush" in body for _, _, body in receiver.posts)


def text(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": content}]}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (
            CHAT,
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What is it?"},
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,A"}},
                        ],
                    },
                    {"role": "assistant", "content": None, "tool_calls": []},
                ]
            },
            [text("system", "Be brief."), text("user", "What is it?")],
        ),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "é\ud83d"}]}]},
            None,  # refused: half of a surrogate pair
        ),
        ("/v1/completions", {"prompt": "Once"}, [text("user", "Once")]),
        ("/v1/completions", {"prompt": ["A", "B"]}, [text("user", "A"), text("user", "B")]),
        ("/v1/completions", {"prompt": [1, 2, 3]}, None),
        ("/v1/responses", {"input": "Hi"}, [text("user", "Hi")]),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]},
            [text("user", "Hi")],
        ),
        (CHAT, {"messages": 7}, None),
        (CHAT, {"messages": [7, {"role": 7, "content": 7}]}, None),
        (CHAT, {}, None),
    ],
)  # fmt: skip
async def test_the_prompt_in_the_form_of_the_conventions(
    receiver: Receiver, path: str, body: Any, expected: Any
) -> None:
    settings: Any = {"otlp_endpoint": receiver.url, "trace_content": True}
    async with Upstream() as upstream, GatewayProcess(upstream, **settings) as at:
        raw = json.dumps({"model": "m", **body})
        answer = await at.client.post(path, content=raw)
        report(at, Usage())
        if answer.status_code == 400:
            assert expected is None
            return
        span = await only(receiver)
    found = span.attributes.get("gen_ai.input.messages")
    assert (json.loads(found) if found else None) == expected


async def test_a_long_prompt_is_cut_and_its_end_kept(receiver: Receiver) -> None:
    settings: Any = {"otlp_endpoint": receiver.url, "trace_content": True}
    messages = [{"role": "user", "content": f"{n} " + "x" * 4000 + f" {n}"} for n in range(9)]
    async with Upstream() as upstream, GatewayProcess(upstream, **settings) as at:
        await ask(at, {**ASK, "messages": messages})
        span = await only(receiver)
    kept = [
        it["parts"][0]["content"] for it in json.loads(span.attributes["gen_ai.input.messages"])
    ]
    assert sum(map(len, kept)) == traces._MAX_TEXT
    assert [it[-1] for it in kept] == list("45678")
    assert kept[1:] == [it["content"] for it in messages[5:]]


# The settings.


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("localhost:4318", "is no URL of a receiver of OTLP over HTTP, such as http://localhost:4"),
        ("grpc://localhost:4318", "is no URL of a receiver"),
        ("http://", "is no URL of a receiver"),
        ("http://h:port", "is no URL of a receiver"),
        ("http://h/p?key=hidden", "is no URL of a receiver"),
        ("http://h h/", "is no URL of a receiver"),
        ("https://pk:hidden@h", "must have no user or password; set OTEL_EXPORTER_OTLP_HEADERS"),
        ("http://localhost:4317", "names port 4317, where receivers speak gRPC; over HTTP it is"),
        ("", "is empty; give it a value or remove it"),
    ],
)
def test_a_wrong_endpoint_is_explained(value: str, said: str) -> None:
    with pytest.raises(ConfigError) as failed:
        parse(GatewayConfig, {"otlp_endpoint": value}, "args")
    assert said in str(failed.value)
    assert "otlp_endpoint" in str(failed.value)
    assert "hidden" not in str(failed.value)


@pytest.mark.parametrize(
    "value",
    [
        "http://localhost:4318", "https://cloud.langfuse.com/api/public/otel", "http://[::1]:4318/",
        "http://otel-collector.monitoring:4318/v1/traces",
    ],
)  # fmt: skip
def test_a_good_endpoint(value: str) -> None:
    assert parse(GatewayConfig, {"otlp_endpoint": value}, "args").otlp_endpoint == value

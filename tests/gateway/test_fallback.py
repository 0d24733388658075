"""Requests that another model answers, because the one that they name has no replica for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from harness.otlp import Receiver
from harness.scripted import Exchange, GatewayProcess, Upstream, ok, reported, took, until
from ray.serve.exceptions import DeploymentUnavailableError

from serve_app.cluster.exchange import CALL_HEADER, Called, Load, Usage
from serve_app.config import keys
from serve_app.gateway import body as request_body
from serve_app.gateway.fallback import HEADER
from serve_app.gateway.ledger import Entry
from serve_app.gateway.queue import DEADLINE
from serve_app.gateway.routes import RELAYED

CHAT = "/v1/chat/completions"
KEY = f"sk-{'a':-<43}"
ASK: dict[str, Any] = {"model": "big", "messages": [{"role": "user", "content": "hi"}]}
ROOM_FOR_5 = Load(0, 0, 1, 0.0)


class Cold:
    """Serve's handle of a model whose replica takes until the test says otherwise."""

    def __init__(self) -> None:
        self.waking = 0
        self.fails = asyncio.Event()

    @contextlib.asynccontextmanager
    async def choose_replica(self) -> AsyncIterator[Any]:
        self.waking += 1
        try:
            await self.fails.wait()
            raise DeploymentUnavailableError("m")  # type: ignore[arg-type]
            yield
        finally:
            self.waking -= 1


@contextlib.asynccontextmanager
async def fleet(
    *fallback: str,
    big: Upstream | None = None,
    after_s: float = 0.0,
    args: dict[str, dict[str, Any]] | None = None,
    status: dict[str, str] | None = None,
    without: tuple[str, ...] = (),
    **config: Any,
) -> AsyncIterator[Fleet]:
    """``big`` with that fallback, ``small`` and ``tiny``, of which each has a replica.

    ``big`` has none unless it is given, and whoever wakes it waits.
    """
    settings = {"big": {"fallback": list(fallback), "fallback_after_s": after_s}}
    applications = {
        name: reported(settings.get(name, {}) | (args or {}).get(name, {}),
                       (status or {}).get(name, "RUNNING"))
        for name in ("big", "small", "tiny")
        if name not in without
    }  # fmt: skip
    async with (
        Upstream() as small,
        Upstream() as tiny,
        GatewayProcess(applications=applications, **config) as gateway,
    ):
        here = Fleet(gateway, big, small, tiny)
        for name, upstream in (("big", big), ("small", small), ("tiny", tiny)):
            if upstream and name in applications:
                gateway.board.publish(name, {name: (upstream.host, upstream.port)})
        gateway.directory.handle = lambda name: here.cold  # type: ignore[method-assign]
        gateway.ledger.listen(here)
        yield here


class Fleet:
    def __init__(
        self, gateway: GatewayProcess, big: Upstream | None, small: Upstream, tiny: Upstream
    ) -> None:
        self.gateway, self.big, self.small, self.tiny = gateway, big, small, tiny
        self.cold = Cold()
        self.entries: list[Entry] = []

    def entered(self, entry: Entry) -> None:
        self.entries.append(entry)

    async def ask(self, path: str = CHAT, body: Any = ASK, **more: Any) -> httpx.Response:
        return await self.gateway.client.post(path, json=body, **more)

    def report(self, name: str, upstream: Upstream, usage: Usage) -> None:
        for exchange in upstream.exchanges:
            called = Called.read(exchange.header(CALL_HEADER.decode())[0].encode())
            self.gateway.ledger.report(took(called.id, usage), name)

    def answered_for(self) -> dict[tuple[str, ...], float]:
        """The counter's values by the model that was named, its status, and who answered."""
        return {
            tuple(sample.labels[it] for it in ("model", "code", "to")): sample.value
            for metric in self.gateway.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "serve_app_gateway_fallbacks_total"
        }

    @property
    def waiting(self) -> int:
        return self.gateway.board.waiting("big").requests


def by(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.headers.get(HEADER)


# --- when -----------------------------------------------------------------------------------------


async def test_a_model_with_a_replica_answers_by_itself() -> None:
    async with Upstream() as big, fleet("small", big=big) as here:
        assert by(await here.ask()) == (200, None)
        assert (len(big.exchanges), len(here.small.exchanges)) == (1, 0)


async def test_one_that_does_not_start_within_its_time_is_answered_for() -> None:
    async with fleet("small", "tiny", after_s=0.2) as here:
        assert by(await here.ask()) == (200, "small")
        assert (len(here.small.exchanges), len(here.tiny.exchanges)) == (1, 0)
        assert json.loads(here.small.bodies[0]) == ASK | {"model": "small"}


async def test_the_next_ones_do_not_wait_and_it_goes_on_starting() -> None:
    async with Upstream() as big, fleet("small", after_s=0.5) as here:
        assert by(await here.ask()) == (200, "small")
        assert here.cold.waking == 1  # though nobody waits for it
        waits = here.gateway.app._send.__self__._queue._lines["big"]
        assert waits.wakes_until > 0
        assert by(await here.ask()) == (200, "small")
        here.gateway.board.publish("big", {"big": (big.host, big.port)})
        assert by(await here.ask()) == (200, None)
        assert await until(lambda: here.cold.waking == 0 and waits.attendant is None)
        assert waits.wakes_until == 0  # should it be lost, it is waited for again


async def test_one_that_nobody_asks_for_any_more_is_not_woken_for_ever() -> None:
    async with fleet("small", cold_start_timeout_s=0.3) as here:
        assert by(await here.ask()) == (200, "small")
        assert await until(lambda: here.cold.waking == 1)
        assert await until(lambda: here.cold.waking == 0)


async def test_one_that_cannot_start_is_answered_for_at_once() -> None:
    async with fleet("small", after_s=600, status={"big": "DEPLOY_FAILED"}) as here:
        assert by(await here.ask()) == (200, "small")
    async with fleet("small", after_s=600) as here:
        here.cold.fails.set()
        assert by(await here.ask()) == (200, "small")


async def test_one_without_room_is_answered_for() -> None:
    held = asyncio.Event()

    async def hold(exchange: Exchange) -> None:
        await held.wait()
        await ok(exchange)

    async with Upstream(hold) as big, fleet("small", big=big, after_s=0.2) as here:
        here.gateway.board.report("big", ROOM_FOR_5)
        sent = [asyncio.create_task(here.ask()) for _ in range(8)]
        assert await until(lambda: len(here.small.exchanges) == 3)  # of 8
        held.set()
        answers = [by(it) for it in await asyncio.gather(*sent)]
        assert sorted(answers, key=str) == [(200, "small")] * 3 + [(200, None)] * 5


async def test_a_full_queue_is_answered_for() -> None:
    async with fleet("small", after_s=600, queue={"max_requests": 1}) as here:
        waits = asyncio.create_task(here.ask())
        assert await until(lambda: here.waiting == 1)
        assert by(await here.ask()) == (200, "small")
        here.cold.fails.set()
        assert by(await waits) == (200, "small")


async def test_the_client_s_deadline_is_kept() -> None:
    async with fleet("small", "tiny", after_s=600) as here:
        answer = await here.ask(headers={DEADLINE.decode(): "300"})
        assert by(answer) == (200, "small")
        assert here.small.exchanges[0].header(DEADLINE.decode()) == ["1"]  # it was used up
        assert here.gateway.app._send.__self__._queue._lines["big"].wakes_until == 0


async def test_a_replica_that_is_lost_before_its_answer_is_answered_for() -> None:
    async def dies(exchange: Exchange) -> None:
        exchange.die()

    async with Upstream(dies) as big, fleet("small", big=big) as here:
        assert by(await here.ask()) == (200, "small")
        assert len(big.exchanges) == 1


async def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    async def dies(exchange: Exchange) -> None:
        await exchange.sse(b"data: 1\n\n")
        exchange.die()

    async with Upstream(dies) as big, fleet("small", big=big) as here:
        answer = await here.ask(body=ASK | {"stream": True})
        assert by(answer) == (200, None)
        assert "replica_lost" in answer.text
        assert here.small.exchanges == []


async def test_errors_of_the_model_are_its_answer() -> None:
    async def errs(exchange: Exchange) -> None:
        await exchange.answer(b'{"error": {"message": "no"}}', status="500 No")

    async with Upstream(errs) as big, fleet("small", big=big) as here:
        assert by(await here.ask()) == (500, None)


async def test_a_model_that_was_put_to_sleep_is_answered_for() -> None:
    async def asleep(exchange: Exchange) -> None:
        await exchange.answer(b"{}", "x-serve-app-asleep: 1", status="503 No")

    async with Upstream(asleep) as big, fleet("small", big=big, after_s=600) as here:
        assert by(await here.ask()) == (200, "small")


# --- which ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"without": ("small",)},  # there is no such model
        {"status": {"small": "DEPLOY_FAILED"}, "gone": True},
        {"status": {"small": "DEPLOYING"}, "gone": True},  # it has no replica either
    ],
)
async def test_a_fallback_that_is_not_there_is_skipped(more: dict[str, Any]) -> None:
    gone = more.pop("gone", False)
    async with fleet("small", "tiny", **more) as here:
        if gone:
            models = here.gateway.directory._models
            applications = {
                name: reported(it.config.model_dump(exclude_unset=True), it.status)
                for name, it in models.items()
                if it.config
            }
            applications["small"]["deployments"]["ModelServer"]["replicas"] = []
            here.gateway.directory.hear(applications)  # type: ignore[attr-defined]
        assert by(await here.ask()) == (200, "tiny")


async def test_without_any_the_model_is_waited_for_as_ever() -> None:
    async with fleet("other", cold_start_timeout_s=0.5) as here:
        answer = await here.ask()
        assert by(answer) == (503, None)
        assert "did not start within 0.5 seconds" in answer.json()["error"]["message"]


async def test_where_none_can_the_first_error_is_told() -> None:
    async def refuses(exchange: Exchange) -> None:
        await exchange.answer(b'{"error": {"message": "too long"}}', status="400 No")

    async with fleet("small", "tiny", after_s=0.1) as here:
        here.small.script = here.tiny.script = refuses
        answer = await here.ask()
        assert here.answered_for() == {}
        assert by(answer) == (503, None)
        error = answer.json()["error"]
        assert error["message"].startswith("The model 'big' did not start within 0.1 seconds")
        assert (error["code"], answer.headers["retry-after"]) == ("model_unavailable", "30")
        assert [len(it.exchanges) for it in (here.small, here.tiny)] == [1, 1]


async def test_what_one_refuses_the_next_one_gets() -> None:
    """Such as a prompt that is too long for it, tools, images."""

    async def refuses(exchange: Exchange) -> None:
        await exchange.answer(b'{"error": {"message": "too long"}}', status="400 No")

    async with fleet("small", "tiny") as here:
        here.small.script = refuses
        assert by(await here.ask()) == (200, "tiny")
        assert here.answered_for() == {("big", "503", "tiny"): 1}


async def test_the_errors_of_a_fallback_that_are_no_refusal_are_its_answer() -> None:
    async def errs(exchange: Exchange) -> None:
        await exchange.answer(b'{"error": {"message": "no"}}', status="500 No")

    async with fleet("small", "tiny") as here:
        here.small.script = errs
        assert by(await here.ask()) == (500, "small")


async def test_they_do_not_go_round() -> None:
    args = {"small": {"fallback": ["big"], "fallback_after_s": 0}}
    async with fleet("small", args=args, cold_start_timeout_s=0.3) as here:
        here.gateway.board.forget("small")
        answer = await here.ask()
        assert by(answer) == (503, None)
        assert "'big'" in answer.json()["error"]["message"]
        assert [it.model for it in here.entries] == ["big", "small"]


async def test_it_may_be_named_by_an_alias_or_be_an_adapter() -> None:
    args = {"small": {"served_as": ["org/small"]},
            "tiny": {"adapters": [{"name": "sql", "path": "/a"}]}}  # fmt: skip
    for id, name in (("org/small", "small"), ("sql", "tiny")):
        async with fleet(id, args=args) as here:
            assert by(await here.ask()) == (200, id)
            got: Upstream = getattr(here, name)
            assert json.loads(got.bodies[0])["model"] == id


async def test_an_adapter_s_requests_have_no_fallback() -> None:
    """Another model's answer lacks what the adapter was trained for."""
    args = {"big": {"adapters": [{"name": "sql", "path": "/a"}], "served_as": ["large"]}}
    async with fleet("small", args=args, cold_start_timeout_s=0.1) as here:
        assert by(await here.ask(body=ASK | {"model": "sql"})) == (503, None)
        assert by(await here.ask(body=ASK | {"model": "large"})) == (200, "small")


# --- requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted({it.path for it in RELAYED if it.method == "POST"}))
async def test_only_what_any_model_can_answer_is_given_away(path: str) -> None:
    text = {CHAT, f"{CHAT}/batch", "/v1/completions", "/v1/responses", "/v1/messages",
            "/cohere/v2/chat"}  # fmt: skip
    if "{" in path:
        return  # a stored response names no model
    async with fleet("small", cold_start_timeout_s=0.05) as here:
        answer = await here.ask(path)
        assert by(answer) == ((200, "small") if path in text else (503, None))


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/completions", {"prompt": [1, 2, 3]}),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}),
        (CHAT, {"logit_bias": {"50256": -100}}),
        (CHAT, {"stop_token_ids": [2]}),
        ("/v1/responses", {"input": "go on", "previous_response_id": "resp_of_a_client"}),
    ],
)
async def test_what_only_this_model_understands_waits_for_it(
    path: str, more: dict[str, Any]
) -> None:
    async with fleet("small", cold_start_timeout_s=0.05) as here:
        assert by(await here.ask(path, {"model": "big"} | more)) == (503, None)
        assert here.small.exchanges == []


@pytest.mark.parametrize(
    "more",
    [{"prompt": "hi"}, {"prompt": ["a", "b"]}, {"logit_bias": {}, "stop_token_ids": None}],
)
async def test_what_any_model_understands_does_not(more: dict[str, Any]) -> None:
    async with fleet("small") as here:
        assert by(await here.ask("/v1/completions", {"model": "big"} | more)) == (200, "small")


async def test_the_model_may_be_named_in_the_query_or_in_utf_16() -> None:
    async with fleet("small") as here:
        answer = await here.gateway.client.post(f"{CHAT}?model=big", json={"messages": []})
        assert by(answer) == (200, "small")
        content = json.dumps(ASK | {"n": "ü"}).encode("utf-16")
        assert by(await here.gateway.client.post(CHAT, content=content)) == (200, "small")
        assert json.loads(here.small.bodies[1]) == ASK | {"n": "ü", "model": "small"}


@pytest.mark.parametrize("more", ["soon", "9" * 5000])
async def test_the_first_time_that_a_client_allows_is_the_one_that_counts(more: str) -> None:
    async with fleet("small") as here:
        headers = [(DEADLINE.decode(), "60000"), (DEADLINE.decode(), more)]
        assert by(await here.ask(headers=headers)) == (200, "small")
        [left] = here.small.exchanges[0].header(DEADLINE.decode())
        assert 50_000 < int(left) <= 60_000
    async with fleet("small") as here:
        assert by(await here.ask(headers={DEADLINE.decode(): "9" * 5000})) == (200, "small")


async def test_a_form_and_an_empty_body_wait_for_their_model() -> None:
    async with fleet("small", cold_start_timeout_s=0.05) as here:
        answer = await here.gateway.client.post(CHAT, files={"a": b"b"}, data={"model": "big"})
        assert by(answer) == (503, None)
        assert by(await here.gateway.client.post(f"{CHAT}?model=big")) == (503, None)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"big","x":1.10,"y":"\\ud83d\\ude00","z":{"b":1,"a":[1e400]},"s":"\\/"}',
        b'{"x":12345678901234567890123,"model" : "other", "model": "big"}',
        '{"model":"big","text":"é — 日本 😀"}'.encode(),
    ],
)
def test_nothing_else_of_a_body_changes(body: bytes) -> None:
    changed = request_body.renamed(body, 'a"b')
    assert json.loads(changed) == json.loads(body) | {"model": 'a"b'}
    for kept in (b"1.10", b"\\ud83d", b"1e400", b"12345678901234567890123", "日本".encode()):
        assert (kept in changed) == (kept in body)


async def test_a_stream_that_waited_goes_on_with_the_fallback() -> None:
    async def streams(exchange: Exchange) -> None:
        await exchange.sse(b'data: {"model": "small"}\n\n')
        await exchange.chunk(b"")

    async with fleet("small", after_s=0.3) as here:
        here.small.script = streams
        answer = await here.ask(body=ASK | {"stream": True})
        assert by(answer) == (200, "small")
    async with fleet("small", after_s=0.5, stream_keepalive_s=0.1) as here:
        here.small.script = streams
        answer = await here.ask(body=ASK | {"stream": True})
        assert answer.text.startswith(": waiting\n\n")  # and so its head has gone
        assert answer.text.endswith('data: {"model": "small"}\n\n')


async def test_openais_sdk_sees_which_model_answered() -> None:
    async def answers(exchange: Exchange) -> None:
        named = json.loads(exchange.body)["model"]
        message = {"role": "assistant", "content": "hello"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        said = {"id": "1", "object": "chat.completion", "created": 1, "model": named,
                "choices": [choice]}  # fmt: skip
        await exchange.answer(json.dumps(said).encode(), "content-type: application/json")

    async with fleet("small") as here:
        here.small.script = answers
        url = f"{here.gateway.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as sdk:
            answer = await sdk.chat.completions.with_raw_response.create(**ASK)
            assert (answer.headers[HEADER], answer.parse().model) == ("small", "small")


# --- keys and accounts ----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def keyed(tmp_path: Path, *fallback: str, **key: Any) -> AsyncIterator[Fleet]:
    file = tmp_path / "keys.yaml"
    entry = {"name": "team", "hash": keys.digest(KEY.encode())} | key
    file.write_text(yaml.safe_dump([entry]))
    async with fleet(*fallback, keys={"file": str(file)}) as here:
        here.gateway.client.headers["authorization"] = f"Bearer {KEY}"
        yield here


async def test_a_key_gets_no_model_that_it_may_not_use(tmp_path: Path) -> None:
    async with keyed(tmp_path, "small", "tiny", models=["big", "tiny"]) as here:
        assert by(await here.ask()) == (200, "tiny")
        assert here.small.exchanges == []
        fleet_now = (await here.gateway.client.get("/fleet")).json()["models"]
        assert fleet_now["big"]["fallback"] == ["tiny"]


async def test_the_key_s_limits_for_the_fallback_count(tmp_path: Path) -> None:
    limits = {"small": {"requests_per_minute": 1}}
    async with keyed(tmp_path, "small", "tiny", model_limits=limits) as here:
        answer = await here.ask()
        assert by(answer) == (200, "small")
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        answer = await here.ask()
        assert by(answer) == (200, "tiny")
        assert "x-ratelimit-remaining-requests" not in answer.headers


async def test_the_key_s_own_limits_count_once(tmp_path: Path) -> None:
    async with keyed(tmp_path, "small", requests_per_minute=2) as here:
        assert [by(await here.ask())[0] for _ in range(3)] == [200, 200, 429]
        assert len(here.small.exchanges) == 2


async def test_usage_is_that_of_the_model_that_answered(tmp_path: Path) -> None:
    async with keyed(tmp_path, "small") as here:
        await here.ask(headers={"x-request-id": "mine"})
        here.report("small", here.small, Usage(10, 4, 7))
        told = [(it.request_id, it.model, it.model_id, it.end, it.usage) for it in here.entries]
        assert told == [
            ("mine", "big", "big", "refused", None),
            ("mine", "small", "big", "answered", Usage(10, 4, 7)),
        ]
        called = here.small.exchanges[0].header(CALL_HEADER.decode())[0]
        of = Called.read(called.encode())  # of which an orphan's entry would be made
        assert (of.key, of.model, of.model_id) == ("team", "small", "big")


async def test_it_is_counted() -> None:
    async with fleet("small", after_s=0.1) as here:
        await here.ask()
        await here.ask()
        here.gateway.metrics.sample()

        def value(name: str, **labels: str) -> float | None:
            return here.gateway.metrics.registry.get_sample_value(
                f"serve_app_gateway_{name}", labels
            )

        assert value("fallbacks_total", model="big", code="503", to="small") == 2
        assert value("requests_total", model="big", key="", code="503") == 2
        assert value("requests_total", model="small", key="", code="200") == 2
        assert value("inflight_requests", model="big") == 0


async def test_spans_tell_the_model_that_was_named_and_the_one_that_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with Receiver() as receiver:
        async with fleet("small", otlp_endpoint=receiver.url) as here:
            await here.ask()
            here.report("small", here.small, Usage(10, 4, 7))
            assert await until(lambda: len(receiver.spans) == 2)
        names = ("gen_ai.request.model", "gen_ai.response.model", "serve_app.end")
        told = [tuple(span.attributes.get(it) for it in names) for span in receiver.spans]
        assert told == [("big", None, "refused"), ("big", "small", "answered")]


async def test_a_page_of_another_origin_may_read_the_header() -> None:
    origin = "https://chat.example.com"
    async with fleet("small", cors_allow_origins=[origin]) as here:
        answer = await here.ask(headers={"origin": origin})
        assert HEADER in answer.headers["access-control-expose-headers"].split(", ")


async def test_the_list_of_models_stays_and_the_fleet_tells_of_it() -> None:
    async with fleet("small", "gone") as here:
        listed = (await here.gateway.client.get("/v1/models")).json()["data"]
        assert [it["id"] for it in listed] == ["big", "small", "tiny"]
        models = (await here.gateway.client.get("/fleet")).json()["models"]
        assert {name: it["fallback"] for name, it in models.items()} == {
            "big": ["small"], "small": [], "tiny": [],
        }  # fmt: skip

"""The limits of API keys: what is refused, what clients are told, and what counts in the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from harness.scripted import Exchange, GatewayProcess, Upstream, reported, took, until

from serve_app.cluster.exchange import Usage
from serve_app.config import keys
from serve_app.gateway.body import Size, size
from serve_app.gateway.errors import unavailable
from serve_app.gateway.ledger import Ledger
from serve_app.gateway.limits import Limits, duration
from serve_app.gateway.stages import Call, Outcome

KEY, HASH = keys.new()
CHAT = "/v1/chat/completions"
MODELS = {"m": reported({"served_as": ["org/m:1.0"]}), "other": reported({})}
NOON = 19_700 * 86400 + 43200.0


class Watch:
    """A clock that stands still but when a test moves it, and the stage that sees each call."""

    def __init__(self) -> None:
        self.now = NOON
        self.calls: list[Call] = []
        self.refuses = False

    def __call__(self) -> float:
        return self.now

    async def admit(self, call: Call) -> Call:
        if self.refuses:
            raise unavailable("no place in the queue")
        self.calls.append(call)
        return call

    def ended(self, call: Call, outcome: Outcome) -> None:
        pass


class Limited:
    """A gateway with one key, in front of one replica."""

    def __init__(self, file: Path, upstream: Upstream, key: dict[str, Any]) -> None:
        file.write_text(yaml.safe_dump([{"name": "a", "hash": HASH, **key}], sort_keys=False))
        self.watch = Watch()
        self.ledger = Ledger()
        self.limits = Limits(self.watch)
        self.gateway = GatewayProcess(
            upstream,
            applications=MODELS,
            keys={"file": str(file)},
            ledger=self.ledger,
            limits=self.limits,
            stages=[self.watch],
        )

    async def __aenter__(self) -> Limited:
        await self.gateway.__aenter__()
        self.gateway.board.publish("other", {"o0": ("127.0.0.1", self.gateway.front_ends[0].port)})
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.gateway.__aexit__(*exc)

    async def ask(self, path: str = CHAT, **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {KEY}"}
        return await self.gateway.client.post(path, json={"model": "m"} | body, headers=headers)

    async def report(self, prompt: int, cached: int, completion: int, of: int = -1) -> None:
        """What the replica tells of a request, by default of the last one."""
        id = self.watch.calls[of].id
        self.ledger.report(took(id, Usage(prompt, cached, completion), "a"), "r0")
        assert await until(lambda: id not in self.ledger._open)

    def told(self, answer: httpx.Response) -> dict[str, str]:
        start = "x-ratelimit-"
        return {k.removeprefix(start): v for k, v in answer.headers.items() if k.startswith(start)}


Start = Callable[..., Limited]


@pytest.fixture
async def start(tmp_path: Path) -> Any:
    async with Upstream() as upstream:
        yield lambda **key: Limited(tmp_path / "keys.yaml", upstream, key)


async def test_requests_per_minute(start: Start) -> None:
    async with start(requests_per_minute=2) as at:
        first = await at.ask()
        assert first.status_code == 200
        assert at.told(first) == {
            "limit-requests": "2", "remaining-requests": "1", "reset-requests": "1m10s",
        }  # fmt: skip
        at.watch.now += 30
        assert at.told(await at.ask())["remaining-requests"] == "0"
        refused = await at.ask()
        assert refused.status_code == 429
        assert refused.json()["error"] == {
            "message": "The API key 'a' has 2 requests per minute; please send this one again in "
            "40s.",
            "type": "requests", "param": None, "code": "rate_limit_exceeded",
        }  # fmt: skip
        assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == (
            "40",
            "40000",
        )
        assert at.told(refused) == {
            "limit-requests": "2", "remaining-requests": "0", "reset-requests": "1m10s",
        }  # fmt: skip
        at.watch.now += 39.9
        assert (await at.ask()).status_code == 429
        at.watch.now += 0.1
        assert (await at.ask()).status_code == 200
        assert (await at.ask()).status_code == 429


async def test_anthropics_clients_get_their_kind_of_error(start: Start) -> None:
    async with start(requests_per_minute=1) as at:
        await at.ask()
        refused = await at.ask("/v1/messages")
        assert refused.status_code == 429
        assert refused.json()["type"] == "error"
        assert refused.json()["error"]["type"] == "rate_limit_error"


async def test_tokens_are_reserved_and_then_settled(start: Start) -> None:
    async with start(tokens_per_minute=1000) as at:
        answer = await at.ask(max_tokens=400)
        reserved = len(at.watch.calls[0].request.body) / 4 + 400
        assert at.told(answer)["remaining-tokens"] == str(int(1000 - reserved))
        await at.report(20, 0, 30)
        answer = await at.ask(max_tokens=900)
        assert answer.status_code == 200
        assert int(at.told(answer)["remaining-tokens"]) == pytest.approx(1000 - 50 - 910, abs=5)
        refused = await at.ask(max_tokens=100)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        # A long answer takes more than was reserved, and that counts when it was made.
        at.watch.now += 65
        await at.report(20, 0, 1980)
        at.watch.now += 5
        refused = await at.ask(max_tokens=100)
        assert (refused.status_code, at.told(refused)["remaining-tokens"]) == (429, "0")


@pytest.mark.parametrize(("weight", "counts"), [(1.0, 150), (0.25, 75), (0.0, 50)])
async def test_cached_tokens_count_by_their_weight(
    start: Start, weight: float, counts: int
) -> None:
    async with start(tokens_per_minute=1000, cached_token_weight=weight) as at:
        await at.ask(max_tokens=100)
        await at.report(120, 100, 30)
        assert at.limits.counts.report(at.watch.now)["a"]["tokens_per_minute"] == {
            int(NOON // 10): pytest.approx(counts)
        }


async def test_a_refused_request_takes_nothing(start: Start) -> None:
    """The queue, or any stage after this one, has no place for it."""
    limits = {"requests_per_minute": 2, "tokens_per_minute": 300, "concurrent_requests": 1}
    async with start(**limits) as at:
        at.watch.refuses = True
        for _ in range(5):
            answer = await at.ask(max_tokens=200)
            assert answer.status_code == 503
            assert at.told(answer)["limit-tokens"] == "300"
        assert at.limits.counts.report(at.watch.now) == {}
        at.watch.refuses = False
        assert (await at.ask(max_tokens=200)).status_code == 200


async def test_where_nothing_is_reported_the_estimate_counts(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.gateway.ledger.PATIENCE_S", 0.01)
    async with start(tokens_per_minute=1000) as at:
        await at.ask(max_tokens=900)
        assert await until(lambda: not at.limits._reserved)
        assert (await at.ask(max_tokens=200)).status_code == 429


async def test_the_estimate_learns(start: Start) -> None:
    """From requests with long prompts and short answers."""
    async with start(tokens_per_minute=10**9) as at:
        for _ in range(150):
            await at.ask(messages=[{"role": "user", "content": "x" * 900}])
            size = len(at.watch.calls[-1].request.body)
            await at.report(size * 2, 0, 7)
        answer = await at.ask()
        taken = at.limits._reserved[at.watch.calls[-1].id].taken[0][2]
        assert taken == pytest.approx(len(at.watch.calls[-1].request.body) * 2 + 7, rel=0.05)
        assert answer.status_code == 200


async def test_an_embedding_has_no_answer_to_reserve_for(start: Start) -> None:
    async with start(tokens_per_minute=1000) as at:
        answer = await at.ask("/v1/embeddings", input="x" * 400)
        asked = len(at.watch.calls[0].request.body)
        assert at.told(answer)["remaining-tokens"] == str(int(1000 - asked / 4))


async def test_a_request_larger_than_the_limit_is_not_to_be_sent_again(start: Start) -> None:
    async with start(tokens_per_minute=1000) as at:
        refused = await at.ask(max_tokens=5000)
        assert refused.status_code == 429
        assert refused.headers["x-should-retry"] == "false"
        assert "retry-after" not in refused.headers
        assert refused.json()["error"]["message"] == (
            "This request may take about 5,008 tokens, and the API key 'a' has 1,000 tokens per "
            "minute; send less text, or lower max_tokens."
        )
    async with start(tokens_per_minute=50) as at:  # fewer than an answer usually has
        assert (await at.ask()).status_code == 200


async def test_tokens_per_day(start: Start) -> None:
    async with start(tokens_per_day=1000) as at:
        assert (await at.ask(max_tokens=900)).status_code == 200
        refused = await at.ask(max_tokens=900)
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
        assert error["message"] == (
            "The API key 'a' has 1,000 tokens per day, with room for this request of about 908 "
            "tokens in 12h0m0s."
        )
        assert refused.headers["x-should-retry"] == "false"
        assert at.told(refused)["reset-tokens"] == "12h0m0s"
        at.watch.now += 43200
        assert (await at.ask(max_tokens=900)).status_code == 200


async def test_concurrent_requests(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def waits(exchange: Exchange) -> None:
        await go.wait()
        await exchange.answer(b"{}", "content-type: application/json")

    async with (
        Upstream(waits) as upstream,
        Limited(tmp_path / "k", upstream, {"concurrent_requests": 2}) as at,
    ):
        running = [asyncio.create_task(at.ask()) for _ in range(2)]
        assert await until(lambda: len(upstream.exchanges) == 2)
        refused = await at.ask()
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["message"] == (
            "The API key 'a' may have 2 requests at once, and has; please send this one again when "
            "another has ended."
        )
        running[0].cancel()  # a client that goes away gives its place back
        assert await until(lambda: at.gateway.inflight() == [1])
        running[0] = asyncio.create_task(at.ask())
        assert await until(lambda: len(upstream.exchanges) == 3)
        go.set()
        assert [a.status_code for a in await asyncio.gather(*running)] == [200, 200]
        assert (await at.ask()).status_code == 200


async def test_the_limits_of_one_model(start: Start) -> None:
    """By any of its ids; the others have theirs, and the key's own hold for all together."""
    only = {"org/m*": {"requests_per_minute": 1}, "*": {"requests_per_minute": 2}}
    async with start(requests_per_minute=2, model_limits=only) as at:
        assert (await at.ask()).status_code == 200
        refused = await at.ask(model="org/m:1.0")
        assert refused.json()["error"]["message"] == (
            "The API key 'a' has 1 request per minute of the model 'm'; please send this one "
            "again in 1m10s."
        )
        assert at.told(refused)["limit-requests"] == "1"
        assert (await at.ask(model="other")).status_code == 200
        refused = await at.ask(model="other")
        assert "'a' has 2 requests per minute; please" in refused.text
        at.watch.now += 70
        assert (await at.ask()).status_code == 200


async def test_a_stream_tells_the_limits_too(tmp_path: Path) -> None:
    async def streams(exchange: Exchange) -> None:
        await exchange.sse(b"data: 1\n\n", b"data: [DONE]\n\n")
        await exchange.chunk(b"")

    async with (
        Upstream(streams) as upstream,
        Limited(tmp_path / "k", upstream, {"tokens_per_minute": 1000}) as at,
    ):
        answer = await at.ask(stream=True, max_tokens=10)
        assert answer.text == "data: 1\n\ndata: [DONE]\n\n"
        assert at.told(answer).keys() == {"limit-tokens", "remaining-tokens", "reset-tokens"}


async def test_who_has_no_limits_is_told_of_none(start: Start) -> None:
    async with start(model_limits={"other": {"tokens_per_minute": 1}}) as at:
        assert at.told(await at.ask()) == {}
        assert at.limits._reserved == {}


async def test_openais_sdk_waits_as_it_is_told(start: Start) -> None:
    attempts: list[int] = []
    refused: list[float] = []

    async def note(answer: httpx.Response) -> None:
        attempts.append(answer.status_code)
        refused.append(time.monotonic())

    async with start(requests_per_minute=1) as at:
        assert (await at.ask()).status_code == 200
        # There is room in 1.2 s from the refusal on.
        at.limits._clock = lambda: (
            NOON + 70 - 1.2 + (time.monotonic() - refused[0] if refused else 0.0)
        )
        async with openai.AsyncOpenAI(
            base_url=f"{at.gateway.base_url}/v1",
            api_key=KEY,
            max_retries=1,
            http_client=httpx.AsyncClient(event_hooks={"response": [note]}),
        ) as client:
            await client.chat.completions.create(model="m", messages=[])
        assert attempts == [429, 200]


async def test_openais_sdk_does_not_send_again_what_has_no_room(start: Start) -> None:
    async with start(tokens_per_day=1000) as at:
        async with openai.AsyncOpenAI(
            base_url=f"{at.gateway.base_url}/v1", api_key=KEY, max_retries=5
        ) as client:
            with pytest.raises(openai.RateLimitError) as raised:
                await client.chat.completions.create(model="m", messages=[], max_tokens=5000)
        assert raised.value.code == "insufficient_quota"
        assert at.watch.calls == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model": "m"}', Size(14, None, 1)),
        (b'{"max_tokens": 5, "n": 3}', Size(25, 5, 3)),
        (b'{"max_tokens":5,"max_completion_tokens":7}', Size(42, 7, 1)),
        (b'{"max_output_tokens": 9}', Size(24, 9, 1)),
        (b'{"max_tokens": -5, "n": true}', Size(29, None, 1)),
        (b'{"max_tokens": "9", "n": 0}', Size(27, None, 1)),
        (b'{"u": "data:image/png;base64,' + b"A" * 999 + b'"}', Size(31, None, 1)),
        (b'{"input_audio": {"data": "' + b"A" * 999 + b'"}}', Size(29, None, 1)),
        ('{"max_tokens": 5}'.encode("utf-16"), Size(17, 5, 1)),
        (b"--boundary\r\n", Size()),
        (b"", Size()),
        (b"[" * 100_000, Size()),
    ],
)
def test_the_size_of_a_body(body: bytes, expected: Size) -> None:
    assert size(body) == expected


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0ms"), (0.12, "120ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s"), (86399, "23h59m59s")],
)
def test_a_duration_is_written_as_openai_does(seconds: float, said: str) -> None:
    assert duration(seconds) == said

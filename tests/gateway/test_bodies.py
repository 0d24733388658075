"""Which model a request names, in every kind of body; and bodies that cannot be read."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import tracemalloc
from typing import Any

import pytest
from harness.scripted import Exchange, GatewayProcess, Upstream, ok, reported, until

from serve_app.gateway import body as request_body
from serve_app.gateway.errors import GatewayError

TRANSCRIBE = "/v1/audio/transcriptions"
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def error_in(answer: Any, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.json().keys() == {"error"}
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    return dict(answer.json()["error"])


# --- JSON ------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["m", "org/m:1.0"])
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www", ""])
async def test_a_json_body_is_read_whatever_its_content_type_says(id: str, kind: str) -> None:
    """The model server is the one to refuse a content type that it does not take."""
    body = json.dumps({"a": [1, {"model": "other"}], "model": id}).encode()
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        headers = {"content-type": kind} if kind else {}
        answer = await gateway.client.post(CHAT, content=body, headers=headers)
        assert answer.status_code == 200
        assert upstream.bodies == [body]
        assert upstream.exchanges[0].header("content-type") == ([kind] if kind else [])


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "missing_model"),
        (b" \n ", "missing_model"),
        (b"{}", "missing_model"),
        (b'{"Model": "m"}', "missing_model"),
        (b'{"model": null}', "missing_model"),
        (b'{"model": ""}', "missing_model"),
        (b'{"a": {"model": "m"}}', "missing_model"),
        (b'{"model": 1}', "invalid_type"),
        (b'{"model": 1e400}', "invalid_json"),
        (b'{"model": false}', "invalid_type"),
        (b'{"model": ["m"]}', "invalid_type"),
        (b'{"model": {"m": 1}}', "invalid_type"),
        (b"[]", "invalid_json"),
        (b"null", "invalid_json"),
        (b"1", "invalid_json"),
        (b'"m"', "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"model": "m"', "invalid_json"),
        (b'{"model": "m",}', "invalid_json"),
        (b'{"model": "m"}{}', "invalid_json"),
        (b"{'model': 'm'}", "invalid_json"),
        (b'{"model": "m", "x": NaN}', "invalid_json"),
        (b'{"model": "\xc3"}', "invalid_json"),
        (b'{"model": "m", "x": "\x00"}', "invalid_json"),
        (b'{"model": "m", "x": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", "invalid_json"),
        (b'{"model": "m", "x": ' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}", "invalid_json"),
    ],
)
async def test_a_body_without_a_model_never_reaches_a_replica(body: bytes, code: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(CHAT, content=body, headers=JSON)
        assert error_in(answer)["code"] == code
        assert upstream.exchanges == []


@pytest.mark.parametrize(
    "encoding",
    ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"],
)
async def test_json_in_any_unicode_encoding_is_relayed_as_it_is(encoding: str) -> None:
    """vLLM reads it by ``json.loads``, which knows them by their first bytes."""
    body = json.dumps({"model": "org/m:1.0", "x": "é😀"}, ensure_ascii=False).encode(encoding)
    assert json.loads(body)["x"] == "é😀"
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(CHAT, content=body, headers=JSON)
        assert answer.status_code == 200, answer.text
        assert upstream.bodies == [body]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "\xe9"}',
        b"\xff\xfe{",
        b"\x00{\x00",
        b"\xff\xfe\x00\x00{",
        '{"model": "m"}'.encode("utf-16")[:-1],
        b'\xef\xbb\xbf{"model": "\xc3"}',
    ],
)
async def test_bytes_in_no_unicode_encoding_are_refused_by_that_name(body: bytes) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        error = error_in(await gateway.client.post(CHAT, content=body, headers=JSON))
        assert error["code"] == "invalid_json"
        assert upstream.exchanges == []
    assert "send it in UTF-8" in error["message"] or "not valid JSON" in error["message"]


@pytest.mark.parametrize(
    "text", [r"\ud83d", r"a\ud83d b", r"\ude00", r"\ud83dA", r"\ud83d\ud83d", r"\uD83D\n"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
async def test_half_of_an_escaped_character_is_named_as_such(text: str, encoding: str) -> None:
    """Clients make it when they cut a text within an emoji; vLLM refuses it too."""
    body = f'{{"model": "m", "x": "{text}"}}'.encode(encoding)
    json.loads(body)
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        error = error_in(await gateway.client.post(CHAT, content=body, headers=JSON))
        assert error["code"] == "invalid_json"
        assert "half of a surrogate pair" in error["message"]
        assert upstream.exchanges == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (rb'{"model": "m", "x": "\ud83d\ude00"', "truncated"),
        (rb'{"model": "m", "x": "\\ud83d",}', "malformed"),
    ],
)
async def test_json_that_is_broken_elsewhere_is_not_blamed_on_a_whole_character(
    body: bytes, says: str
) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        error = error_in(await gateway.client.post(CHAT, content=body, headers=JSON))
        assert says in error["message"]
        assert upstream.exchanges == []


@pytest.mark.parametrize(
    "id", ["n", "M", "m ", " m", "m\n", "é", "😀", "../m", "m/m", "\x00", "x" * 10**6]
)
async def test_an_id_that_is_not_one_is_not_found_and_the_message_stays_short(id: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(CHAT, json={"model": id})
        error = error_in(answer, 404)
        assert error["code"] == "model_not_found"
        assert len(error["message"]) < 1000
        assert upstream.exchanges == []


async def test_the_list_of_what_exists_is_cut_and_the_closest_id_is_named() -> None:
    applications = {f"model-{n:03}": reported() for n in range(500)}
    async with GatewayProcess(applications=applications) as gateway:
        answer = await gateway.client.post(CHAT, json={"model": "model-49O"})
    message = error_in(answer, 404)["message"]
    assert "did you mean 'model-490'?" in message or "did you mean 'model-49" in message
    assert len(message) < 1000


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br, gzip"])
async def test_a_compressed_body_is_refused_by_name(encoding: str) -> None:
    """vLLM takes none either; its sentence would be about broken JSON."""
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        body = gzip.compress(b'{"model": "m"}')
        answer = await gateway.client.post(
            CHAT, content=body, headers={"content-encoding": encoding}
        )
        assert error_in(answer, 415)["code"] == "unsupported_content_encoding"
        assert upstream.exchanges == []


@pytest.mark.parametrize("encoding", ["identity", "Identity", "", "utf-8", "UTF8"])
async def test_a_content_encoding_that_compresses_nothing_changes_nothing(encoding: str) -> None:
    """``utf-8`` is no content-encoding, but clients send it, and nobody else minds."""
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        headers = {"content-encoding": encoding}
        answer = await gateway.client.post(CHAT, json={"model": "m"}, headers=headers)
        assert answer.status_code == 200, answer.text


async def test_a_body_of_many_small_pieces_costs_no_more_memory_than_one_piece() -> None:
    left = iter(range(200_000))

    async def receive() -> Any:
        more = next(left, None) is not None
        return {"type": "http.request", "body": bytes(bytearray(2)), "more_body": more}

    tracemalloc.start()
    async with request_body.Bodies(2**20, 2**20, 60).read(receive, None) as body:
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert body == bytes(400_002)
    assert peak < 2 * 2**20


# --- multipart -------------------------------------------------------------------------------


def part(disposition: str, data: bytes, *more: str) -> bytes:
    lines = [f"content-disposition: form-data; {disposition}", *more]
    return b"--B\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + data + b"\r\n"


MODEL = part('name="model"', b"org/m:1.0")
FILE = part('name="file"; filename="a.wav"', bytes(range(256)) * 500, "content-type: audio/wav")
DECOY = part(
    'name="file"; filename="a"', b'\r\ncontent-disposition: form-data; name="model"\r\n\r\nx'
)
END = b"--B--\r\n"
FORM = {"content-type": "multipart/form-data; boundary=B"}


@pytest.mark.parametrize(
    "body",
    [
        MODEL + FILE + END,
        FILE + MODEL + END,
        FILE + FILE + MODEL + FILE + END,
        DECOY + MODEL + END,
        MODEL + END + b"epilogue",
        part("name=model", b"m") + END,
        part('name="model"', b"m", "content-type: text/plain") + END,
        b"--B\r\ncontent-type: text/plain\r\n" + MODEL.removeprefix(b"--B\r\n") + END,
    ],
)
async def test_a_multipart_body_names_its_model_wherever_the_field_stands(body: bytes) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(TRANSCRIBE, content=body, headers=FORM)
        assert answer.status_code == 200, answer.text
        assert upstream.bodies == [body]
        assert upstream.exchanges[0].header("content-type") == [FORM["content-type"]]


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; boundary="B"',
        "Multipart/Form-Data; charset=utf-8; boundary=B",
        "multipart/form-data;boundary=B",
    ],
)
async def test_a_boundary_is_found_however_it_is_written(content_type: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(
            TRANSCRIBE, content=FILE + MODEL + END, headers={"content-type": content_type}
        )
        assert answer.status_code == 200, answer.text


async def test_a_form_cannot_be_in_a_charset_that_hides_its_fields() -> None:
    """In UTF-7, ``mode+AGw-`` is ``model`` for whoever reads the form by its charset."""
    hidden = MODEL.replace(b'name="model"', b'name="mode+AGw-"')
    assert hidden != MODEL
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(
            TRANSCRIBE,
            content=FILE + MODEL + hidden + END,
            headers={"content-type": "multipart/form-data; charset=UTF-7; boundary=B"},
        )
        assert answer.status_code == 400
        assert "charset" in answer.json()["error"]["message"]
        assert upstream.exchanges == []


async def test_a_form_of_the_openai_sdk_is_read() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(
            TRANSCRIBE, data={"model": "org/m:1.0"}, files={"file": ("a.wav", b"\x00" * 10**5)}
        )
        assert answer.status_code == 200
        assert len(upstream.bodies[0]) > 10**5


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", FORM["content-type"]),
        (b"no parts here", FORM["content-type"]),
        (FILE + END, FORM["content-type"]),
        (DECOY + END, FORM["content-type"]),
        (MODEL + END, "multipart/form-data"),
        (MODEL + END, "multipart/form-data; boundary="),
        (MODEL + END, "multipart/form-data; boundary=C"),
        (MODEL + END, "multipart/form-data; boundary=" + "x" * 5000),
        (b"--B\r\nbroken header\r\n\r\nm\r\n" + END, FORM["content-type"]),
        (b"--B\r\n\r\nm\r\n" + END, FORM["content-type"]),
        (b"--Bx" + MODEL, FORM["content-type"]),
        (part('name="model"', b"") + END, FORM["content-type"]),
        (FILE[:-20], FORM["content-type"]),
    ],
)
async def test_a_multipart_body_that_names_no_model_is_bad(
    body: bytes, content_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(
            TRANSCRIBE, content=body, headers={"content-type": content_type}
        )
        assert error_in(answer)["type"] == "invalid_request_error"
        assert upstream.exchanges == []
    assert not caplog.messages  # what a stranger sends does not fill the log


async def test_the_last_of_two_model_fields_counts_as_it_does_in_vllm() -> None:
    body = part('name="model"', b"x") + FILE + MODEL + END
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(TRANSCRIBE, content=body, headers=FORM)
        assert answer.status_code == 200, answer.text


# --- the query -------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["model=m", "model=org/m:1.0", "model=org%2Fm%3A1.0&x=1"])
async def test_the_query_names_the_model_of_a_request_without_a_body(query: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.get(f"/version?{query}")
        assert answer.status_code == 200
        assert [e.target for e in upstream.exchanges] == [f"/version?{query}"]


async def test_the_body_wins_over_the_query() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(f"{CHAT}?model=x", json={"model": "m"})
        assert answer.status_code == 200
        answer = await gateway.client.post(f"{CHAT}?model=m", json={"model": "x"})
        assert error_in(answer, 404)["code"] == "model_not_found"


@pytest.mark.parametrize("query", ["", "?x=1", "?models=m", "?model="])
async def test_a_route_without_a_body_is_told_where_to_name_its_model(query: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        error = error_in(await gateway.client.get(f"/tokenizer_info{query}"))
        assert (error["param"], error["code"]) == ("model", "missing_model")
        assert "'?model=<id>'" in error["message"]
        assert upstream.exchanges == []


# --- routes that are closed ------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/metrics/", "/metrics/x", "/metricsx", "/load", "/ping", "/server_info",
        "/sleep", "/wake_up",
        "/is_sleeping", "/pause", "/resume", "/is_paused", "/abort_requests",
        "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/collective_rpc",
        "/start_profile", "/stop_profile", "/scale_elastic_ep", "/is_scaling_elastic_ep",
        "/fault_tolerance/x", "/adapters", "/adapters/x", "/docs", "/docs/oauth2-redirect",
        "/redoc", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
        "/init_weight_transfer_engine", "/update_weights", "/get_world_size",
        "/metrics%2F", "/metrics%2Fx",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_operators_routes_are_closed(path: str, method: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.request(method, f"{path}?model=m", json={"model": "m"})
        error = error_in(answer, 404)
        assert error["code"] == "not_found"
        assert upstream.exchanges == []


@pytest.mark.parametrize(
    "path", ["//metrics", "/./metrics", "/x/../metrics", "/x/%2e%2e/metrics", "/x%2f..%2fmetrics"]
)
async def test_a_path_is_never_tidied_up_into_a_closed_one(path: str) -> None:
    """vLLM's app takes paths as they are, so such a one leads nowhere there."""
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        head = f"GET {path}?model=m HTTP/1.1\r\nhost: x\r\n\r\n"
        assert (await raw(gateway, head.encode())).startswith(b"HTTP/1.1 ")
        assert [e.target for e in upstream.exchanges] == []


@pytest.mark.parametrize(
    "path", ["/metrics/../version", "/metrics/%2e%2e/%2e%2e/v1", "/adapters/.."]
)
async def test_a_closed_path_is_never_tidied_up_into_an_open_one(path: str) -> None:
    """vLLM answers its metrics to whatever begins with that word, dots or not."""
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        head = await raw(gateway, f"GET {path}?model=m HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        assert head.startswith(b"HTTP/1.1 404 ")
        assert upstream.exchanges == []


# --- size ------------------------------------------------------------------------------------


async def raw(gateway: GatewayProcess, request: bytes) -> bytes:
    """What comes back, up to the end of its head, for a request that need not be whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(request)
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return head


async def test_a_declared_length_over_the_limit_is_refused_before_the_body_is_sent() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream, max_body_mib=1) as gateway:
        head = await raw(
            gateway,
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1048577\r\n\r\n",
        )
        assert head.startswith(b"HTTP/1.1 413 ")
        assert upstream.exchanges == []


async def test_a_chunked_body_is_refused_as_soon_as_it_is_over_the_limit() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream, max_body_mib=1) as gateway:
        chunk = b"80000\r\n" + b"x" * 0x80000 + b"\r\n"
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        assert (await raw(gateway, head + chunk * 3)).startswith(b"HTTP/1.1 413 ")
        assert upstream.exchanges == []


async def test_a_body_of_just_the_limit_is_relayed_however_it_is_sent() -> None:
    body = b'{"model":"m"}'.ljust(2**20)

    async def pieces() -> Any:
        for n in range(0, len(body), 1000):
            yield body[n : n + 1000]

    async with Upstream() as upstream, GatewayProcess(upstream, max_body_mib=1) as gateway:
        for content in (body, pieces()):
            answer = await gateway.client.post(CHAT, content=content)
            assert answer.status_code == 200
        over = await gateway.client.post(CHAT, content=body + b" ")
        error = error_in(over, 413)
        assert error["code"] == "request_too_large"
        assert "1 MiB" in error["message"]
        assert upstream.bodies == [body, body]


async def test_bodies_beyond_their_sum_are_refused_until_others_are_done() -> None:
    body = b'{"model":"m"}'.ljust(2**20)
    release = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await release.wait()
        await ok(exchange)

    async def pieces() -> Any:
        for n in range(0, len(body), 100_000):
            yield body[n : n + 100_000]

    async with (
        Upstream(script) as upstream,
        GatewayProcess(upstream, max_body_mib=1, max_bodies_mib=2.5) as gateway,
    ):
        asked = [asyncio.create_task(gateway.client.post(CHAT, content=body)) for _ in range(2)]
        assert await until(lambda: len(upstream.exchanges) == 2)
        for content in (body, pieces()):
            over = await gateway.client.post(CHAT, content=content)
            assert error_in(over, 503)["code"] == "gateway_overloaded"
            assert over.headers["retry-after"].isdigit()
        assert (await gateway.client.get("/v1/models")).status_code == 200  # it has no body
        small = asyncio.create_task(gateway.client.post(CHAT, json={"model": "m"}))
        assert await until(lambda: len(upstream.exchanges) == 3)
        release.set()
        assert [(await task).status_code for task in (*asked, small)] == [200] * 3
        assert (await gateway.client.post(CHAT, content=body)).status_code == 200


async def test_small_bodies_are_read_however_much_is_held() -> None:
    """Large uploads must not keep everybody's chats out."""
    release = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await release.wait()
        await ok(exchange)

    small = b'{"model":"m"}'.ljust(2**16)
    async with (
        Upstream(script) as upstream,
        GatewayProcess(upstream, max_body_mib=1, max_bodies_mib=1) as gateway,
    ):
        asked = []
        for content in (small.ljust(2**20), small):
            asked.append(asyncio.create_task(gateway.client.post(CHAT, content=content)))
            assert await until(lambda: len(upstream.exchanges) == len(asked))
        over = await gateway.client.post(CHAT, content=small + b" ")
        assert error_in(over, 503)["code"] == "gateway_overloaded"
        release.set()
        assert [(await task).status_code for task in asked] == [200] * 2


async def test_a_length_with_many_zeros_is_read() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        body = b'{"model":"m"}'
        length = b"0" * 5000 + str(len(body)).encode()
        head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %b\r\n\r\n" % (
            CHAT.encode(),
            length,
        )
        assert (await raw(gateway, head + body)).startswith(b"HTTP/1.1 200 ")


async def test_bodies_that_end_badly_are_not_held() -> None:
    bodies = request_body.Bodies(100, 150, 0.05)
    messages: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.Event().wait()

    begun = {"type": "http.request", "body": bytes(60), "more_body": True}
    for then, status in (
        ([], 408),
        ([{"type": "http.disconnect"}], 499),
        ([begun], 413),
    ):
        messages[:] = [begun, *then]
        with pytest.raises(GatewayError) as raised:
            async with bodies.read(receive, None):
                pass
        assert (raised.value.status, bodies.held) == (status, 0)
    messages[:] = [begun]
    reading = asyncio.create_task(bodies.read(receive, None).__aenter__())
    await asyncio.sleep(0.01)
    reading.cancel()
    await asyncio.wait([reading])
    assert bodies.held == 0


@pytest.mark.parametrize("pause_s", [0.1, 60])
async def test_a_body_that_takes_too_long_is_a_timeout(pause_s: float) -> None:
    """However often a piece of it comes."""

    async def trickle() -> Any:
        for byte in b'{"model":"m"}'.ljust(200):
            yield bytes([byte])
            await asyncio.sleep(pause_s)

    async with Upstream() as upstream, GatewayProcess(upstream, body_timeout_s=0.5) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 200\r\n\r\n"
        )

        async def send() -> None:
            async for byte in trickle():
                writer.write(byte)

        sending = asyncio.create_task(send())
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"}}")
        sending.cancel()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code": "request_timeout"' in answer
        assert upstream.exchanges == []


@pytest.mark.parametrize("length", [b"-1", b"1e9", b"99999999999999999999", b"5, 5", b"x"])
async def test_a_length_that_is_none_is_refused_by_someone(length: bytes) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        head = await raw(
            gateway,
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: "
            + length
            + b"\r\n\r\nhello",
        )
        assert head.split()[1] in (b"400", b"413")
        assert upstream.exchanges == []


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 13\r\ntransfer-encoding: chunked\r\n",
        b"content-length: 13\r\ncontent-length: 5\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"transfer-encoding : chunked\r\n",
        b"content-length: 13\r\nx-request-id: a\rx-b: c\r\n",
        b"content-length: 13\r\nx-request-id: a\x00\r\n",
        b"content-length: 13\r\nx-request-id: a\x1b[31m\r\n",
    ],
)
async def test_a_head_that_can_be_read_in_two_ways_is_refused(head: bytes) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        body = b'{"model":"m"}\r\nGET /metrics?model=m HTTP/1.1\r\nhost: x\r\n\r\n'
        answer = await raw(
            gateway, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n" + body
        )
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert upstream.exchanges == []


@pytest.mark.parametrize("target", ["*?model=m", "@elsewhere/x?model=m", "elsewhere:80"])
@pytest.mark.parametrize("method", ["GET", "CONNECT"])
async def test_a_target_that_is_no_path_reaches_nobody(method: str, target: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await raw(gateway, f"{method} {target} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        assert answer.split()[1] in (b"400", b"404", b"405")
        assert upstream.exchanges == []


async def test_a_client_that_waits_for_100_is_told_to_go_on_unless_its_body_is_too_large() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream, max_body_mib=1) as gateway:
        head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: "
        assert (await raw(gateway, head + b"13\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        assert (await raw(gateway, head + b"9999999\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
        assert upstream.exchanges == []


async def test_a_huge_header_does_not_reach_a_replica_and_harms_nothing() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        with socket.socket() as connection:
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, ("127.0.0.1", gateway.port))
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-large: " + b"x" * 10**6
            await loop.sock_sendall(connection, head)
        assert (await gateway.client.get("/health")).status_code == 200
        assert upstream.exchanges == []


# --- web pages -------------------------------------------------------------------------------

PAGE = "https://chat.example.com"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize("origins", [[PAGE], ["https://b.example", PAGE], ["*"]])
async def test_a_page_of_a_configured_origin_may_ask_and_read_the_request_id(
    origins: list[str],
) -> None:
    allowed = "*" if origins == ["*"] else PAGE
    async with Upstream() as upstream, GatewayProcess(upstream, cors_allow_origins=origins) as gw:
        before = await gw.client.options(CHAT, headers=PREFLIGHT)
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == allowed
        assert "POST" in before.headers["access-control-allow-methods"]
        named = before.headers["access-control-allow-headers"]
        assert named == PREFLIGHT["access-control-request-headers"]
        assert upstream.exchanges == []

        for body, status in (({"model": "m"}, 200), ({"model": "none"}, 404)):
            answer = await gw.client.post(CHAT, json=body, headers={"origin": PAGE})
            assert answer.status_code == status
            assert answer.headers.get_list("access-control-allow-origin") == [allowed]
            readable = answer.headers["access-control-expose-headers"].split(", ")
            assert {"x-request-id", "retry-after", "x-ratelimit-remaining-tokens"} <= {*readable}


async def test_a_page_of_another_origin_may_not_ask() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream, cors_allow_origins=[PAGE]) as gw:
        other = {"origin": "https://other.example"}
        before = await gw.client.options(CHAT, headers=PREFLIGHT | other)
        assert before.status_code == 400
        answer = await gw.client.post(CHAT, json={"model": "m"}, headers=other)
        for headers in (before.headers, answer.headers):
            assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE"])
async def test_a_method_that_no_route_has_is_refused_with_those_of_the_path(method: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.request(method, CHAT, headers=PREFLIGHT, json={"model": "m"})
        assert error_in(answer, 405)["code"] == "method_not_allowed"
        assert answer.headers["allow"] == "POST"
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert upstream.exchanges == []


# --- WebSockets ------------------------------------------------------------------------------


async def test_a_websocket_is_declined_in_the_envelope() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        upgrade = {
            "connection": "upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        answer = await gateway.client.get("/v1/realtime?model=m", headers=upgrade)
        assert error_in(answer, 403)["code"] == "websocket_not_supported"
        assert upstream.exchanges == []


async def test_a_websocket_is_closed_where_the_server_cannot_send_an_answer() -> None:
    async with GatewayProcess() as gateway:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
        await gateway.app(scope, receive, send)
        assert [m["type"] for m in sent] == ["websocket.close"]

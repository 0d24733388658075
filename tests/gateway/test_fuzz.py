"""Odd bytes from clients and from replicas, through the real HTTP server.

Whatever comes in: an answer within seconds, no status of ours that docs/http-api.md does not have,
errors in the envelope, nothing of the inside in them, and the next good request is answered.

FUZZ_EXAMPLES sets how many are tried of each kind; `make fuzz` tries more.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import h11
import pytest
from harness.scripted import CREDENTIAL, Exchange, GatewayProcess, Upstream, ok
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
PATIENCE_S = 20
"""Far above the gateway's own limits below, so that only a hang takes as long."""

UVICORNS = (b"Invalid HTTP request received.", b"Failed to open a WebSocket connection: ")
"""Errors of the server itself, which knows of no envelope. HAProxy refuses these requests first."""

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,  # the same ones each time in `make test`
    suppress_health_check=list(HealthCheck),
)


class Server:
    """The gateway in front of two replicas that answer by :attr:`script`, in a thread."""

    def __init__(self) -> None:
        self.script: Callable[[Exchange], Any] = ok
        self.asked: list[bytes] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(30)

    async def _run(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        limits: Any = {"body_timeout_s": 2, "request_timeout_s": 2, "max_body_mib": 1}

        async def answer(exchange: Exchange) -> None:
            self.asked.append(exchange.body)
            await self.script(exchange)
            exchange.writer.close()

        async with (
            Upstream(answer) as first,
            Upstream(answer) as second,
            GatewayProcess(first, second, front=True, **limits) as gateway,
        ):
            self._close_connections = gateway._relay.close
            self.port, self._front_ends = gateway.port, gateway.front_ends
            self.inside = [CREDENTIAL.encode(), b"Traceback", b".py", b"serve_app/"]
            self.inside += [b":%d" % it.port for it in (first, second)]
            self._ready.set()
            await self._end.wait()

    def answer_by(self, script: Callable[[Exchange], Any]) -> None:
        """Replicas that have failed are asked again at once."""
        self.script = script
        self._loop.call_soon_threadsafe(self._close_connections)  # a script may still be at one
        for front_end in self._front_ends:
            front_end.replica.avoid_until = {}
            front_end.replica.asleep_until = 0.0

    def send(self, data: bytes, *, until_closed: bool = False) -> bytes:
        """What comes back: the first read of it, or all."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE_S) as connection:
            got = b""
            try:
                connection.sendall(data)
                while piece := connection.recv(2**20):
                    got += piece
                    if not until_closed:
                        break
            except ConnectionError:
                pass  # it had answered before it had read all
            return got

    def post(self, body: bytes, *headers: bytes, path: bytes = b"/v1/chat/completions") -> bytes:
        head = [b"POST %b HTTP/1.1" % path, b"host: x", b"connection: close", *headers]
        head.append(b"content-length: %d" % len(body))
        return self.send(b"\r\n".join(head) + b"\r\n\r\n" + body, until_closed=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as it:
        yield it


@pytest.fixture(autouse=True)
def plain(server: Server) -> Iterator[None]:
    server.answer_by(ok)
    yield


def check(server: Server, got: bytes, sent: bytes) -> tuple[int, bytes] | None:
    """The status and body of a whole, proper answer; None where it was cut off."""
    for secret in server.inside:
        assert secret not in got or secret in sent, got[:2000]
    answer, body = read(got)
    if answer is None:
        return None
    headers = dict(answer.headers)
    if answer.status_code >= 400 and body is not None and not body.startswith(UVICORNS):
        error = json.loads(body)["error"]
        assert isinstance(error["message"], str), got
        assert len(body) < 4096, got
        assert headers[b"content-type"].startswith(b"application/json"), got
    return answer.status_code, body or b""


def read(got: bytes) -> tuple[h11.Response | None, bytes | None]:
    """The first answer in ``got`` as a strict client reads it; a body of None is not whole."""
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=2**21)
    client.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(got)
    client.receive_data(b"")
    answer, body = None, b""
    while True:
        try:
            event = client.next_event()
        except h11.RemoteProtocolError as error:
            assert "closed" in str(error) or "incomplete" in str(error), (error, got)
            return answer, None
        if isinstance(event, h11.Response):
            answer = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            return answer, body
        else:
            assert isinstance(event, h11.InformationalResponse), event


def still_answers(server: Server) -> None:
    server.answer_by(ok)
    assert server.post(b'{"model": "m"}').startswith(b"HTTP/1.1 200 ")


# --- what clients send ---------------------------------------------------------------------------

TOKENS = st.sampled_from(
    [
        b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS", b"TRACE", b"CONNECT", b"PRI", b"get", b"",
        b"/", b"/v1/models", b"/v1/models/m", b"/v1/chat/completions", b"/ready", b"/metrics", b"*",
        b"/v1/responses/%2e%2e", b"/%00", b"/%ff%fe", b"/%", b"//", b"/..;/x", b"/-/routes",
        b"/-/healthz", b"/version?model=m", b"/version?model=%ff", b"http://x/v1/models", b"x:80",
        b"http://[::1/", b"?", b"#", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"HTTP/2.0", b" ",
        b"\t", b"\r\n", b"\n", b"\r", b"\0", b": ", b":", b"host", b"x", b"content-length", b"0",
        b"14", b"-1", b"+14", b"1e3", b"14, 14", b"0x0e", b"18446744073709551616",
        b"transfer-encoding", b"chunked", b"identity, chunked", b"xchunked", b"gzip", b"expect",
        b"100-continue", b"connection", b"upgrade", b"h2c", b"websocket", b"close", b"keep-alive",
        b"x-request-id", b"x-request-timeout-ms", b"content-type", b"content-encoding",
        b"multipart/form-data; boundary=B", b'multipart/form-data; boundary="', b"\xff\xfe",
        b"x-serve-app-credential", b"x-serve-app-asleep", b"authorization", b"e\r\n",
        b'{"model": "m"}', b"0\r\n\r\n", b";a=b\r\n", b"ffffffffffffffff\r\n", b"--B--\r\n",
    ]
)  # fmt: skip
LINES = st.lists(TOKENS, max_size=6).map(b"".join)
HEADER = st.one_of(
    st.builds(lambda name, value: name + b": " + value, TOKENS, TOKENS),
    LINES,
    st.binary(max_size=30),
    st.just(b"x-many: 1\r\n" * 3000 + b"x: y"),
    st.integers(1, 70_000).map(lambda n: b"x-long: " + b"a" * n),
)
HEADS = st.builds(
    lambda first, headers, body: b"\r\n".join((first, *headers, b"", body)),
    st.one_of(
        st.builds(lambda *parts: b" ".join(parts), TOKENS, TOKENS, st.just(b"HTTP/1.1")),
        st.just(b"POST /v1/chat/completions HTTP/1.1"),
        LINES,
        st.binary(max_size=50),
    ),
    st.lists(HEADER, max_size=6),
    st.one_of(st.just(b'{"model": "m"}'), LINES, st.binary(max_size=200)),
)
GOOD = b"\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\n\r\n"
"""After the odd bytes: completes an unfinished head, and is answered where they were nothing."""

OURS = {200, 204, 400, 401, 403, 404, 405, 408, 413, 415, 431}


@fuzz
@given(HEADS)
@example(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 9\r\ncontent-length: 14\r\n")
@example(b"GET /-/healthz HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n")
def test_heads_and_what_follows_them(server: Server, sent: bytes) -> None:
    got = server.send(sent + GOOD)
    if got:
        checked = check(server, got, sent)
        assert checked is None or checked[0] in OURS, got
    still_answers(server)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(["m", "org/m:1.0", "\ud83d", "\0", 10**400, -0.0, 2**63]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                st.text(max_size=5),
                st.sampled_from(
                    ["model", "stream", "n", "max_tokens", "previous_response_id", "vllm_xargs",
                     "kv_transfer_params", "sampling_params", "extra_args", "priority"]
                ),
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=20,
)  # fmt: skip
PIECES = st.sampled_from(
    [b'{"model": "m"', b'{"model":', b'"m"', b"}", b"[", b"]", b",", b'"x": ', b"1e999", b"NaN",
     b"-Infinity", b'"\\ud83d"', b'"\\u0000"', b"\xff", b"\xef\xbb\xbf", b"[" * 5000, b"9" * 5000,
     b'{"a":' * 2000, b'"model": "m", ' * 50, b"\0{\0", b"//", b"--B\r\n", b"--B--\r\n",
     b"\r\n\r\n",
     b'content-disposition: form-data; name="model"\r\n\r\nm\r\n', b"content-disposition: ", b'"',
     b'form-data; name="vllm_xargs"\r\n\r\n[[[\r\n']
)  # fmt: skip
BODIES = st.one_of(
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.text(max_size=5), JSON, max_size=5).map(
        lambda value: json.dumps({**value, "model": "m"}).encode()
    ),
    st.builds(
        lambda value, encoding: json.dumps(value, ensure_ascii=False).encode(encoding, "replace"),
        JSON,
        st.sampled_from(["utf-8", "utf-16", "utf-32-le", "latin-1"]),
    ),
    st.lists(PIECES, max_size=8).map(b"".join),
    st.binary(max_size=300),
)


@fuzz
@given(
    BODIES,
    st.sampled_from(
        [b"application/json", b"multipart/form-data; boundary=B", b"multipart/form-data", b"\xff"]
    ),
    st.sampled_from(
        [b"/v1/chat/completions", b"/v1/messages", b"/v1/responses", b"/v1/audio/transcriptions",
         b"/invocations", b"/tokenize", b"/inference/v1/generate", b"/v1/embeddings?model=m"]
    ),
)  # fmt: skip
def test_bodies(server: Server, body: bytes, kind: bytes, path: bytes) -> None:
    server.asked.clear()
    got = server.post(body, b"content-type: " + kind, path=path)
    checked = check(server, got, body)
    assert checked is not None, got
    assert checked[0] in (200, 400, 404), got
    assert server.asked == ([body] if checked[0] == 200 else [])  # unchanged, or not at all
    still_answers(server)


# --- what replicas answer ------------------------------------------------------------------------

EVENTS = b'data: {"n": 1}\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n'
PARTS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK", b"HTTP/1.1 204 No Content", b"HTTP/1.1 500 x", b"HTTP/1.1 404 ",
        b"HTTP/1.1 301 x", b"HTTP/1.1 100 Continue\r\n", b"HTTP/1.1 103 x\r\n", b"HTTP/1.1 999 x",
        b"HTTP/1.1 101 Switching Protocols", b"HTTP/1.1 20 x", b"HTTP/1.0 200 OK", b"HTTP/2 200",
        b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b"content-length: 5\r\n", b"hello",
        b"content-length: 50000\r\n", b"content-length: -1\r\n", b"content-length: 5, 5\r\n",
        b"transfer-encoding: chunked\r\n", b"transfer-encoding: xchunked\r\n", b"connection: x\r\n",
        b"content-type: text/event-stream\r\n", b"content-type: application/json\r\n",
        b"\xff: \xff\r\n",
        b"location: http://10.0.0.1:1234/\r\n", b"content-encoding: gzip\r\n", b"x: y\r\n z\r\n",
        b"x-serve-app-credential: x\r\n", b"x-serve-app-asleep: 1\r\n",
        b"upgrade: h2c\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"-5\r\n",
        b"fffffffffffffffff\r\n", b"5;a=b\r\nhello\r\n", b"x: " + b"a" * 300_000, b'{"error": ',
        b'{"detail": "x"}', b"[" * 20_000, b"data: ", b"\n\n", b"x-many: 1\r\n" * 2000,
    ]
)  # fmt: skip
WELL_FRAMED = st.builds(
    lambda status, kind, cuts, end: (
        b"HTTP/1.1 %d x\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n" % (status, kind),
        *(b"%x\r\n%b\r\n" % (len(it), it) for it in _cut(EVENTS, cuts)),
        end,
    ),
    st.sampled_from([200, 200, 400, 404, 500, 503]),
    st.sampled_from([b"text/event-stream", b"application/json", b"text/event-stream; charset=x"]),
    st.lists(st.integers(1, len(EVENTS) - 1), max_size=8),
    st.sampled_from([b"0\r\n\r\n", b"", b"0\r\n", b"zz\r\n"]),
)


def _cut(data: bytes, at: list[int]) -> list[bytes]:
    marks = sorted({0, *at, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(marks)]


ANSWERS = st.one_of(
    WELL_FRAMED,
    st.lists(PARTS, max_size=8),
    st.lists(st.binary(min_size=1, max_size=60), max_size=4),
    st.lists(PARTS, max_size=8).map(lambda it: (b"HTTP/1.1 200 OK\r\n", *it)),
)


@fuzz
@given(ANSWERS, st.sampled_from(["closes", "resets"]), st.booleans())
@example([b"HTTP/1.1 200 OK\r\n\r\n"], "closes", False)
def test_a_replicas_answers(server: Server, pieces: Any, end: str, stream: bool) -> None:
    relays(server, pieces, end, stream)


@settings(fuzz, max_examples=EXAMPLES // 50)  # most take as long as a replica may be silent
@given(ANSWERS, st.booleans())
@example([b"HTTP/1.1 200 OK\r\nx: " + b"a" * 300_000], False)
def test_a_replica_that_then_falls_silent(server: Server, pieces: Any, stream: bool) -> None:
    relays(server, pieces, "waits", stream)


def relays(server: Server, pieces: Any, end: str, stream: bool) -> None:
    async def script(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.send(piece)
            await asyncio.sleep(0)
        if end == "resets":
            exchange.die()
        elif end == "waits":
            await exchange.client_gone()

    server.answer_by(script)
    body = json.dumps({"model": "m", "stream": stream}).encode()
    got = server.post(body)
    assert got, "no answer at all"
    answer, whole = read(got)
    assert answer is not None, got
    names = {name for name, _ in answer.headers}
    assert not names & {b"location", b"upgrade", b"x-serve-app-credential"}, got
    status = answer.status_code
    replied = b"HTTP/1.%b %d" % (b"1", status)
    if not any(replied in it or b"HTTP/1.0 %d" % status in it for it in pieces):
        assert whole is not None
        error = json.loads(whole)["error"]
        codes = {502: "no_stream", 503: "model_unavailable", 504: "timeout"}
        assert status in codes and error["code"] in (codes[status], "model_asleep"), got
    for secret in server.inside:
        assert secret not in got, got[:2000]
    still_answers(server)

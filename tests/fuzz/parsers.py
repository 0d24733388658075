"""The gateway's three readers of bytes, fed by atheris: `make fuzz`.

    python tests/fuzz/parsers.py body|answer|events SECONDS

Whatever comes in, only the errors that each is documented to raise may come out.
"""

from __future__ import annotations

import asyncio
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import atheris

with atheris.instrument_imports(include=["serve_app", "python_multipart", "json"]):
    from serve_app.gateway import body as request_body
    from serve_app.gateway.errors import GatewayError
    from serve_app.gateway.relay import _Events
    from serve_app.gateway.upstream import Connection, Lost, Pool

KINDS = [b"application/json", b"multipart/form-data; boundary=B", b"", b"\xff;=\xff"]


def body(data: bytes) -> None:
    """A body names a model, or is an error of the client; what is measured of it is no nonsense."""
    kind, content = (KINDS[data[0] % len(KINDS)], data[1:]) if data else (b"", b"")
    if data[:1] > b"\xe0":
        kind, _, content = data[1:].partition(b"\n")
    try:
        named = request_body.model_in(kind, b"", content)
    except GatewayError as error:
        assert error.status == 400
        assert len(error.body()) < 2000
    else:
        assert isinstance(named, str) and named
    size = request_body.size(content)
    assert 0 <= size.text <= 4 * len(content) + 8 and size.answers > 0
    request_body.asks_for_stream(content)
    try:
        request_body.previous_response_in(content)
    except GatewayError as error:
        assert error.status == 400


class _Transport:
    """What the parser asks of a socket."""

    closed = False

    def writelines(self, data: Any) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0


LOOP = asyncio.new_event_loop()


def answer(data: bytes) -> None:
    """A replica's bytes, in pieces as long as their first bytes say, are an answer or ``Lost``."""
    count = data[0] % 8 if data else 0
    cuts, rest = sorted(it * len(data) // 256 for it in data[1 : count + 1]), data[count + 1 :]
    marks = [0, *cuts, len(rest)]
    LOOP.run_until_complete(_answer([rest[a:b] for a, b in pairwise(marks)]))


async def _answer(pieces: list[bytes]) -> None:
    connection = Connection(Pool(1, None), ("127.0.0.1", 1))
    connection.connection_made(cast(Any, _Transport()))
    asking = asyncio.ensure_future(connection.ask("POST", "/", [], b""))
    await asyncio.sleep(0)
    for piece in filter(None, pieces):
        if not connection.closing:
            connection.data_received(piece)
    connection.eof_received()
    try:
        await asyncio.wait_for(asking, 5)
        assert 100 <= connection.status < 1000
        for name, value in connection.headers:
            assert not set(name + value) & set(b"\r\n\0") and name == name.lower()
        while not connection.ended:
            await asyncio.wait_for(connection.read(), 5)
    except Lost:
        pass
    connection.release()


def events(data: bytes) -> None:
    """However a stream is cut, its bytes go on in order, and in whole events."""
    count = data[0] % 16 if data else 0
    cuts, rest = sorted(it * len(data) // 256 for it in data[1 : count + 1]), data[count + 1 :]
    marks = [0, *cuts, len(rest)]
    cutter, sent = _Events(), b""
    for begin, end in pairwise(marks):
        part = cutter.take(rest[begin:end])
        assert not part or part.endswith((b"\n\n", b"\n\r\n", b"\r\r"))
        sent += part
    assert sent + cutter.rest(b"") == rest


TARGETS = {"body": body, "answer": answer, "events": events}
SEEDS = {
    "body": [
        b'\0{"model": "m", "stream": true, "n": 2, "max_tokens": 9, "previous_response_id": "r"}',
        b'\0{"model": "m", "x": "\\ud83d", "y": "data:;base64,AAAA", "vllm_xargs": {"a": [1]}}',
        b'\0{"sampling_params": {"extra_args": {"kv_transfer_params": null}}, "priority": 0}',
        b"\0" + '{"model": "é"}'.encode("utf-16"),
        b'\1--B\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--B--\r\n',
        b'\1--B\r\nContent-Disposition: form-data; name="vllm_xargs"\r\n\r\n{}\r\n--B--\r\n',
    ],
    "answer": [
        b"\0HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"\2\x40\x80HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2;a=b\r\n{}\r\n0\r\nx: y\r\n\r\n",
        b"\0HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 404 Not Found\r\nConnection: close\r\n\r\nno",
        b"\0HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\n\r\n",
        b"\0HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    ],
    "events": [b"\3\x20\x40\x60data: 1\n\ndata: 2\r\n\r\ndata: 3\r\rdata: 4\n\r\n"],
}


def main() -> None:
    name, seconds = sys.argv[1:]
    corpus = Path(".cache/fuzz-corpus", name)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed{number}").write_bytes(seed)
    options = [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=1024"]
    atheris.Setup(
        [sys.argv[0], str(corpus), "-artifact_prefix=.cache/fuzz-", *options], TARGETS[name]
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()

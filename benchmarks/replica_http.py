"""HTTP of model servers that compute nothing (:mod:`benchmarks.gateway.upstream`,
:mod:`benchmarks.routing.replicas`), to our gateway also as replicas: each reports what a request
took.
"""

from __future__ import annotations

import asyncio
from typing import cast

from httptools import HttpRequestParser

from serve_app.cluster.exchange import (
    CALL_HEADER,
    PATH,
    PROMPT_HEADER,
    Called,
    Question,
    Report,
    Usage,
)
from serve_app.replica.reports import Reports

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n"
STREAM = HEAD % b"text/event-stream; charset=utf-8" + b"transfer-encoding: chunked\r\n\r\n"


def document(body: bytes) -> bytes:
    """A whole answer of JSON."""
    return HEAD % b"application/json" + b"content-length: %d\r\n\r\n%b" % (len(body), body)


def chunk(data: bytes) -> bytes:
    """A part of a :data:`STREAM`."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    """A client's. Answers one request after the other."""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports
        self._parser = HttpRequestParser(self)

    def asked(self, path: str, body: bytes) -> None:
        """Answer a request, to ``self.transport``."""
        raise NotImplementedError

    def report(self, usage: Usage) -> None:
        """What the request took, for the gateway, if it came from one of ours."""
        if self._call:
            self._reports.add(Report(Called.read(self._call), usage))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._target = self._call = self._prompt = b""
        self._body: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == CALL_HEADER:
            self._call = value
        elif name.lower() == PROMPT_HEADER:
            self._prompt = value

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        path, body = self._target.decode(), b"".join(self._body)
        if path == PATH:
            self._exchanging = asyncio.create_task(self._exchange(Question.decode(body)))
        else:
            if self._call and self._prompt:
                self._reports.sent(Called.read(self._call).gateway, self._prompt.decode())
            self.asked(path, body)

    async def _exchange(self, question: Question) -> None:
        answer = await self._reports.answer(question)
        if not self.transport.is_closing():  # the gateway may have gone while it was held
            self.transport.write(document(answer.encode()))

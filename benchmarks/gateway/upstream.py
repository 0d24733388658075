"""Instant model servers at three ports: ``python -m benchmarks.gateway.upstream PORT [PORTS]``.

They speak as vLLM does, and to our gateway also as replicas, each of one model: they report what
each request took. Each port answers for all models (a request of another one names it as its
``user``): ``instant`` answers at once, in one write; ``paced`` sends a token to each stream every
20 ms, all in the same step as an engine does, and ``slow`` every 5 s, each at its own time as many
engines do. A stream has as many tokens as ``max_tokens`` says, and two events more: its
role and ``[DONE]``. What a gateway sends elsewhere (spans) is taken too.
"""

from __future__ import annotations

import asyncio
import random
import sys
from functools import cache, partial

import msgspec
import uvloop

from benchmarks.replica_http import HEAD, STREAM, Connection, chunk, document
from serve_app.cluster.exchange import Load, Usage
from serve_app.replica.reports import Reports

STEPS_S = {"paced": 0.02, "slow": 5.0}
"""Seconds between two tokens, by model."""

MODELS = ("instant", *STEPS_S)

_CAPACITY = 100_000
"""Requests that it can have at once: nothing shall wait in a gateway's queue."""


class _Asked(msgspec.Struct):
    model: str
    max_tokens: int = 16
    stream: bool = False
    user: str = ""

    @property
    def plays(self) -> str:
        """Which of :data:`MODELS` answers."""
        return self.user or self.model


_asked = msgspec.json.Decoder(_Asked)

_SPANS_TAKEN = HEAD % b"application/x-protobuf" + b"content-length: 0\r\n\r\n"
_LENGTHS = "".join(
    f'vllm:request_{what}_bucket{{engine="0",le="{2**n}",model_name="m"}} {n}\n'
    for what in ("prompt_tokens", "generation_tokens", "max_tokens", "prefill_tokens")
    for n in range(50)
)
_METRICS = document(_LENGTHS.encode())
"""About as many lines as vLLM's own page has."""


@cache
def _event(model: str, content: str | None, finish: str | None = None) -> bytes:
    delta = {"content": content} if content is not None else {"role": "assistant", "content": ""}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    said = {
        "id": "chatcmpl-8a0f4f3d5d5c4e5a9d1b2c3d4e5f6a7b",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": model,
        "choices": [choice],
    }
    return chunk(b"data: " + msgspec.json.encode(said) + b"\n\n")


_DONE = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _token(model: str, number: int, of: int) -> bytes:
    """The event of one token, and after the last one the stream's end."""
    word = f" word{number % 10}"  # LiteLLM ends a stream that says the same a hundred times
    return _event(model, word) if number < of else _event(model, word, "stop") + _DONE


@cache
def _whole_stream(model: str, tokens: int) -> bytes:
    events = [_token(model, number, tokens) for number in range(1, tokens + 1)]
    return b"".join((STREAM, _event(model, None), *events))


@cache
def _whole_document(model: str, tokens: int, prompt: int) -> bytes:
    message = {"role": "assistant", "content": " token" * tokens}
    said = {
        "id": "chatcmpl-8a0f4f3d5d5c4e5a9d1b2c3d4e5f6a7b",
        "object": "chat.completion",
        "created": 1700000000,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": prompt,
            "total_tokens": prompt + tokens,
            "completion_tokens": tokens,
        },
    }
    return document(msgspec.json.encode(said))


_open: dict[str, set[_Connection]] = {model: set() for model in STEPS_S}
"""The streams that have not ended, by model."""


def _streams() -> int:
    return sum(len(streams) for streams in _open.values())


class _Port:
    """What a replica knows."""

    def __init__(self) -> None:
        self.streams = 0
        self.reports = Reports(self._load)

    def _load(self) -> Load:
        return Load(self.streams, waiting=0, capacity=_CAPACITY, kv_cache_usage=0.0)


async def _step(model: str) -> None:
    """Send a token to each stream, for ever."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        due += STEPS_S[model]
        await asyncio.sleep(due - loop.time())
        for stream in list(_open[model]):
            stream.token()


class _Connection(Connection):
    def __init__(self, port: _Port) -> None:
        super().__init__(port.reports)
        self._port = port
        self._streamed: _Asked | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._streamed:
            self._ended()

    def asked(self, path: str, body: bytes) -> None:
        if path == "/v1/traces":
            self.transport.write(_SPANS_TAKEN)
        elif path == "/metrics":
            self.transport.write(_METRICS)
        elif path == "/streams":
            self.transport.write(document(b"%d" % _streams()))
        elif not body:  # whatever a router wants to know of its workers
            models = [{"id": model, "object": "model"} for model in MODELS]
            self.transport.write(document(msgspec.json.encode({"data": models})))
        else:
            self._prompt_tokens = len(body) // 4
            self._answer(_asked.decode(body))

    def token(self) -> None:
        """Send the stream its next token."""
        assert self._streamed
        self._sent += 1
        tokens = self._streamed.max_tokens
        self.transport.write(_token(self._streamed.plays, self._sent, tokens))
        if self._sent == tokens:
            self._ended()

    def _answer(self, asked: _Asked) -> None:
        model, tokens = asked.plays, asked.max_tokens
        if not asked.stream:
            self.transport.write(_whole_document(model, tokens, self._prompt_tokens))
        elif model not in STEPS_S:
            self.transport.write(_whole_stream(model, tokens))
        else:
            self._streamed, self._sent = asked, 0
            _open[model].add(self)
            self._port.streams += 1
            self.transport.write(STREAM + _event(model, None))
            self.token()
            if model == "slow":
                self._later(random.random())  # all of a client began in the same moment
            return
        self.report(Usage(self._prompt_tokens, 0, tokens))

    def _later(self, part: float = 1.0) -> None:
        """Send the next token in its time, or after a part of that."""
        if self._streamed:
            asyncio.get_running_loop().call_later(part * STEPS_S["slow"], self._next)

    def _next(self) -> None:
        if self._streamed:
            self.token()
            self._later()

    def _ended(self) -> None:
        assert self._streamed
        _open[self._streamed.plays].discard(self)
        self._streamed = None
        self._port.streams -= 1
        self.report(Usage(self._prompt_tokens, 0, self._sent))


async def main(port: int, ports: int = len(MODELS)) -> None:
    loop = asyncio.get_running_loop()
    for offset in range(ports):
        serving = partial(_Connection, _Port())
        await loop.create_server(serving, "127.0.0.1", port + offset, backlog=8192)
    await _step("paced")


if __name__ == "__main__":
    uvloop.run(main(*map(int, sys.argv[1:])))

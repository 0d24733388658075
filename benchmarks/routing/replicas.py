"""Engines in real time that compute nothing: ``python -m benchmarks.routing.replicas PORT COUNT``.

Each port is a vLLM server in what it says and in when: :mod:`benchmarks.routing.engine` decides
when a request has its first token and its last one, and what of its prompt is in the cache. A token
is four bytes of the prompt. Two events make a stream, the first token, and all others at its end: a
gateway's time for events is not measured here. To our gateway it is a replica, and reports its load
and what each request took.

A request says in ``metadata.answer`` what the engine is to generate, so that the next request of
its conversation finds the answer in the cache too.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from functools import partial
from typing import Any

import msgspec
import uvloop

from benchmarks.replica_http import STREAM, Connection, chunk, document
from benchmarks.routing.engine import BLOCK, QUARTER, Engine, Request
from benchmarks.routing.traces import BYTES_PER_TOKEN
from serve_app.cluster.exchange import Load, Usage
from serve_app.replica.reports import Reports

MODEL = "model-0"
"""The first of :class:`benchmarks.scale.fleet.Fleet`."""


class _Message(msgspec.Struct):
    content: str


class _Metadata(msgspec.Struct):
    answer: str = ""


class _Asked(msgspec.Struct):
    messages: list[_Message]
    max_tokens: int = 16
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)


_asked = msgspec.json.Decoder(_Asked)

_MODELS = document(msgspec.json.encode({"data": [{"id": MODEL, "object": "model"}]}))


_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


def _event(**fields: Any) -> bytes:
    said = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return chunk(b"data: " + msgspec.json.encode({**said, **fields}) + b"\n\n")


def _choice(content: str, finish: str | None = None) -> bytes:
    delta = {"role": "assistant", "content": content}
    return _event(choices=[{"index": 0, "delta": delta, "finish_reason": finish}])


_FIRST = _choice("a")
_LAST = _choice(" b", "length")
_DONE = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def blocks_of(text: str) -> list[int]:
    """A hash for each full block, of all text up to its end."""
    data, size = text.encode(), BLOCK * BYTES_PER_TOKEN
    found, last = [], 0
    for end in range(size, len(data) + 1, size):
        last = hash((last, data[end - size : end]))
        found.append(last)
    return found


class Replica:
    """One engine, and its step's timer."""

    def __init__(self) -> None:
        self.engine = Engine(QUARTER)
        self.reports = Reports(self._load)
        self._timer: asyncio.TimerHandle | None = None

    def add(self, request: Request) -> None:
        self.engine.add(request, asyncio.get_running_loop().time())
        self._wait()

    def _wait(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self.engine.ends != float("inf"):
            self._timer = asyncio.get_running_loop().call_at(self.engine.ends, self._step)

    def _step(self) -> None:
        first, ended = self.engine.step_ended()
        self._wait()
        for request in first:
            request.owner.first_token()
        for request in ended:
            request.owner.last_token(request)

    def _load(self) -> Load:
        engine = self.engine
        return Load(
            engine.running, len(engine.waiting), engine.speed.most_seqs, engine.kv_cache_usage,
            prefix_cache_tokens=engine.speed.kv_tokens,
        )  # fmt: skip


class _Connection(Connection):
    def __init__(self, replica: Replica) -> None:
        super().__init__(replica.reports)
        self._replica = replica

    def asked(self, path: str, body: bytes) -> None:
        if not body:  # whatever a router wants to know of its workers
            self.transport.write(_MODELS)
        elif path == "/tokenize":  # vllm-router 0.1.17 does, of each prompt
            data = _asked.decode(body).messages[0].content.encode()
            data = data[: len(data) // BYTES_PER_TOKEN * BYTES_PER_TOKEN]
            tokens = [word for (word,) in struct.iter_unpack("<I", data)]
            said = {"count": len(tokens), "max_model_len": 131072, "tokens": tokens}
            self.transport.write(document(msgspec.json.encode(said)))
        elif path != "/v1/chat/completions":
            self.transport.write(_NOT_FOUND)
        else:
            asked = _asked.decode(body)
            prompt = asked.messages[0].content
            blocks = blocks_of(prompt + asked.metadata.answer)
            length = len(prompt) // BYTES_PER_TOKEN
            self._replica.add(Request(length, asked.max_tokens, blocks, owner=self))

    def first_token(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(STREAM + _FIRST)

    def last_token(self, request: Request) -> None:
        usage = {
            "prompt_tokens": request.prompt_tokens,
            "completion_tokens": request.output_tokens,
            "total_tokens": request.prompt_tokens + request.output_tokens,
            "prompt_tokens_details": {"cached_tokens": request.cached_tokens},
        }
        if not self.transport.is_closing():
            self.transport.write(_LAST + _event(choices=[], usage=usage) + _DONE)
        self.report(Usage(request.prompt_tokens, request.cached_tokens, request.output_tokens))


async def main(port: int, count: int) -> None:
    loop = asyncio.get_running_loop()
    for number in range(count):
        serving = partial(_Connection, Replica())
        await loop.create_server(serving, "127.0.0.1", port + number, backlog=1024)
    await loop.create_future()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))

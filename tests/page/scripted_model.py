"""A model's server that answers chats, embeddings and the rest as a test tells it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from harness.scripted import Exchange, Upstream

Delta = dict[str, Any]

VECTORS = {"cat": [1.0, 0.0, 0.0], "kitten": [0.9, 0.1, 0.0], "market": [0.0, 0.2, 1.0]}
"""Embeddings, by a word of the text."""


def words(text: str) -> list[Delta]:
    """Deltas of a text, a word each."""
    first, *rest = text.split(" ")
    return [{"content": first}, *({"content": f" {word}"} for word in rest)]


class Model(Upstream):
    """Answers each chat with ``deltas``; from ``hold_after`` of them on it waits for ``go_on``."""

    def __init__(self, deltas: Sequence[Delta] = ({"content": "Hello."},)) -> None:
        super().__init__(self._answer)
        self.deltas: Sequence[Delta] = deltas
        self.hold_after: int | None = None
        self.go_on = asyncio.Event()
        self.left = 0
        """Clients that closed their connection while it waited."""

        self.metrics: dict[str, float] = {}
        """Samples of ``/metrics``, by name and labels as Prometheus writes them."""

    @property
    def chats(self) -> list[Any]:
        """The bodies of the chats so far."""
        return [json.loads(it.body) for it in self.exchanges if it.target == "/v1/chat/completions"]

    async def _answer(self, exchange: Exchange) -> None:
        if exchange.target == "/v1/chat/completions":
            await self._chat(exchange)
        elif exchange.target == "/metrics":
            page = "".join(
                f"# HELP {name} .\n# TYPE {name} untyped\n{sample} {value}\n"
                for sample, value in self.metrics.items()
                for name in [sample.partition("{")[0]]
            )
            await exchange.answer(page.encode(), "content-type: text/plain; version=0.0.4")
        else:
            answer = _OTHERS[exchange.target](json.loads(exchange.body))
            await exchange.answer(json.dumps(answer).encode(), "content-type: application/json")

    async def _chat(self, exchange: Exchange) -> None:
        await exchange.sse()
        for number, delta in enumerate(self.deltas):
            if number == self.hold_after and not await self._may_go_on(exchange):
                return
            await exchange.chunk(_event(choices=[{"index": 0, "delta": delta}]))
        finish = "tool_calls" if any("tool_calls" in it for it in self.deltas) else "stop"
        end = {"index": 0, "delta": {}, "finish_reason": finish}
        await exchange.chunk(_event(choices=[end]))
        usage = {"prompt_tokens": 7, "completion_tokens": len(self.deltas)}
        await exchange.chunk(_event(choices=[], usage=usage))
        await exchange.chunk(b"data: [DONE]\n\n")
        await exchange.chunk(b"")

    async def _may_go_on(self, exchange: Exchange) -> bool:
        """Wait; False if the client left before."""
        gone = asyncio.create_task(exchange.client_gone())
        told = asyncio.create_task(self.go_on.wait())
        await asyncio.wait({gone, told}, return_when=asyncio.FIRST_COMPLETED)
        left = gone.done()
        self.left += left
        gone.cancel()
        told.cancel()
        return not left


def _event(**event: Any) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def _embeddings(body: Any) -> Any:
    vectors = [
        next(vector for word, vector in VECTORS.items() if word in text) for text in body["input"]
    ]
    return {"data": [{"index": n, "embedding": it} for n, it in enumerate(vectors)]}


def _rerank(body: Any) -> Any:
    scored = [
        {"index": n, "relevance_score": 1 / (n + 2), "document": {"text": text}}
        for n, text in enumerate(body["documents"])
    ]
    return {"results": scored}


def _tokenize(body: Any) -> Any:
    assert body["return_token_strs"]
    pieces = body["prompt"].split(" ")
    texts = [pieces[0], *(f"Ġ{piece}" for piece in pieces[1:])]
    ids = list(range(100, 100 + len(texts)))
    return {"count": len(ids), "max_model_len": 8192, "tokens": ids, "token_strs": texts}


_OTHERS = {"/v1/embeddings": _embeddings, "/v1/rerank": _rerank, "/tokenize": _tokenize}

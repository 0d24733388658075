"""What the routing benchmark's client makes of a stream, however it comes in pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.routing import client
from benchmarks.routing.traces import Session, Turn

ROLE = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
TEXT = {"choices": [{"delta": {"content": "x"}}]}
USAGE: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}}


def sent(*events: dict[str, Any], done: bool = True) -> bytes:
    ends = ["data: [DONE]\n\n"] if done else []
    return "".join([*(f"data: {json.dumps(it)}\n\n" for it in events), *ends]).encode()


async def answered(pieces: Iterable[bytes | asyncio.Event]) -> client.Answered:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await (piece.wait() if isinstance(piece, asyncio.Event) else response.write(piece))
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    async with TestServer(app) as server:
        sessions = [Session(0.0, (Turn(((1, 4),), 4, 3),))]
        (one,) = await client.play([str(server.make_url("")).rstrip("/")], sessions)
        return one


async def test_the_first_token_is_seen_when_it_comes_whatever_the_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = asyncio.Event()
    has_text = client._has_text

    def saw(event: dict[str, Any]) -> bool:
        if has_text(event):
            seen.set()
        return has_text(event)

    monkeypatch.setattr(client, "_has_text", saw)
    first, rest = sent(ROLE, TEXT, done=False), sent(TEXT, USAGE)
    single = [first[at : at + 1] for at in range(len(first))]
    one = await answered([*single, seen, rest[:7], rest[7:]])
    assert one.error == ""
    assert one.usage == USAGE["usage"]
    assert 0 < one.ttft_s <= one.ended


async def test_of_a_long_answer_the_end_alone_is_read() -> None:
    one = await answered([sent(ROLE, *[TEXT] * 2000, USAGE)])
    assert one.error == ""
    assert one.usage == USAGE["usage"]


@pytest.mark.parametrize(
    ("events", "done", "why"),
    [
        ([TEXT, {"error": {"message": "the replica died"}}], False, "the replica died"),
        ([TEXT, {"error": {"message": "the replica died"}}, USAGE], True, "the replica died"),
        ([TEXT, USAGE], False, "cut off"),
        ([TEXT], True, "cut off"),
        ([], False, "cut off"),
    ],
)
async def test_what_is_not_whole_is_an_error(
    events: list[dict[str, Any]], done: bool, why: str
) -> None:
    assert why in (await answered([sent(*events, done=done)])).error

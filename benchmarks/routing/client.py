"""The load of a trace over HTTP: each session by itself, in real time."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.routing import traces
from benchmarks.routing.replicas import MODEL
from benchmarks.routing.simulation import quantile
from benchmarks.routing.traces import Session, Turn

_TIMEOUT_S = 300.0

_TAIL = 8192
"""Bytes of a stream's end that are read for its usage: 40,000 events/s are too many to parse."""


@dataclass
class Answered:
    """What became of one request."""

    began: float
    """Seconds after the trace's begin."""

    ttft_s: float = 0.0
    ended: float = 0.0
    usage: dict[str, Any] | None = None
    error: str = ""


def chat(turn: Turn, model: str) -> dict[str, Any]:
    """The request's body. ``metadata.answer`` is for :mod:`benchmarks.routing.replicas`."""
    stream, _ = turn.pieces[-1]
    whole = Turn((*turn.pieces[:-1], (stream, turn.prompt_tokens + turn.output_tokens)), 0, 0)
    text = traces.text(whole)
    prompt = turn.prompt_tokens * traces.BYTES_PER_TOKEN
    return {
        "model": model,
        "messages": [{"role": "user", "content": text[:prompt]}],
        "max_tokens": turn.output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "metadata": {"answer": text[prompt:]},
    }


async def play(
    urls: Sequence[str], sessions: Sequence[Session], model: str = MODEL,
    body: Callable[[Turn, str], dict[str, Any]] = chat, path: str = "/v1/chat/completions",
) -> list[Answered]:  # fmt: skip
    """Send the trace's requests when each is due, to the gateways in turn; what became of them."""
    turns = itertools.cycle(urls)
    answered: list[Answered] = []
    began = time.monotonic() + 0.5
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:

        async def session(of: Session) -> None:
            await asyncio.sleep(began + of.at - time.monotonic())
            for turn in of.turns:
                if turn.pause_s:
                    await asyncio.sleep(turn.pause_s)
                data = json.dumps(body(turn, model)).encode()
                one = Answered(time.monotonic() - began)
                answered.append(one)
                try:
                    await _ask(client, next(turns) + path, data, one)
                except (TimeoutError, aiohttp.ClientError, ValueError) as error:
                    one.error = f"{type(error).__name__}: {error}"[:200]
                one.ended = time.monotonic() - began
                if one.error:
                    break

        async with asyncio.TaskGroup() as group:
            for of in sessions:
                group.create_task(session(of))
    return answered


async def _ask(client: aiohttp.ClientSession, url: str, body: bytes, one: Answered) -> None:
    sent = time.monotonic()
    headers = {"content-type": "application/json"}
    async with client.post(url, data=body, headers=headers) as answer:
        if answer.status != 200:
            one.error = f"{answer.status} {(await answer.text())[:200]}"
            return
        chunks: list[bytes] = []
        rest = b""
        async for chunk in answer.content.iter_any():
            chunks.append(chunk)
            if not one.ttft_s:
                *lines, rest = (rest + chunk).split(b"\n")
                if any(map(_has_text, _events(lines))):
                    one.ttft_s = time.monotonic() - sent
        body = b"".join(chunks)
        lines = body[-_TAIL:].split(b"\n")
        for event in _events(lines if len(body) <= _TAIL else lines[1:]):
            one.error = str(event.get("error") or "")[:200] or one.error
            one.usage = event.get("usage") or one.usage
        if not one.error and (not body.rstrip().endswith(b"data: [DONE]") or not one.usage):
            one.error = "the stream was cut off"


def _events(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Those in whole lines of a stream."""
    return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]


def _has_text(event: dict[str, Any]) -> bool:
    """Whether it brings a token; a completion's first event always does, though it may be empty."""
    choices = event.get("choices") or ()
    return any("text" in it or (it.get("delta") or {}).get("content") for it in choices)


def measured(answered: Sequence[Answered], begin: float, end: float) -> dict[str, Any]:
    """Of requests that were sent from ``begin`` to ``end``, and of what was done in that time."""
    mine = [one for one in answered if begin <= one.began < end]
    good = [one for one in mine if not one.error]
    ended = [one for one in answered if not one.error and begin <= one.ended < end]
    prompts = sum(one.usage["prompt_tokens"] for one in good if one.usage)
    cached = sum(
        (one.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        for one in good
        if one.usage
    )
    ttft = [one.ttft_s for one in good]
    return {
        "sent": len(mine),
        "errors": sum(bool(one.error) for one in answered),
        "error": next((one.error for one in answered if one.error), None),
        "ttft_s": {f"p{q}": round(quantile(ttft, q / 100), 4) for q in (50, 90, 99)},
        "requests_per_s": round(len(ended) / (end - begin), 3),
        "tokens_per_s": round(
            sum(one.usage["completion_tokens"] for one in ended if one.usage) / (end - begin), 1
        ),
        "hit": round(cached / max(1, prompts), 4),
    }

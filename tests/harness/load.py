"""Clients that keep asking while a test breaks something, and what each request came to."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal, Self

import httpx

SILENCE_S = 120.0
"""A request without a byte for so long hangs."""


_client = httpx.Client(timeout=SILENCE_S, limits=httpx.Limits(max_connections=None))


@dataclass
class Request:
    """One request and its end, by ``time.monotonic``."""

    streamed: bool
    sent: float
    began: float | None = None
    """When the first event came that is not an error."""

    ended: float | None = None
    ending: Literal["whole", "error event", "failed"] = "failed"
    text: str = ""
    """What was generated, or why it was not."""

    @property
    def is_streaming(self) -> bool:
        return self.began is not None and self.ended is None


def ask(base_url: str, body: dict[str, Any], into: Request | None = None) -> Request:
    """A completion of exactly ``max_tokens`` tokens; never raises."""
    request = into or Request(body.get("stream", False), time.monotonic())
    try:
        with _client.stream(
            "POST", f"{base_url}/v1/completions", json={"ignore_eos": True, **body}
        ) as answer:
            if answer.status_code != 200 or not request.streamed:
                content = answer.read().decode()
                request.text = f"{answer.status_code}: {content}"
                if answer.status_code == 200:
                    request.text = json.loads(content)["choices"][0]["text"]
                    request.ending = "whole"
            else:
                _read(answer, request)
    except (httpx.HTTPError, ValueError) as error:
        request.text = repr(error)
    request.ended = time.monotonic()
    return request


def _read(answer: httpx.Response, request: Request) -> None:
    for line in answer.iter_lines():
        data = line.removeprefix("data: ")
        if not data or line.startswith(":"):  # a comment: the stream still waits
            continue
        event = {} if data == "[DONE]" else json.loads(data)
        if "error" in event:
            request.ending, request.text = "error event", data
            return
        if data == "[DONE]":
            request.ending = "whole"
            return
        request.began = request.began or time.monotonic()
        request.text += event["choices"][0]["text"]


class Load:
    """``streaming`` clients that stream and ``whole`` that do not, each asking without a pause."""

    def __init__(
        self, base_url: str, model: str, *, streaming: int = 8, whole: int = 8, max_tokens: int = 48
    ) -> None:
        self._base_url = base_url
        self._body = {"model": model, "max_tokens": max_tokens}
        self._stop = threading.Event()
        self._clients = [
            threading.Thread(target=self._client, args=(n, n < streaming), daemon=True)
            for n in range(streaming + whole)
        ]
        self.requests: list[Request] = []

    @property
    def streaming_now(self) -> int:
        return sum(r.is_streaming for r in list(self.requests))

    def _client(self, number: int, stream: bool) -> None:
        while not self._stop.is_set():
            request = Request(stream, time.monotonic())
            self.requests.append(request)
            prompt = f"{number}: Once upon a time, {len(self.requests)} years ago,"
            ask(self._base_url, {**self._body, "prompt": prompt, "stream": stream}, request)
            if request.ending != "whole":
                time.sleep(0.2)

    def __enter__(self) -> Self:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let each client finish the request that it has. One ends by itself if nothing comes."""
        self._stop.set()
        for client in self._clients:
            client.join()

    def lost(self) -> list[Request]:
        """Requests that did not come to their whole answer, by their end."""
        return sorted(
            (r for r in self.requests if r.ending != "whole"), key=lambda r: r.ended or float("inf")
        )

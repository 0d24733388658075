"""``serve-app chat``: a conversation in the terminal with a model of a running server."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from serve_app.errors import UserError, did_you_mean
from serve_app.local.endpoint import authorization
from serve_app.planner.model import runner
from serve_app.planner.model.metadata import as_folder

Message = dict[str, str]
"""``{"role": …, "content": …}``, as OpenAI's API has it."""

_PATIENCE_S = 5.0
"""Seconds for a server to tell its models. An answer may take longer: a model may be starting."""

_UNSAFE = {code: None for code in (*range(32), 127, *range(128, 160)) if code not in (9, 10)}
"""Control characters, with which an answer could move the cursor or rename the window."""


@dataclass(frozen=True)
class Server:
    """An OpenAI endpoint. ``base`` is its URL with ``/v1`` and without a slash at the end."""

    base: str
    key: str = field(default="", repr=False)
    """The API key to send; that of SERVE_APP_API_KEY where it is empty."""

    folder: Path = Path()
    """What relative paths of its models begin at."""

    @classmethod
    def at(cls, url: str, key: str = "", folder: Path = Path()) -> Server:
        """The server at a URL with or without ``/v1``."""
        url = url if "://" in url else f"http://{url}"
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UserError(f"--url is {url}, but must be like http://127.0.0.1:8000/v1")
        base = url.rstrip("/")
        return cls(base if base.endswith("/v1") else f"{base}/v1", key, folder)

    def chat_model(self, named: str | None) -> str:
        """The id of the model to talk to: the one named, else the only one that writes text.

        Raises:
            UserError: the server does not answer, has no such model, or has several.
        """
        with self._open("/models", timeout=_PATIENCE_S) as answer:
            try:
                cards = json.load(answer)["data"]
                ids = [str(card["id"]) for card in cards]
            except (OSError, ValueError, LookupError, TypeError):
                raise UserError(f"{self.base} is no OpenAI endpoint; correct --url") from None
        if named is not None:
            if named in ids:
                return named
            hint = did_you_mean(named, ids) or f" (there are: {', '.join(ids) or 'none yet'})"
            raise UserError(f"{self.base} has no model '{named}'{hint}")
        first: dict[str, str] = {}  # the first id of each model; adapters and aliases follow it
        for card in cards:
            if card.get("parent") is None:
                first.setdefault(str(card.get("root") or card["id"]), str(card["id"]))
        writing = [id for root, id in first.items() if not self._pools(root)]
        if len(writing) == 1:
            return writing[0]
        if not writing:
            there = ", ".join(ids) or "none yet"
            raise UserError(f"{self.base} has no chat model (there are: {there})")
        raise UserError(
            f"{self.base} has several models; name one: serve-app chat {' | '.join(writing)}"
        )

    def _pools(self, model: str) -> bool:
        there = self.folder / as_folder(model)
        return runner.pools(str(there) if there.is_dir() else model, {}, os.environ)

    def answer(
        self, model: str, messages: list[Message]
    ) -> Generator[tuple[str, bool], None, None]:
        """The pieces of the model's answer as they come, and whether each is only thought.

        Raises:
            UserError: the server refuses, in its own words, or goes away.
        """
        request = {"model": model, "messages": messages, "stream": True}
        finished = False
        with self._open("/chat/completions", request) as answer:
            try:
                for event in _events(answer):
                    if error := event.get("error"):
                        raise UserError(_said(error))
                    for choice in event.get("choices") or []:
                        delta = choice.get("delta") or {}
                        if thought := delta.get("reasoning") or delta.get("reasoning_content"):
                            yield thought, True
                        if text := delta.get("content"):
                            yield text, False
                        finished = finished or choice.get("finish_reason") is not None
            except (OSError, http.client.HTTPException):
                finished = False
        if not finished:
            raise UserError("the connection ended in the middle of the answer; ask again")

    def _open(
        self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None
    ) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        headers = authorization(self.key)
        if data:
            headers["content-type"] = "application/json"
        request = urllib.request.Request(self.base + path, data, headers)
        try:
            answer: http.client.HTTPResponse = self._opener().open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise UserError(_sentence(error)) from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error) or type(error).__name__
            why = getattr(why, "strerror", None) or why
            raise UserError(
                f"{self.base} does not answer ({why}); start a server with serve-app run, or name "
                "another with --url or --port"
            ) from None
        return answer

    def _opener(self) -> urllib.request.OpenerDirector:
        """Requests to this machine never use a proxy."""
        host = urlsplit(self.base).hostname or ""
        with suppress(ValueError):
            if ipaddress.ip_address(host).is_loopback:
                host = "localhost"
        proxies = urllib.request.ProxyHandler({} if host == "localhost" else None)
        return urllib.request.build_opener(proxies)


def _events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in answer:
        field, _, value = line.partition(b":")
        if field == b"data" and value.strip() != b"[DONE]":
            with suppress(ValueError):
                yield json.loads(value)


def _sentence(error: urllib.error.HTTPError) -> str:
    """What an OpenAI error envelope says, else the status."""
    try:
        return _said(json.load(error)["error"])
    except (OSError, ValueError, LookupError, TypeError):
        return (
            f"{error.url} answers {error.code} {error.reason}; it is no OpenAI endpoint, or still "
            "starting"
        )


def _said(error: Any) -> str:
    return str(error["message"] if isinstance(error, dict) and "message" in error else error)


def ask(server: Server, model: str, messages: list[Message], out: TextIO) -> str:
    """Print the model's answer to ``messages`` as it comes, and return it.

    On Ctrl-C the generation ends, and what has come is the answer. What the model thinks is shown
    on a terminal only.
    """
    text, thinking, terminal = "", False, out.isatty()

    def show(piece: str) -> None:
        out.write(piece.translate(_UNSAFE) if terminal else piece)

    try:
        with closing(server.answer(model, messages)) as pieces:
            for piece, thought in pieces:
                if thought != thinking and terminal:
                    out.write("\x1b[2m" if thought else "\x1b[0m\n\n")
                thinking = thought
                text += "" if thought else piece
                if terminal or not thought:
                    show(piece)
                    out.flush()
    except KeyboardInterrupt:
        if not terminal:
            raise
    finally:
        if terminal and thinking:
            out.write("\x1b[0m")
        out.write("\n")
        out.flush()
    return text


def once(server: Server, model: str, system: str | None, question: str) -> None:
    """Ask one question; the answer goes to standard output.

    Raises:
        UserError: the question is empty, or the server refuses.
    """
    if not question.strip():
        raise UserError("there is no question; write one to standard input, or after -m")
    try:
        ask(server, model, [*_opening(system), _from_user(question)], sys.stdout)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def converse(server: Server, model: str, system: str | None) -> None:
    """Talk until Ctrl-D or ``/exit``. A question that fails is not part of the conversation."""
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines and remembers them)
    messages = _opening(system)
    print(f"{model} at {server.base}. Ctrl-C ends an answer, Ctrl-D or /exit the conversation.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("  (Ctrl-D or /exit ends the conversation)")
            continue
        if question == "/exit":
            return
        if not question:
            continue
        messages.append(_from_user(question))
        try:
            answer = ask(server, model, messages, sys.stdout)
            messages.append({"role": "assistant", "content": answer})
        except UserError as error:
            messages.pop()
            print(f"serve-app: {error}", file=sys.stderr)


def _opening(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _from_user(question: str) -> Message:
    return {"role": "user", "content": question}

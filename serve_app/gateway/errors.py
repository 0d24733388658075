"""Errors of the gateway, each an HTTP status and an OpenAI envelope."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from serve_app.errors import envelope


class GatewayError(Exception):
    """An error answer. Any part of the gateway may raise it; one place sends it."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
        self._envelope = envelope(message, type, param=param, code=code)

    def body(self, path: str = "") -> bytes:
        """The envelope as JSON: OpenAI's, or Anthropic's on Anthropic's route."""
        return body(self._envelope, path)

    def sse_event(self, path: str) -> bytes:
        """The error as the last server-sent event, in the format of the route."""
        return sse_event(self._envelope, path)


class Unavailable(GatewayError):
    """No replica of the model takes the request now; another model may (``fallback``)."""


def body(envelope: Mapping[str, Any], path: str = "") -> bytes:
    """An envelope as JSON: OpenAI's, or Anthropic's on Anthropic's route."""
    if path.startswith("/v1/messages"):
        return json.dumps({"type": "error", **envelope}).encode()
    return json.dumps(envelope).encode()


def sse_event(envelope: Mapping[str, Any], path: str) -> bytes:
    """An envelope as the last server-sent event, in the format of the route."""
    if path.startswith("/v1/messages"):
        return b"event: error\ndata: " + body(envelope, path) + b"\n\n"
    if path.startswith("/v1/responses"):
        error = envelope["error"] if isinstance(envelope["error"], dict) else {}
        event = {"type": "error", **{k: error.get(k) for k in ("code", "message", "param")}}
        return b"event: error\ndata: " + json.dumps(event).encode() + b"\n\n"
    return b"data: " + body(envelope) + b"\n\n"


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> GatewayError:
    """400: the client must change the request."""
    return GatewayError(400, message, "invalid_request_error", param=param, code=code)


def unavailable(message: str, *, retry_after_s: int = 5) -> Unavailable:
    """503: the request is valid and may be sent again."""
    return Unavailable(
        503,
        message,
        "server_error",
        code="model_unavailable",
        headers={"retry-after": str(retry_after_s)},
    )

"""The 404 of a model server for a route that its model does not have."""

from __future__ import annotations

from collections.abc import Collection

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose

from serve_app.errors import envelope

# The routes by which clients use a model. vLLM adds only those of the model's own tasks.
_WORK = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings",
    "/v1/rerank", "/v1/score", "/classify", "/v1/audio/transcriptions", "/v1/audio/translations",
    "/pooling",
)  # fmt: skip


class NoRoute:
    """A FastAPI router's ``default``: 404, with the tasks and routes that the model has.

    The usual case is a chat request to an embedding model. FastAPI's own answer is ``Not Found``.
    """

    def __init__(self, model: str, tasks: Collection[str], paths: Collection[str]) -> None:
        self._model = model
        self._tasks = tasks
        self._routes = [route for route in _WORK if route in paths]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        error = envelope(
            f"The model '{self._model}' has no route {scope['method']} {scope['path'][:200]}. It "
            f"is for {', '.join(self._tasks)}: use POST {', '.join(self._routes)}.",
            "invalid_request_error",
            code="not_found",
        )
        await JSONResponse(error, 404)(scope, receive, send)

"""What a model server answers to a route that vLLM gave it none of."""

from __future__ import annotations

from collections.abc import Collection

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose

from serve_app.errors import envelope

# What clients use a model by; vLLM gives each model those of its tasks.
_WORK = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings",
    "/v1/rerank", "/v1/score", "/classify", "/v1/audio/transcriptions", "/v1/audio/translations",
    "/pooling",
)  # fmt: skip


class NoRoute:
    """The default of a FastAPI app's router: 404, with the tasks and routes that the model has.

    Most often it is a chat request to an embedding model; FastAPI's own says ``Not Found``.
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

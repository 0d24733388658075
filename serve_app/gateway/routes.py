"""The routes of vLLM that clients reach through the gateway: these, and no others.

vLLM has more routes. They act on the engine or show its inside, and are for operators. A test
compares this list with all routes of the installed vLLM, so that someone decides about new ones.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from serve_app.gateway.errors import GatewayError


@dataclass(frozen=True)
class Route:
    """One route of a model server."""

    method: str
    path: str
    """In OpenAPI's form: ``{name}`` stands for one segment."""

    summary: str
    form: bool = False
    """Whether the body is a multipart form. Else it is a JSON object, if there is one."""


RELAYED = (
    Route("POST", "/v1/chat/completions", "Answer a conversation"),
    Route("POST", "/v1/chat/completions/batch", "Answer several conversations"),
    Route("POST", "/v1/chat/completions/render", "Show the prompt of a conversation"),
    Route("POST", "/v1/chat/completions/derender", "Make an answer of generated tokens"),
    Route("POST", "/v1/completions", "Complete a text"),
    Route("POST", "/v1/completions/render", "Show the tokens of a prompt"),
    Route("POST", "/v1/completions/derender", "Make a completion of generated tokens"),
    Route("POST", "/v1/responses", "Create a response"),
    Route("GET", "/v1/responses/{response_id}", "Retrieve a stored response"),
    Route("POST", "/v1/responses/{response_id}/cancel", "Cancel a background response"),
    Route("POST", "/v1/messages", "Answer a conversation, in Anthropic's format"),
    Route("POST", "/v1/messages/count_tokens", "Count the tokens of a conversation"),
    Route("POST", "/v1/messages/render", "Show the prompt of a conversation"),
    Route("POST", "/v1/embeddings", "Embed texts"),
    Route("POST", "/v2/embed", "Embed texts, in Cohere's format"),
    Route("POST", "/v1/score", "Score pairs of texts"),
    Route("POST", "/score", "Score pairs of texts"),
    Route("POST", "/v1/rerank", "Order documents by a query"),
    Route("POST", "/v2/rerank", "Order documents by a query"),
    Route("POST", "/rerank", "Order documents by a query"),
    Route("POST", "/classify", "Classify texts"),
    Route("POST", "/pooling", "Pool a model's hidden states"),
    Route("POST", "/v1/audio/transcriptions", "Transcribe speech", form=True),
    Route("POST", "/v1/audio/translations", "Translate speech into English", form=True),
    Route("POST", "/tokenize", "Turn a text or a conversation into tokens"),
    Route("POST", "/detokenize", "Turn tokens into a text"),
    Route("GET", "/tokenizer_info", "Describe the tokenizer"),
    Route("POST", "/generative_scoring", "Score items by a generative model"),
    Route("POST", "/inference/v1/generate", "Generate tokens from tokens"),
    Route("POST", "/invocations", "Any of the tasks above, in SageMaker's format"),
    Route("POST", "/cohere/v2/chat", "Answer a conversation, in Cohere's format"),
    Route("POST", "/cohere/v2/chat/render", "Show the prompt of a conversation"),
    Route("GET", "/version", "Tell the version of the model's vLLM"),
)


def _pattern(path: str) -> re.Pattern[str]:
    # No segment of dots alone: vLLM's server could resolve it to a path that is not allowed.
    return re.compile(re.sub(r"\{\w+\}", r"(?!\\.\\.?(?:/|$))[^/]+", path))


_METHODS: dict[str, list[str]] = {}
for _route in RELAYED:
    _METHODS.setdefault(_route.path, []).append(_route.method)
_PATTERNS = [(_pattern(path), methods) for path, methods in _METHODS.items() if "{" in path]


def methods_of(path: str) -> list[str]:
    """The methods that clients may use on ``path``; empty where it is no route of a model.

    A path with one slash too many at its end counts, without it.
    """
    path = path.removesuffix("/")
    if found := _METHODS.get(path):
        return found
    return next((methods for pattern, methods in _PATTERNS if pattern.fullmatch(path)), [])


_FRONT_END_ALONE = ("render", "count_tokens", "tokenize")
"""How the paths end for which no engine runs: its front end answers. So it does for GET, and where
a stored response is named."""


def runs_engine(path: str) -> bool:
    """Whether an engine runs for a request to this route of a model."""
    return "POST" in _METHODS.get(path, ()) and not path.endswith(_FRONT_END_ALONE)


_STREAMED = {
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
    "/inference/v1/generate", "/cohere/v2/chat", "/invocations",
}  # fmt: skip


def may_stream(path: str) -> bool:
    """Whether this route of a model answers ``"stream": true`` with events."""
    return path in _STREAMED


_FALL_BACK = {
    "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses",
    "/v1/messages", "/cohere/v2/chat",
}  # fmt: skip


def may_fall_back(path: str) -> bool:
    """Whether another model can answer this route as well: with text, by a text.

    Vectors, scores and tokens are one model's own.
    """
    return path in _FALL_BACK


_UNDER_V1 = {path.removeprefix("/v1/") for path in _METHODS if path.startswith("/v1/")} | {"models"}


_STORED = "/v1/responses/"


def told(path: str) -> str:
    """A path as it may be written down: who knows the id of a stored response can read that."""
    if not path.startswith(_STORED):
        return path
    return f"{_STORED}{{response_id}}" + ("/cancel" if path.endswith("/cancel") else "")


def route_meant(path: str) -> str | None:
    """The route that an unknown path probably means.

    Clients with a wrong base URL leave ``/v1`` out, or write more before it.
    """
    tidy = "/" + "/".join(part for part in path.split("/") if part)
    route = tidy.rpartition("/v1/")[2].lstrip("/")
    if route in _UNDER_V1 or route.startswith("models/"):
        return "/v1/" + route
    close = difflib.get_close_matches(path[:200], [*_METHODS, "/v1/models"], n=1, cutoff=0.85)
    return close[0] if close else None


def no_route(method: str, path: str) -> GatewayError:
    """404, with the route that was probably meant."""
    meant = route_meant(path)
    hint = f"; did you mean {meant[:200]}?" if meant else ". GET /openapi.json lists all routes."
    return GatewayError(
        404,
        f"There is no route {method[:20]} {path[:200]}{hint}",
        "invalid_request_error",
        code="not_found",
    )


def not_allowed(method: str, path: str, allowed: list[str]) -> GatewayError:
    """405, with the methods that the path allows."""
    methods = ", ".join(allowed)
    return GatewayError(
        405,
        f"The method {method[:20]} is not allowed for {path[:200]}; use {methods}.",
        "invalid_request_error",
        code="method_not_allowed",
        headers={"allow": methods},
    )

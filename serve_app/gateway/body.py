"""Reads a request body within limits, and finds the model that it names."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import msgspec
from python_multipart.multipart import MultipartParser, parse_options_header

from serve_app.gateway.errors import GatewayError, invalid

Receive = Callable[[], Awaitable[Any]]

# What is wrong with a client's form the client is told: a stranger shall not fill the log with it.
logging.getLogger("python_multipart").setLevel(logging.ERROR)

_SMALL = 2**16
"""Bytes up to which a body is read however many others are held: a few large uploads must not keep
everybody's chats out."""


class Bodies:
    """Reads request bodies, with a limit for each and one for all that are held at once."""

    def __init__(self, limit: int, limit_of_all: int, timeout_s: float) -> None:
        self.held = 0
        """Bytes that the bodies of all requests in flight have together."""

        self._limit = limit
        self._limit_of_all = limit_of_all
        self._timeout_s = timeout_s

    @contextlib.asynccontextmanager
    async def read(self, receive: Receive, declared: bytes | None) -> AsyncIterator[bytes]:
        """The whole body. It counts as held until the context ends.

        The gateway keeps the body for two reasons: the model's name may be anywhere in it, and a
        second replica may have to get it too.

        Raises:
            GatewayError: 413 as soon as more bytes are declared or sent than one body may have;
                503 where the bodies of all requests would exceed their limit; 408 where the body
                takes too long.
        """
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            self._refuse(held, size)
            held += size
            self.held += size

        if declared and declared.isdigit():
            self._refuse(0, int(declared.lstrip(b"0") or b"0"))
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    body = await _read(receive, hold)
            except TimeoutError:
                raise GatewayError(
                    408,
                    f"The request body did not arrive within {self._timeout_s:g} seconds; send it "
                    "faster, or raise body_timeout_s in the gateway's args.",
                    "invalid_request_error",
                    code="request_timeout",
                ) from None
            if declared and not body and declared.strip(b"0"):
                raise invalid(
                    "The request body was lost: the HTTP server does not read that of a request "
                    "with an 'Upgrade' header; send it without one (curl: without --http2).",
                    code="body_lost",
                )
            yield body
        finally:
            self.held -= held

    def _refuse(self, held: int, more: int) -> None:
        """Refuse a body of which ``held`` bytes are here, if ``more`` would exceed a limit."""
        if held + more > self._limit:
            raise GatewayError(
                413,
                f"The request body is larger than {self._limit / 2**20:g} MiB; send less, or raise "
                "max_body_mib in the gateway's args.",
                "invalid_request_error",
                code="request_too_large",
            )
        if held + more > _SMALL and self.held + more > self._limit_of_all:
            raise GatewayError(
                503,
                f"The bodies of all running requests would be larger than "
                f"{self._limit_of_all / 2**20:g} MiB; please send the request again later. The "
                "operator can add gateway replicas, or raise max_bodies_mib in the gateway's args.",
                "server_error",
                code="gateway_overloaded",
                headers={"retry-after": "5"},
            )


async def _read(receive: Receive, hold: Callable[[int], None]) -> bytes:
    body = bytearray()  # one buffer: a client could send millions of pieces
    while True:
        try:
            message = await receive()
        except Exception as error:  # Serve's own, where its proxy has ended the request
            raise GatewayError(499, "The client went away.", "invalid_request_error") from error
        if message["type"] == "http.disconnect":
            raise GatewayError(499, "The client went away.", "invalid_request_error")
        chunk = message.get("body", b"")
        hold(len(chunk))
        last = not message.get("more_body")
        if last and not body:
            return bytes(chunk)
        body += chunk
        if last:
            return bytes(body)


class _Names(msgspec.Struct):
    """The fields of a JSON body that the gateway reads. Other fields need only be valid JSON."""

    model: Any = None
    previous_response_id: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None
    vllm_xargs: Any = None
    sampling_params: Any = None
    priority: Any = None
    stream: Any = None
    # What bounds an answer's length, in any of the APIs.
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None


_OF_CACHES = ("kv_transfer_params", "ec_transfer_params")
"""Fields that name what another engine has computed: a prompt's KV blocks, a picture's encoding."""

_decoder = msgspec.json.Decoder(_Names)


def model_in(content_type: bytes, query: bytes, body: bytes) -> str:
    """The model that a request names in its JSON or multipart body, or as ``?model=``.

    Raises:
        GatewayError: 400 for a body that cannot be read or that names no model.
    """
    kind, options = parse_options_header(content_type)
    model: Any = None
    if kind == b"multipart/form-data":
        if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
            # The model's server would read other names and values than are looked at here.
            raise invalid("A multipart body's charset can only be utf-8; leave it out.")
        model, xargs = _in_multipart(options.get(b"boundary"), body)
        _refuse_steering(_Names(vllm_xargs=xargs))
    elif body.strip():
        fields = _in_json(body)
        _refuse_steering(fields)
        model = fields.model
    if model is None:
        model = model_in_query(query)
    if model is None or model == "":
        raise invalid(
            "You must provide a model: set 'model' in the body, or as '?model=<id>', to one of the "
            "ids that GET /v1/models lists.",
            param="model",
            code="missing_model",
        )
    if not isinstance(model, str):
        raise invalid("'model' must be a string.", param="model", code="invalid_type")
    return model


def _refuse_steering(fields: _Names) -> None:
    """Refuse what steers an engine for others.

    Whoever can name blocks of a KV cache gets answers to the prompts of others (vllm#52234). And
    ``priority`` is the key's, not the client's: some of vLLM's routes ask the body alone for it.
    """
    sampling = fields.sampling_params  # of /inference/v1/generate
    extra = sampling.get("extra_args") if isinstance(sampling, dict) else None
    for name in _OF_CACHES:
        given = getattr(fields, name) is not None
        if given or any(isinstance(it, dict) and name in it for it in (fields.vllm_xargs, extra)):
            raise _not_for_clients(name, "a cache holds the prompts of others")
    if fields.priority is not None and fields.priority != 0:
        raise _not_for_clients("priority", "it is that of the API key")


def _not_for_clients(name: str, why: str) -> GatewayError:
    return invalid(
        f"'{name}' is not for clients: {why}; leave it out.", param=name, code="not_for_clients"
    )


def model_in_query(query: bytes) -> str | None:
    """The model that ``?model=`` names."""
    return next(iter(parse_qs(query.decode("latin-1")).get("model", ())), None)


def previous_response_in(body: bytes) -> str | None:
    """The id of the stored response that a ``POST /v1/responses`` continues.

    Raises:
        GatewayError: 400 for a body that is not a JSON object.
    """
    id = _in_json(body).previous_response_id if body.strip() else None
    return id if isinstance(id, str) else None  # vLLM refuses other types


_OF_ONE_MODEL = (
    "previous_response_id", "prompt_embeds", "logit_bias", "stop_token_ids", "allowed_token_ids",
)  # fmt: skip
"""Fields that only one model understands: what it has stored, its vectors, its tokens."""

_NOTHING = (b"null", b"[]", b"{}")


def is_for_one(body: bytes) -> bool:
    """Whether a body is for one model, and no other one can answer it. So is a form."""
    try:
        fields = _raw(body)
    except (ValueError, RecursionError, msgspec.DecodeError):
        return True
    if any(bytes(fields.get(name, b"null")) not in _NOTHING for name in _OF_ONE_MODEL):
        return True
    prompt = bytes(memoryview(fields.get("prompt", b""))[:100])
    return bool(re.match(rb"\[\s*[\d\[]", prompt))  # tokens, not texts


def renamed(body: bytes, model: str) -> bytes:
    """The same body with another model's id."""
    return msgspec.json.encode(_raw(body) | {"model": model})


def _raw(body: bytes) -> dict[str, Any]:
    encoding = json.detect_encoding(body)
    return _fields.decode(body if encoding == "utf-8" else body.decode(encoding))


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])

_BASE64 = (b";base64,", b'"data":')
"""What stands before an image or a sound in a JSON body."""

_MAX_MEDIA = 1000


@dataclass(frozen=True)
class Size:
    """What a body tells of the tokens that it will take."""

    text: int = 0
    """Bytes of it that are text, the JSON around them included."""

    max_completion: int | None = None
    """Tokens that each answer may have; None where the body does not say."""

    answers: int = 1


def size(body: bytes) -> Size:
    """Measure a body that :func:`model_in` has read. What is no JSON object has no text."""
    encoding = json.detect_encoding(body)
    try:
        text = body if encoding == "utf-8" else body.decode(encoding).encode()
        found = _decoder.decode(text)
    except (ValueError, RecursionError):
        return Size()
    bounds = (found.max_completion_tokens, found.max_tokens, found.max_output_tokens)
    return Size(
        len(text) - _media(text),
        next((bound for bound in bounds if _positive(bound)), None),
        found.n if _positive(found.n) else 1,
    )


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0  # True is an int, too


def _media(text: bytes) -> int:
    """Bytes of images and sounds in a JSON body."""
    found = seen = 0
    for mark in _BASE64:
        end = 0
        while seen < _MAX_MEDIA and (at := text.find(mark, end)) >= 0:
            begin = at + len(mark)
            if mark.endswith(b":"):
                begin = text.find(b'"', begin) + 1
            end = text.find(b'"', begin)
            if begin == 0 or end < 0:
                break
            found += end - begin
            seen += 1
    return found


def asks_for_stream(body: bytes) -> bool:
    """Whether a JSON body has ``"stream": true``."""
    try:
        return _in_json(body).stream is True
    except GatewayError:
        return False  # a form


# The first escaped lone surrogate; before it come only characters and whole escapes.
_HALF = re.compile(
    r"(?:[^\\]++|\\[^u]|\\u(?![dD][89a-fA-F])|\\u[dD][89abAB]..\\u[dD][c-fC-F])*+"
    r"(\\u[dD][89a-fA-F]..)",
    re.DOTALL,
)


def _in_json(body: bytes) -> _Names:
    # vLLM reads the body with json.loads, which accepts UTF-16, UTF-32 and a byte order mark.
    encoding = json.detect_encoding(body)
    try:
        return _decoder.decode(body if encoding == "utf-8" else body.decode(encoding))
    except msgspec.ValidationError:
        problem = "must be a JSON object"
    except UnicodeDecodeError:
        problem = f"is no text in {encoding.upper()}; send it in UTF-8"
    except (msgspec.DecodeError, RecursionError) as error:
        problem = f"is not valid JSON: {error}"
        # A part is enough for a hint, and the rest would keep the event loop for seconds.
        if half := _HALF.match(body[: 2**18].decode(encoding, "replace")):
            problem = (
                f"holds '{half[1]}', half of a surrogate pair: a character such as an emoji was "
                "cut in two; send it whole"
            )
    raise invalid(f"The request body {problem}.", code="invalid_json")


_IN_FORMS = (b"model", b"vllm_xargs")
_MAX_PARTS = 1000  # the limit of Starlette, with which vLLM reads the body next


def _in_multipart(boundary: bytes | None, body: bytes) -> tuple[str | None, Any]:
    """The fields ``model`` and ``vllm_xargs``, the latter as vLLM reads it: from JSON."""
    if not boundary:
        raise invalid("The multipart body has no boundary in its content-type.")
    header_name = header_value = b""
    in_field = b""
    found: dict[bytes, list[bytes]] = {}

    def on_header_field(data: bytes, start: int, end: int) -> None:
        nonlocal header_name
        header_name += data[start:end]

    def on_header_value(data: bytes, start: int, end: int) -> None:
        nonlocal header_value
        header_value += data[start:end]

    def on_header_end() -> None:
        nonlocal header_name, header_value, in_field
        if header_name.lower() == b"content-disposition":
            in_field = parse_options_header(header_value)[1].get(b"name", b"")
            if in_field in _IN_FORMS:
                found[in_field] = []  # of several the last one counts, as in vLLM
        header_name = header_value = b""

    def on_part_data(data: bytes, start: int, end: int) -> None:
        if in_field in found:
            found[in_field].append(data[start:end])

    parts = 0

    def on_part_begin() -> None:
        nonlocal in_field, parts
        in_field = b""
        parts += 1
        if parts > _MAX_PARTS:
            raise ValueError("too many parts")

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": on_part_begin,
                "on_header_field": on_header_field,
                "on_header_value": on_header_value,
                "on_header_end": on_header_end,
                "on_part_data": on_part_data,
            },
        )
        parser.write(body)
        parser.finalize()
    except Exception:
        raise invalid(
            f"The multipart body is malformed, or has more than {_MAX_PARTS} parts."
        ) from None
    model, xargs = (b"".join(found[name]) if name in found else None for name in _IN_FORMS)
    try:
        parsed = json.loads(xargs) if xargs else None
    except (ValueError, RecursionError):
        raise invalid("'vllm_xargs' must be a JSON object.", param="vllm_xargs") from None
    return None if model is None else model.decode("utf-8", "replace"), parsed

"""A call's key: its prompt's beginning, in blocks that are hashed one after the other.

A block's hash is that of all bytes up to its end. So two prompts have the hashes of their common
beginning in common, as vLLM's prefix cache has (it does the same with 16 tokens instead of 1 KiB).
No tokenizer is asked: equal JSON makes equal tokens, and a client library writes the same JSON for
the same messages.
"""

from __future__ import annotations

import json
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from serve_app.gateway.routing.index import Block
from serve_app.gateway.stages import Call

BLOCK = 1024
"""Bytes of a block, about 250 tokens. Smaller ones cost more time and find little more: what is in
the cache of a prompt is known up to one block."""

BYTES = 8
"""Of a block's hash: gateways tell each other of prompts, a hundredth of what these are."""

MOST = 512 * BLOCK
"""Bytes of a prompt that are looked at, 128k tokens of English. It takes 0.15 ms per 100 kB on the
event loop, where everybody waits; a longer prompt counts as cached beyond, if all of this is."""

_BASE64 = (b";base64,", b'"data":"', b'"data": "')
"""What stands before an image or a sound, in OpenAI's and in Anthropic's format."""

_MEDIA_SEEN = 4096
"""Bytes at each end of an image or a sound that are hashed, with its length: all of it would take
1 ms per MB, and what is compressed and differs is seldom as long."""


@dataclass(frozen=True)
class Prompt:
    """What the choice of a replica needs to know of a call."""

    blocks: tuple[Block, ...]
    """Of each whole block the hash; none where the prompt is shorter, or its route has no cache."""

    size: int
    """Bytes of the whole prompt. An image counts as one block."""

    streams: bool = True
    """Whether the first byte of its answer tells that the prompt has been read."""

    answers: int = 1
    """As many times an engine counts its tokens."""

    session: str | None = None
    """What the client calls its session, where the settings say that it decides."""


class _Body(msgspec.Struct):
    """The fields that make a prompt, in all APIs, as they are in the JSON."""

    cache_salt: msgspec.Raw = msgspec.Raw()
    chat_template: msgspec.Raw = msgspec.Raw()
    chat_template_kwargs: msgspec.Raw = msgspec.Raw()
    reasoning_effort: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    token_ids: msgspec.Raw = msgspec.Raw()
    stream: msgspec.Raw = msgspec.Raw()
    n: msgspec.Raw = msgspec.Raw()
    prompt_cache_key: msgspec.Raw = msgspec.Raw()


_ORDER = (
    "cache_salt", "chat_template", "chat_template_kwargs", "reasoning_effort", "tools",
    "documents", "system", "instructions", "messages", "input", "prompt", "token_ids",
)  # fmt: skip
"""The order in which chat templates write them, whatever the client's."""

_PATHS = {
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
    "/inference/v1/generate", "/cohere/v2/chat", "/invocations",
}  # fmt: skip
"""Routes whose prompts are worth a place in a cache: they generate."""

_decode = msgspec.json.Decoder(_Body).decode
_text = msgspec.json.Decoder(str | int | None).decode

SESSION = b"x-session-id"
"""The header that names a client's session."""


def generates(path: str) -> bool:
    """Whether a route of a model generates tokens, so that its prompts stay in the KV cache."""
    return path in _PATHS


def of(call: Call, *, session: bool = False, media: bool = True) -> Prompt:
    """A call's prompt. What cannot be read has no blocks; vLLM tells the client what is wrong.

    Args:
        session: whether to look for the client's session.
        media: whether to look for images and sounds, which costs a third of the time.
    """
    body = call.request.body
    try:
        encoding = json.detect_encoding(body)
        fields = _decode(body if encoding == "utf-8" else body.decode(encoding))
    except (ValueError, RecursionError):
        return Prompt((), len(body))
    # Of an alias the cache is the model's own.
    adapter = call.model_id if call.model_id in call.model.adapters else ""
    seed = f"{call.model.name}\0{adapter}\0".encode()
    parts = (raw for name in _ORDER if (raw := bytes(getattr(fields, name))))
    blocks, size = hashed(_without_media(parts) if media else parts, seed)
    # The first events of a response come before its prompt has been read.
    streams = bytes(fields.stream) == b"true" and call.request.path != "/v1/responses"
    n = bytes(fields.n)
    answers = max(1, int(n)) if n.isdigit() and len(n) < 6 else 1
    named = _session(call, fields) if session else None
    return Prompt(tuple(blocks), size, streams, answers, named)


def key(blocks: Sequence[Block]) -> bytes:
    """A prompt's blocks as text: what gateways tell each other of it."""
    return b2a_base64(b"".join(blocks), newline=False)


def blocks_of(key: str) -> list[Block]:
    """The inverse of :func:`key`. What is none has no blocks."""
    try:
        all = a2b_base64(key, strict_mode=True)
    except ValueError:
        return []
    return [all[at : at + BYTES] for at in range(0, len(all), BYTES)]


def hashed(parts: Iterable[bytes], seed: bytes) -> tuple[list[Block], int]:
    """The hashes of a text's whole blocks, and its bytes. ``seed`` belongs to no block."""
    hash = blake2b(seed, digest_size=BYTES)
    blocks: list[Block] = []
    size, held = 0, b""
    for part in parts:
        size += len(part)
        if len(blocks) * BLOCK >= MOST:
            continue
        held = held + part if held else part
        whole = min(len(held) // BLOCK, MOST // BLOCK - len(blocks)) * BLOCK
        view = memoryview(held)
        for at in range(0, whole, BLOCK):
            hash.update(view[at : at + BLOCK])
            blocks.append(hash.digest())
        held = held[whole:]
    return blocks, size


def _without_media(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same with a block of hash in the place of each image or sound.

    Each mark is looked for once, from where it was last: a client decides how many there are. And
    each image is a block, so what comes after the most that are looked at is not taken apart.
    """
    for part in parts:
        end = 0
        found = {mark: at for mark in _BASE64 if (at := part.find(mark)) >= 0}
        for _ in range(MOST // BLOCK):
            if not found:
                break
            at, mark = min((at, mark) for mark, at in found.items())
            begin = at + len(mark)
            close = part.find(b'"', begin)
            if close < 0:
                break
            yield part[end:begin]
            yield _of_media(part[begin:close])
            end = close
            for mark in [mark for mark, at in found.items() if at < end]:
                found[mark] = part.find(mark, end)
                if found[mark] < 0:
                    del found[mark]
        yield part[end:] if end else part


def _of_media(data: bytes) -> bytes:
    hash = blake2b(len(data).to_bytes(8, "big"), digest_size=16)
    hash.update(data[:_MEDIA_SEEN])
    hash.update(data[-_MEDIA_SEEN:])
    return hash.digest() * (BLOCK // 16)


def _session(call: Call, fields: _Body) -> str | None:
    named = next((v for k, v in call.request.headers if k == SESSION), b"")
    if named:
        return named.decode("utf-8", "replace")
    if raw := bytes(fields.prompt_cache_key):
        try:
            return str(_text(raw) or "") or None
        except ValueError:
            return None  # vLLM refuses it
    return None

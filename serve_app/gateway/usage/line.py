"""An entry as a line of JSON, whose fields are the columns of the database's table."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from serve_app.gateway.ledger import Entry


class Line(msgspec.Struct):
    """One request. A field that is added later needs a default: an upgraded gateway reads the lines
    that the old one has left. No field has anything of a prompt or an answer."""

    id: str
    request_id: str
    key: str
    model: str
    model_id: str
    path: str
    replica: str
    outcome: str
    status: int
    day: str
    arrived: str
    """In UTC, as SQLite keeps times and PostgreSQL reads them."""

    queued_s: float
    first_byte_s: float | None
    duration_s: float
    retries: int
    prompt_tokens: int | None
    """None where no replica reported, as the next two."""

    cached_tokens: int | None
    completion_tokens: int | None


_last: tuple[Entry | None, bytes] = None, b""
"""Who is told of an entry is so at once, one after the other."""

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Line)


def encode(entry: Entry) -> bytes:
    """With the line break."""
    global _last
    if entry is _last[0]:
        return _last[1]
    moment = datetime.fromtimestamp(entry.arrived, UTC).replace(tzinfo=None)
    arrived = moment.isoformat(" ", "microseconds")
    usage = entry.usage
    line = Line(
        id=entry.id,
        request_id=_text(entry.request_id),
        key=entry.key,
        model=entry.model,
        model_id=entry.model_id,
        path=_text(entry.path),
        replica=entry.replica,
        outcome=entry.end,
        status=entry.status,
        day=arrived[:10],
        arrived=arrived,
        queued_s=entry.queued_s,
        first_byte_s=entry.first_byte_s,
        duration_s=entry.duration_s,
        retries=entry.retries,
        prompt_tokens=usage.prompt_tokens if usage else None,
        cached_tokens=usage.cached_tokens if usage else None,
        completion_tokens=usage.completion_tokens if usage else None,
    )
    _last = entry, _encoder.encode(line) + b"\n"
    return _last[1]


def is_one(line: bytes) -> bool:
    """Whether it is a line as :func:`encode` makes them."""
    try:
        _decoder.decode(line)
    except msgspec.DecodeError:
        return False
    return True


def _text(said: str) -> str:
    """What a client chose, without what PostgreSQL refuses in a text."""
    return said.replace("\0", "�")

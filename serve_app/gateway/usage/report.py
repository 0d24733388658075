"""``GET /v1/usage``: what was used, by key, model and day."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Literal

from pydantic import BaseModel

from serve_app.errors import did_you_mean
from serve_app.gateway.callers import Caller
from serve_app.gateway.errors import GatewayError, invalid
from serve_app.gateway.usage.database import GROUPS, MOST_ROWS
from serve_app.gateway.usage.record import Record

_MOMENT = "A day or a time, as ISO 8601 has them, in UTC where it names no zone."
_DESCRIBED = {
    "from": f"{_MOMENT} The default is 30 days before `to`.",
    "to": f"{_MOMENT} A day is counted whole, a time not. The default is now.",
    "group_by": f"Some of {', '.join(GROUPS)}, with commas between them. The default: one sum.",
}
PARAMETERS = [
    {"name": name, "in": "query", "schema": {"type": "string"}, "description": said}
    for name, said in _DESCRIBED.items()
]
"""The route's parameters, as OpenAPI has them."""

_USUALLY = timedelta(days=30)
_EARLIEST = datetime.min + _USUALLY


class UsageRow(BaseModel):
    """The sums of one group; without ``group_by``, of all requests."""

    key: str | None = None
    model: str | None = None
    model_id: str | None = None
    day: date | None = None
    requests: int
    """Those that a replica got."""

    refused: int
    """Those that none got: refused by the gateway, or given up before."""

    unreported: int
    """Of ``requests``, those whose replica was lost before it told their tokens."""

    prompt_tokens: int
    cached_tokens: int
    """The part of ``prompt_tokens`` that the KV cache had."""

    completion_tokens: int


class UsageReport(BaseModel):
    """Usage as it is recorded in ``usage_db``: a request is there a second or two after its end."""

    object: Literal["list"]
    data: list[UsageRow]


async def report(
    record: Record | None, caller: Caller | None, parameters: Mapping[str, str]
) -> UsageReport:
    """The answer: an admin's key sees all, another key its own requests.

    Raises:
        GatewayError: 404 where nothing is recorded, 400 for a parameter that is wrong, 503 while
            the database does not answer.
    """
    if record is None or not record.has_database:
        raise GatewayError(
            404,
            "Usage is not recorded here; to record it, name a database in the gateway's args, such "
            "as usage_db: sqlite:////var/lib/serve_app/usage.db.",
            "invalid_request_error",
            code="usage_not_recorded",
        )
    for name in parameters:
        if name not in _DESCRIBED:
            raise invalid(
                f"'{name}' is not a parameter of /v1/usage{did_you_mean(name, _DESCRIBED)} "
                f"(known: {', '.join(_DESCRIBED)}).",
                param=name,
            )
    now = datetime.now(UTC).replace(tzinfo=None)
    until = _time(parameters, "to") or now
    since = _time(parameters, "from") or max(until, _EARLIEST) - _USUALLY
    if since >= until:
        raise invalid("'from' must lie before 'to'.", param="from")
    group_by = _groups(parameters.get("group_by", ""))
    key = None if caller is None or caller.admin else caller.name
    rows = await record.totals(since, until, group_by, key)
    if len(rows) > MOST_ROWS:
        raise invalid(
            f"The answer has more than {MOST_ROWS} rows; ask for a shorter time, or group by less.",
            param="group_by",
        )
    return UsageReport(object="list", data=[UsageRow(**row) for row in rows])


def _time(parameters: Mapping[str, str], name: str) -> datetime | None:
    """A moment in UTC, without a zone. A day stands for its begin, in ``to`` for its end."""
    text = parameters.get(name)
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo:
            return moment.astimezone(UTC).replace(tzinfo=None)
        return moment + timedelta(days=1) if name == "to" and _is_day(text) else moment
    except (ValueError, OverflowError):
        raise invalid(
            f"'{name}' is '{text[:40]}', but must be a day such as 2026-11-30 or a time such as "
            "2026-11-30T18:00:00Z, in UTC where it names no zone.",
            param=name,
        ) from None


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _groups(text: str) -> list[str]:
    groups = [group for group in text.split(",") if group]
    for group in groups:
        if group not in GROUPS:
            raise invalid(
                f"'group_by' has '{group[:40]}', but can have {', '.join(GROUPS)}, with commas "
                "between them.",
                param="group_by",
            )
    return list(dict.fromkeys(groups))

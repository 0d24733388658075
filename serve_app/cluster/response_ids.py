"""Ids of stored responses (``/v1/responses``): each ends with the id of the front end that made it.

vLLM keeps a response in the memory of the process that made it. So a later request that names it
(``GET /v1/responses/{id}``, ``previous_response_id``) must reach that front end, from any gateway.
"""

from __future__ import annotations

import re

# vLLM's ids are "resp_" and 32 hexadecimal digits.
_MADE = re.compile(r"resp_[0-9a-f]+_([A-Za-z0-9]+(?:-[0-9]+)?)")


def made_by(id: str, front_end: str) -> str:
    """vLLM's new ``id``, marked with the id of the front end that made the response."""
    return f"{id}_{front_end}"


def maker_of(id: str) -> str | None:
    """The front end that made the response ``id``; None where it has no mark (a client's own)."""
    made = _MADE.fullmatch(id)
    return made[1] if made else None

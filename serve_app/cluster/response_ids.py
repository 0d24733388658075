"""Ids of stored responses (``/v1/responses``): each ends with the id of the replica that made it.

vLLM keeps a response in the memory of the process that made it. So a later request that names it
(``GET /v1/responses/{id}``, ``previous_response_id``) must reach that replica, from any gateway.
"""

from __future__ import annotations

import re

# vLLM's ids are "resp_" and 32 hexadecimal digits; Serve's replica ids are letters and digits.
_MADE = re.compile(r"resp_[0-9a-f]+_([A-Za-z0-9]+)")


def made_by(id: str, replica: str) -> str:
    """vLLM's new ``id``, marked with the Serve replica that made the response."""
    return f"{id}_{replica}"


def maker_of(id: str) -> str | None:
    """The replica that made the response ``id``; None for an id without a mark (a client's own)."""
    made = _MADE.fullmatch(id)
    return made[1] if made else None

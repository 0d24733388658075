"""One line of the checklist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What a check found: ``about`` names the model, the application or the file."""

    check: str
    status: Status
    about: str
    message: str
    fix: str | None = None

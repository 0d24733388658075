"""The result of a check: one line of ``serve-app check`` or ``serve-app validate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
"""``fail``: it cannot work. ``warn``: it works, at a cost that the message names."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check found to be right or wrong.

    ``check`` is the checklist's line that it belongs to. ``about`` names the model, application or
    file. For manifests ``about`` is the field, and makes a sentence with ``message``:
    ``Ingress/x: spec.y`` ``is missing``. ``fix`` says what to change, if the message does not.
    """

    check: str
    status: Status
    about: str
    message: str
    fix: str | None = None

    @property
    def text(self) -> str:
        return f"{self.message}; {self.fix}" if self.fix else self.message

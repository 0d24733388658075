"""What a check found: a line of ``serve-app check`` and of ``serve-app validate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
"""``fail`` cannot work; ``warn`` works and costs."""


@dataclass(frozen=True)
class Finding:
    """One thing that is right or wrong.

    ``check`` is its line of the checklist. ``about`` names the model, the application or the
    file; in a manifest the field, with which ``message`` makes a sentence: ``Ingress/x: spec.y``
    ``is missing``. ``fix`` says what to change where the message does not.
    """

    check: str
    status: Status
    about: str
    message: str
    fix: str | None = None

    @property
    def text(self) -> str:
        return f"{self.message}; {self.fix}" if self.fix else self.message

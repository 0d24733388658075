"""Errors that a user is meant to read, and their shape over HTTP."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """An error that the user can mend, said in one sentence.

    The CLI prints it on one line and exits with 2. The gateway puts it into OpenAI's error
    envelope. So the text never contains internals, secrets or a traceback.
    """


class ConfigError(UserError):
    """A config that cannot work, with what to change."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``known``, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


_OUR_ERROR = re.compile(r"serve_app\.errors\.\w+: ")


def sentence_in(report: str) -> str:
    """What a traceback or a status message of Serve comes down to, in one line.

    Our own sentence, else the last line, where a traceback says why.
    """
    lines = [line for line in report.splitlines() if line.strip()]
    ours = _OUR_ERROR.split(report)
    return " ".join((ours if len(ours) > 1 else lines or [""])[-1].split())


def first_line(error: object) -> str:
    """The first line of what another program said, for a sentence of ours."""
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


def envelope(
    message: str, type: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error body: ``{"error": {"message", "type", "param", "code"}}``."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}

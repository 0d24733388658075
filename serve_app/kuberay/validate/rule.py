"""What a rule is: a generator of findings about fields, under one line of the checklist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import ParamSpec

from serve_app.planner.finding import Finding

_P = ParamSpec("_P")

Found = Iterator[Finding]


def fail(field: str, message: str, fix: str | None = None) -> Finding:
    """What cannot work."""
    return Finding("manifests", "fail", field, message, fix)


def warn(field: str, message: str, fix: str | None = None) -> Finding:
    """What works, and costs."""
    return Finding("manifests", "warn", field, message, fix)


def check(name: str) -> Callable[[Callable[_P, Found]], Callable[_P, Found]]:
    """Put what a rule finds under this line of the checklist."""

    def named(rule: Callable[_P, Found]) -> Callable[_P, Found]:
        @wraps(rule)
        def findings(*args: _P.args, **kwargs: _P.kwargs) -> Found:
            for finding in rule(*args, **kwargs):
                yield replace(finding, check=name)

        return findings

    return named

"""Rules are generators of findings about fields, each under one line of the checklist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import ParamSpec

from serve_app.planner.finding import Finding

_P = ParamSpec("_P")

Found = Iterator[Finding]


def fail(field: str, message: str, fix: str | None = None) -> Finding:
    """A finding: this cannot work."""
    return Finding("manifests", "fail", field, message, fix)


def warn(field: str, message: str, fix: str | None = None) -> Finding:
    """A finding: this works, at a cost."""
    return Finding("manifests", "warn", field, message, fix)


def check(name: str) -> Callable[[Callable[_P, Found]], Callable[_P, Found]]:
    """Decorate a rule: its findings belong to this line of the checklist."""

    def named(rule: Callable[_P, Found]) -> Callable[_P, Found]:
        @wraps(rule)
        def findings(*args: _P.args, **kwargs: _P.kwargs) -> Found:
            for finding in rule(*args, **kwargs):
                yield replace(finding, check=name)

        return findings

    return named

"""The parts of Kubernetes' API that are plain functions: patches and label selectors."""

from __future__ import annotations

import copy
import re
from typing import Any

Document = dict[str, Any]


class Unprocessable(ValueError):
    """A JSON patch that does not fit the object: a failed test, or a path that is not there."""


def merge_patch(old: Any, patch: Any) -> Any:
    """RFC 7386: objects are merged, null removes, everything else replaces."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def json_patch(old: Document, operations: list[Document]) -> Document:
    """RFC 6902, without move and copy.

    Raises:
        Unprocessable: a test fails, or a path leads nowhere.
    """
    new = copy.deepcopy(old)
    for operation in operations:
        *parents, last = [
            key.replace("~1", "/").replace("~0", "~")
            for key in operation["path"].split("/")[1:]
        ]  # fmt: skip
        try:
            at: Any = new
            for key in parents:
                at = at[int(key)] if isinstance(at, list) else at[key]
            _operate(at, last, operation["op"], operation.get("value"))
        except (KeyError, IndexError, TypeError, ValueError):
            what = f"{operation['op']} operation does not apply: doc is missing path"
            raise Unprocessable(f"{what}: {operation['path']}") from None
    return new


def _operate(at: Any, key: str, op: str, value: Any) -> None:
    index: Any = (len(at) if key == "-" else int(key)) if isinstance(at, list) else key
    if op == "add" and isinstance(at, list):
        at.insert(index, value)
        return
    if op != "add":
        there = at[index]  # raises where nothing is
        if op == "test" and there != value:
            raise ValueError(key)
    if op in ("add", "replace"):
        at[index] = value
    elif op == "remove":
        del at[index]


_TERM = re.compile(
    r"(?P<no>!)?(?P<key>[\w./-]+)\s*"
    r"(?:(?P<op>!=|==?|\bin\b|\bnotin\b)\s*(?:\((?P<set>[^)]*)\)|(?P<value>[\w.-]*)))?\s*(?:,|$)"
)


def selects(selector: str, labels: dict[str, str]) -> bool:
    """Whether a label selector as written in a URL matches: a=b, a!=b, a in (b,c), a, !a."""
    for term in _TERM.finditer(selector):
        value = labels.get(term["key"])
        if term["op"] is None:
            wanted = (value is None) == bool(term["no"])
        else:
            values = re.split(r"\s*,\s*", term["set"].strip()) if term["set"] else [term["value"]]
            wanted = (value in values) != (term["op"] in ("!=", "notin"))
        if not wanted:
            return False
    return True


def matches(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a label selector as objects hold it matches."""
    for expression in selector.get("matchExpressions") or []:
        value, values = labels.get(expression["key"]), expression.get("values")
        holds = {
            "In": value in (values or []),
            "NotIn": value not in (values or []),
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not holds[expression["operator"]]:
            return False
    return bool((selector.get("matchLabels") or {}).items() <= labels.items())

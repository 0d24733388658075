"""Compares a RayCluster's spec with a RayService's ``rayClusterConfig``, as the operator does.

The rules are KubeRay's (``rayservice_controller.go``, 1.7). Its hash leaves out replica bounds,
tolerations and a few other fields. Groups appended at the end do not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from serve_app.kuberay.validate.manifests import amount

Spec = dict[str, Any]


def same(before: Spec, after: Spec) -> bool:
    """Whether the operator keeps a cluster for a new spec; it may append groups to it."""
    return appended(before, after) is not None


def appended(before: Spec, after: Spec) -> list[str] | None:
    """Names of the groups appended at the end; None if anything else changes, too."""
    one, other = _hashed(before, after)
    old, new = one.pop("workerGroupSpecs", []), other.pop("workerGroupSpecs", [])
    if one != other or new[: len(old)] != old:
        return None
    return [group["groupName"] for group in new[len(old) :]]


def differences(before: Spec, after: Spec) -> Iterator[str]:
    """What makes a new cluster, one line each; groups that come and go by their names."""
    one, other = _hashed(before, after)
    old, new = (
        {group["groupName"]: group for group in spec.get("workerGroupSpecs") or []}
        for spec in (one, other)
    )
    if list(old) != list(new):
        for name in old.keys() - new.keys():
            yield f"worker group '{name}' is removed"
        for name in new.keys() - old.keys():
            yield f"worker group '{name}' is added"
        both = [name for name in old if name in new]
        if both != [name for name in new if name in old]:
            yield f"worker groups change their order: {', '.join(new)}"
        one["workerGroupSpecs"] = [old[name] for name in both]
        other["workerGroupSpecs"] = [new[name] for name in both]
    yield from paths(one, other, "rayClusterConfig")


def _hashed(before: Spec, after: Spec) -> tuple[Spec, Spec]:
    """The parts of two specs whose difference makes a new cluster."""
    one, other = plain(before, after), plain(after, after)
    for spec in (one, other):
        spec.pop("suspend", None)
        spec.pop("upgradeStrategy", None)
        for group in [spec.get("headGroupSpec") or {}, *(spec.get("workerGroupSpecs") or [])]:
            for key in ("replicas", "minReplicas", "maxReplicas"):
                group.pop(key, None)
            (group.get("scaleStrategy") or {}).pop("workersToDelete", None)
            pod = (group.get("template") or {}).get("spec") or {}
            pod.pop("tolerations", None)
            pod.pop("schedulingGates", None)
    return _without_empty(one), _without_empty(other)


def plain(value: Any, beside: Any) -> Any:
    """A copy of a value, in which what KubeRay takes as the same as ``beside`` is the same.

    Fields that hold nothing are left out, because its operator writes some, such as
    ``scaleStrategy: {}``. Amounts are written as beside, because it writes ``0.5`` as ``500m``.
    """
    return _without_empty(_written_alike(value, beside))


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in ({}, [], None)}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return value


def _written_alike(value: Any, beside: Any, *, amounts: bool = False) -> Any:
    """A copy with equal amounts in the other's words; ``amounts`` for a mapping of them."""
    if isinstance(value, dict):
        other = beside if isinstance(beside, dict) else {}
        return {
            key: other[key]
            if (amounts or key == "sizeLimit")
            and key in other
            and amount(item) == amount(other[key]) is not None
            else _written_alike(item, other.get(key), amounts=key in ("requests", "limits"))
            for key, item in value.items()
        }
    if isinstance(value, list):
        others = beside if isinstance(beside, list) else []
        return [
            _written_alike(item, others[index] if index < len(others) else None)
            for index, item in enumerate(value)
        ]
    return value


def paths(before: Any, after: Any, path: str) -> Iterator[str]:
    """The paths of values that differ, with short values themselves."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}, key=str):
            yield from paths(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from paths(one, other, f"{path}[{index}]")
    elif before != after:
        one, other = _short(before, after)
        yield f"{path} {one} → {other}"


_SHORT = 40
"""Characters of a value that are shown."""


def _short(before: Any, after: Any) -> list[str]:
    """Two different values, each cut to what a person reads; the first difference is in it."""
    values = ("nothing" if value is None else str(value) for value in (before, after))
    texts = [" ".join(value.split()) for value in values]
    start = 0
    if max(map(len, texts)) > _SHORT:
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
        start = max(0, sum(1 for _ in alike) - _SHORT // 2)
    shown = []
    for text in texts:
        part = text[start : start + _SHORT]
        more = "…" if len(text) > start + _SHORT else ""
        shown.append(f"{'…' if start else ''}{part}{more}")
    return shown

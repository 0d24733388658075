"""Finds what another field manager set in a RayService and an apply leaves there.

Server-side apply removes a field that a config has no more only where nobody else owns it, too. Who
ran ``kubectl apply`` before, or Argo CD, owns every field that they applied. So what is taken out
of the config goes on being there, and no dry run tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from serve_app.kuberay.live.api_server import FIELD_MANAGER, OPERATOR

Document = dict[str, Any]
Path = tuple[str, ...]


def leftovers(answer: Document, wanted: Document) -> list[str]:
    """One line for each field of the spec that others set and ``wanted`` does not have.

    ``answer`` is the API server's answer to the apply of ``wanted``, or to its dry run.
    """
    found: dict[str, str] = {}
    for entry in answer["metadata"].get("managedFields") or []:
        manager = entry.get("manager") or ""
        if manager in (FIELD_MANAGER, OPERATOR) or entry.get("subresource"):
            continue
        spec = (entry.get("fieldsV1") or {}).get("f:spec") or {}
        for path in _beyond(spec, wanted["spec"], answer["spec"], ("spec",)):
            found.setdefault(".".join(path), manager)
    return [
        f'{path} is not of this config: "{manager}" set it, and it stays until taken out there'
        for path, manager in sorted(found.items())
    ]


def _beyond(owned: Document, wanted: Any, there: Any, path: Path) -> Iterator[Path]:
    """The uppermost owned fields that are there, hold something, and are not wanted."""
    if not isinstance(wanted, dict) or not isinstance(there, dict):
        return  # a list, or a value, which is wanted as a whole
    for key, below in owned.items():
        name = key.removeprefix("f:")
        if name == key or not there.get(name):
            continue
        if name in wanted:
            yield from _beyond(below, wanted[name], there[name], (*path, name))
        else:
            yield (*path, name)

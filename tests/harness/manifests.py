"""What the tests of serve_app.kuberay share: configs, profiles, and edits by path."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from serve_app.config.document import Fleet, load
from serve_app.kuberay.render.files import render
from serve_app.kuberay.render.profile import ClusterProfile, load_profile

ROOT = Path(__file__).resolve().parents[2]
CRD = ROOT / "tests/kube/data/rayservice-v1-crd.schema.json"
"""The schema of KubeRay's own CRD (Apache 2.0), ray.io/v1 RayService."""

KEPT = ("llama70b", "llama70b-2node", "fleet")
"""Configs of which kuberay/ holds a rendering."""

NAMES = (*KEPT, "qwen3-32b-fp8", "quantized", "moe-expert-parallel")
"""Configs whose renderings have nothing to warn of; those not kept are rendered in tests only."""


def fleet(name: str) -> Fleet:
    return load(ROOT / "configs" / f"{name}.yaml")


def profile(name: str) -> ClusterProfile:
    """The profile that kuberay/ is rendered with: the fleet's own, or the common one."""
    own = ROOT / "kuberay" / name / "profile.yaml"
    return load_profile(own if own.exists() else ROOT / "kuberay" / "profile.yaml")


def bundle(name: str, **settings: Any) -> list[dict[str, Any]]:
    """Every document of a rendering, as a reader of the folder has them."""
    files = render(fleet(name), ClusterProfile.model_validate({"max_gpus": 32, **settings}))
    return [
        document
        for path, text in files.items()
        if not path.endswith("kustomization.yaml")
        for document in yaml.safe_load_all(text)
    ]


def edit(documents: list[dict[str, Any]], changes: dict[str, dict[str, Any]]) -> list[Any]:
    """The documents with some values changed in the first of each named kind.

    A key is a dotted path (``\\.`` for a dot in a key); ``path-`` deletes, and ``path~`` replaces
    the first text of a pair by the second.
    """
    documents = copy.deepcopy(documents)
    for kind, edits in changes.items():
        document = next(d for d in documents if d["kind"] == kind)
        for path, value in edits.items():
            _edit(document, path, value)
    return documents


def _edit(document: Any, path: str, value: Any) -> None:
    delete, replace = path.endswith("-"), path.endswith("~")
    parts = [p.replace("\\.", ".") for p in re.split(r"(?<!\\)\.", path.rstrip("-~"))]
    # Keys with a domain in them, as nvidia.com/gpu, are written without backslashes.
    if "spec.limits.nvidia.com/gpu" in path:
        parts = ["spec", "limits", "nvidia.com/gpu"]
    at = document
    for part in parts[:-1]:
        at = at[int(part)] if isinstance(at, list) else at[part]
    last: Any = int(parts[-1]) if isinstance(at, list) else parts[-1]
    if delete:
        del at[last]
    elif replace:
        old, new = value
        assert old in at[last], f"the manifest has no {old!r} to replace"
        at[last] = at[last].replace(old, new, 1)
    elif isinstance(at, list) and last == len(at):
        at.append(value)
    else:
        at[last] = value

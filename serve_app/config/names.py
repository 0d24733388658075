"""Short names for models that are known by a hub id, a folder or an address."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

MANIFEST = ".serve_app.json"
"""The file in a fetched model's folder that says where the model is from (serve_app/fetch)."""


def repo_of(folder: Path) -> str | None:
    """The hub id of the model that was fetched into ``folder``; None where nothing says so."""
    try:
        repo = json.loads((folder / MANIFEST).read_bytes())["repo"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return repo if isinstance(repo, str) else None


def short_name(model: str, taken: Collection[str] = ()) -> str:
    """A name for ``model`` that Serve and a file system take, and that is not ``taken``.

    The last part in lower case; if that is taken, the part before it as well, then a number.
    """
    path = Path(model.partition("://")[2] or model)
    if path.name in ("", ".", ".."):
        path = path.resolve()
    parts = [re.sub(r"[^\w.-]+", "-", part).strip("-.").lower() for part in path.parts[-2:]]
    parts = [part for part in parts if part] or ["model"]
    name = parts[-1] if parts[-1] not in taken else "-".join(parts)
    candidates = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))]
    return next(one for one in candidates if one not in taken)


def short_names(models: Sequence[str], reserved: Collection[str] = ()) -> list[str]:
    """A name for each of ``models``, all different, and none of them ``reserved``."""
    names: list[str] = []
    for model in models:
        names.append(short_name(model, {*reserved, *names}))
    return names

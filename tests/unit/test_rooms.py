"""What import-linter cannot say: it knows no parts of another package."""

from __future__ import annotations

import ast
from pathlib import Path

import serve_app

ROOT = Path(serve_app.__file__).parent
PRIVATE = ("ray._private", "ray.serve._private", "ray.experimental.internal_kv")


def _imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_private_parts_of_ray_are_used_in_one_room() -> None:
    used = {
        str(file.relative_to(ROOT))
        for file in ROOT.rglob("*.py")
        if any(name.startswith(PRIVATE) for name in _imported(file))
    }
    assert used  # or the names above are wrong
    assert {name for name in used if not name.startswith("cluster/")} == set()

"""Every command of README and docs works for a reader who types it.

:mod:`ways` says how each is tried. Those that need a running server are tried by
test_at_a_server.py; `make demo` and `make test` by CI.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import documented
from reader import Reader, problems


@pytest.mark.parametrize("page", documented.PAGES + documented.COMMENTED)
def test_every_command_works(page: str, tmp_path: Path) -> None:
    things = [*documented.commands(page), *documented.files(page)]
    with Reader(tmp_path / "serve_app") as reader:
        found = list(problems(sorted(things, key=lambda thing: thing.line), reader))
    assert not found, "\n".join(["", *found])

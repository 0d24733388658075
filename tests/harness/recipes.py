"""The programs of docs/recipes, taken from their pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from harness.processes import REPO

PAGES = REPO / "docs/recipes"


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a language on a page, in order."""
    text = (PAGES / page).read_text()
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no {language} block"
    return found


def replaced(text: str, words: Mapping[str, str]) -> str:
    """The text with other words in it, each of which must be there."""
    for word, other in words.items():
        assert word in text, f"{word} is not in:\n{text}"
        text = text.replace(word, other)
    return text


def output(
    program: str, python: str | Path = sys.executable, cwd: Path | None = None, **env: str
) -> str:
    """What a Python program prints; it must end well."""
    done = subprocess.run(
        [python, "-c", program],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def said(printed: str, label: str) -> list[str]:
    """What a program printed after ``label: ``, line by line."""
    start = f"{label}: "
    return [line.removeprefix(start) for line in printed.splitlines() if line.startswith(start)]

"""The wheel of this checkout, installed as docs/install.md says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from harness import container_engine
from harness.processes import REPO

UV = str(Path(sys.executable).with_name("uv"))
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""As the page names it."""

_COMMANDS = re.findall(
    r"^(?:uv )?pip install .+$", (REPO / "docs/install.md").read_text(), re.MULTILINE
)


def documented(tool: str, end: str, wheel: Path, index: str = PYTORCH_INDEX) -> list[str]:
    """Arguments of the one command of the page that begins with a tool and ends so.

    They name this wheel, and this index in place of PyTorch's.
    """
    [command] = [c for c in _COMMANDS if c.startswith(f"{tool} install ") and c.endswith(end)]
    words = shlex.split(command)[len(tool.split()) + 1 :]
    assert words[0].partition("[")[0] == f"dist/{wheel.name}"
    words[0] = words[0].replace("dist", str(wheel.parent), 1)
    return [index if word == PYTORCH_INDEX else word for word in words]


def build(folder: Path) -> Path:
    """The wheel, as `make wheel` makes it."""
    command = [UV, "build", "-q", "--out-dir", str(folder)]
    subprocess.run(command, cwd=REPO, env=outside(), check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def environment(folder: Path) -> Path:
    """The command folder of a new virtual environment without pip."""
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, env=outside(), check=True)
    return folder / "bin"


def outside() -> dict[str, str]:
    """The variables of somebody who has no checkout, but what this machine's pip is told."""
    env = container_engine.pip_settings() | os.environ
    return {name: value for name, value in env.items() if not name.startswith("PYTHON")}

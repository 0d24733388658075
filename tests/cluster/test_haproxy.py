"""The HAProxy that Serve is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.cluster import haproxy


def test_the_command_is_haproxy() -> None:
    environment = haproxy.environment()  # as Serve's HAProxy has it too
    path = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert Path(path).is_absolute()
    shown = subprocess.run(
        [path, "-vv"], env=os.environ | environment, timeout=60,
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert shown.startswith("HAProxy version")


def test_it_does_not_splice_and_passes_on_what_serve_says(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda binary, arguments: became.append(arguments))
    monkeypatch.setattr(sys, "argv", [haproxy.COMMAND, "-db", "-f", "haproxy.cfg"])
    haproxy.main()
    assert became[0][1:] == ["-dS", "-db", "-f", "haproxy.cfg"]

"""The command ``serve-app``: within the tests' own process, or typed in a fresh shell."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import pytest

from harness.servers import BIN
from serve_app import cli

_OF_A_LOGIN = ("HOME", "LANG", "PYTHONPATH", "TMPDIR", "USER", "XDG_STATE_HOME")


def fresh_shell() -> dict[str, str]:
    """The environment of a new terminal: nothing by which the harness finds its clusters."""
    login = {name: os.environ[name] for name in _OF_A_LOGIN if name in os.environ}
    return login | {"PATH": f"{BIN}:{os.environ['PATH']}"}


def typed(*command: str, status: int = 0) -> str:
    """What a command prints in a fresh shell, in another folder; it ends with ``status``."""
    done = subprocess.run(
        command, env=fresh_shell(), cwd="/", capture_output=True, text=True, timeout=180
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def refusal(*arguments: str) -> list[str]:
    """What the command says before it starts anything: lines of standard error.

    Fails where it does not end with status 2, or says anything on standard output.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["serve-app", *arguments]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    assert ended.value.code == 2
    assert out.getvalue() == ""
    return err.getvalue().splitlines()

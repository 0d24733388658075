"""The command ``serve-app`` within the tests' own process, which has imported all it needs."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import pytest

from serve_app import cli


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

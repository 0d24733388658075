"""`serve-app completion SHELL`: the shell that reads the script completes commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from serve_app.cli import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `serve-app` of this source tree that shells find, in an otherwise empty folder."""
    program = tmp_path / "bin/serve-app"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom serve_app.cli import main\nmain()\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return program


def in_bash(*words: str) -> list[str]:
    """What bash offers for the last of ``words``, by the function that the script registers."""
    script = f"""
        eval "$(serve-app completion bash)" || exit 1
        [[ $(complete -p serve-app) == *" -F _serve_app_completion serve-app" ]] || exit 2
        compopt() {{ :; }}  # which works only while bash itself completes
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
        COMP_CWORD={len(words) - 1}
        _serve_app_completion serve-app '{words[-1]}'
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bash_completes_commands_options_and_models(command: Path) -> None:
    assert in_bash("serve-app", "comp") == ["completion"]
    assert in_bash("serve-app", "completion", "") == ["bash", "zsh", "fish"]
    assert in_bash("serve-app", "run", "--te") == ["--tensor-parallel-size"]
    assert in_bash("serve-app", "run", "Qwen/Qwen3-32") == ["Qwen/Qwen3-32B", "Qwen/Qwen3-32B-FP8"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_says_where_to_put_it(shell: str, command: Path) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    first, second, *script = result.output.splitlines()
    assert first.startswith("# For every new shell, add this line to ~/.")
    assert f"serve-app completion {shell}" in second
    assert f"_SERVE_APP_COMPLETE={shell}_complete" in "\n".join(script)
    if shutil.which(shell):  # the script is the shell's own language
        check = [shell, "--no-execute" if shell == "fish" else "-n"]
        subprocess.run(check, input=result.output, text=True, check=True, timeout=60)


def test_help_shows_each_command_s_whole_sentence() -> None:
    shown = CliRunner().invoke(cli, ["--help"]).output
    assert "..." not in shown.partition("Commands:")[2]
    assert "Talk to MODEL of a running server; to its only chat model where none is named." in (
        " ".join(shown.split())
    )

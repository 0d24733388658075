"""`serve-app check` as a user runs it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from serve_app.check import inventory
from serve_app.check.cli import check
from serve_app.check.inventory import RayInventory
from serve_app.errors import UserError

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ONE_MODEL = ROOT / "configs/llama70b.yaml"


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(check, arguments, catch_exceptions=True)
    if result.exception and not isinstance(result.exception, (SystemExit, UserError)):
        raise result.exception
    return result


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_passes_without_network(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert invoke(str(config)).exit_code == 0


def test_check_exits_with_1_for_a_failure_and_raises_where_it_cannot_run(tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(Path(ONE_MODEL).read_text().replace("parallel_size: 4", "parallel_size: 3"))
    result = invoke(str(config), "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["ok"] is False
    failed = [f for f in found["configs"][str(config)] if f["status"] == "fail"]
    assert [f["check"] for f in failed] == ["parallelism"] * len(failed)
    assert failed[0]["fix"] == "tensor_parallel_size can be 1, 2, 4, 8"
    shown = invoke(str(config)).output
    assert "fail parallelism" in shown
    assert "1 to fix" in shown or "2 to fix" in shown
    assert isinstance(invoke("nofile.yaml").exception, UserError)


@pytest.mark.parametrize(
    "change", [("resources:", "resorces:"), ("  max_model_len", "  max_modl_len")]
)
def test_a_config_that_no_command_takes_is_status_2(
    change: tuple[str, str], tmp_path: Path
) -> None:
    """As `plan` and `render` have it, after the whole list of this config and the others."""
    config = tmp_path / "wrong.yaml"
    text = ONE_MODEL.read_text()
    assert change[0] in text
    config.write_text(text.replace(*change))
    result = invoke(str(config), str(ONE_MODEL))
    assert result.exit_code == 2
    assert "did you mean" in result.output and f"{ONE_MODEL}\n" in result.output


def test_a_warning_about_the_config_does_not_keep_the_cluster_from_being_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "pip.yaml"
    config.write_text(
        ONE_MODEL.read_text().replace("  args:", "  runtime_env: {pip: [x]}\n  args:", 1)
    )
    monkeypatch.setattr(inventory, "at_hand", lambda: RayInventory([]))
    rendered = str(ROOT / "kuberay/llama70b")
    shown = invoke(str(config), "--cluster", "--manifests", rendered, "--json")
    found = json.loads(shown.stdout)["configs"][str(config)]
    assert any(f["check"] == "config" and f["status"] == "warn" for f in found)
    assert any(f["about"] == "Ray cluster" for f in found)

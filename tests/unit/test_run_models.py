"""`serve-app run MODEL…`: what is made of the command line, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from harness.command import refusal
from harness.models import LLAMA
from harness.processes import free_port

import serve_app.local.run
from serve_app.cli import cli
from serve_app.config.document import Fleet, load
from serve_app.local import this_machine
from serve_app.planner import hardware
from serve_app.planner.hardware import GIB, Machine


@pytest.fixture(autouse=True)
def two_l4(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (hardware.gpus()["L4"],) * 2
    monkeypatch.setattr(this_machine, "look", lambda: Machine(gpus, 16, 64 * GIB))
    monkeypatch.setattr(this_machine, "gpus", lambda: gpus)
    monkeypatch.setattr("os.cpu_count", lambda: 16)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two folders, named from the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("One", "Two"):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(LLAMA))
        Path(name, "pytorch_model.bin").touch()
    return ["One", "./Two"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Fleet]:
    """The configs that were started."""
    fleets: list[Fleet] = []

    def run(fleet: Fleet, *_: Any, **__: Any) -> int:
        fleets.append(fleet)
        return 0

    monkeypatch.setattr(serve_app.local.run, "run", run)
    return fleets


def test_models_are_printed_as_yaml_and_run_as_a_config_is(
    models: list[str], started: list[Fleet]
) -> None:
    result = CliRunner().invoke(
        cli, ["run", *models, "--port", "9001", "-e", "max_model_len=8k", "--save", "fleet.yaml"]
    )
    assert result.exit_code == 0, result.output
    [fleet] = started
    assert list(fleet.models) == ["one", "two"]
    assert [model.model for model in fleet.models.values()] == models
    assert {model.engine["max_model_len"] for model in fleet.models.values()} == {"8k"}
    assert fleet.port == 9001
    # What was kept is what was printed, and is the same config.
    assert Path("fleet.yaml").read_text() in result.output
    kept = load("fleet.yaml")
    assert (kept.models, kept.gateway, kept.document) == (
        fleet.models,
        fleet.gateway,
        fleet.document,
    )
    assert "for this machine: 2 × L4 (22.0 GiB)" in result.output


def test_tensor_parallel_size_is_an_engine_argument(
    models: list[str], started: list[Fleet]
) -> None:
    result = CliRunner().invoke(cli, ["run", models[0], "--tensor-parallel-size", "2"])
    assert result.exit_code == 0, result.output
    assert started[0].models["one"].tensor_parallel_size == 2


def test_a_folder_for_the_config_must_be_there(models: list[str], started: list[Fleet]) -> None:
    [line] = refusal("run", *models, "--save", "new/fleet.yaml")  # before the config is printed
    folder = Path("new").absolute()
    assert line == (
        f"serve-app: new/fleet.yaml: there is no folder {folder}; make it, or correct it"
    )
    assert started == []


def test_a_file_is_not_overwritten(models: list[str], started: list[Fleet]) -> None:
    Path("fleet.yaml").write_text("mine")
    [line] = refusal("run", *models, "--save", "fleet.yaml")
    assert line == (
        "serve-app: fleet.yaml is there already; name another file with --save, or run it: "
        "serve-app run fleet.yaml"
    )
    assert Path("fleet.yaml").read_text() == "mine"
    assert started == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["config.yaml"], "config.yaml: no such file"),
        (["config.yaml", "One"], "name one config file, or models"),
        (["config.yaml", "-e", "max_model_len=1"], "are for models; edit config.yaml instead"),
        (["config.yaml", "--save", "x.yaml"], "are for models; edit config.yaml instead"),
        (["One", "-e", "max_modl_len=1"], "did you mean 'max_model_len'?"),
        (["One", "-e", "max_model_len"], "write it as key=value"),
        (["One", "--tensor-parallel-size", "4"], "needs 4 GPUs, and this machine has 2"),
        (["./Three"], "./Three: there is no folder"),
        (
            ["org/name"],
            "org/name, and as a hub id it cannot be had: it is not in the cache, and "
            "HF_HUB_OFFLINE is set; unset it, or copy the model here and give its folder "
            "(--no-check starts all the same)",
        ),
        (
            ["./Bare"],
            "Bare has no weights (*.safetensors, *.bin, *.pt); copy or fetch the whole model (set "
            "engine.load_format where they are of another kind)",
        ),
        (["s3://bucket/model"], "install serve-app[gpu], which has it, or copy the model here"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(
    models: list[str], arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Path("Bare").mkdir()
    Path("Bare/config.json").write_text(json.dumps(LLAMA))
    [line] = refusal("run", *arguments)
    assert told in line


def test_a_hub_that_is_not_there_is_no_mistake_in_the_id(
    models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    [line] = refusal("run", "Qwen/Qwen3-8B")
    assert "the hub cannot be reached (no connection); set HF_ENDPOINT to one that can, or" in line
    assert "correct it" not in line

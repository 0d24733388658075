"""What `run`, `run --watch` and `reload` ask before anything starts or changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness.command import refusal

from serve_app.config.document import Fleet, load
from serve_app.errors import ConfigError, UserError
from serve_app.local import judge, reload, this_machine
from serve_app.local.found import Server

DEMO = Path(__file__).parents[2] / "configs/demo.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The demo's chat model, by its hub id, which this machine need not have."""
    document = yaml.safe_load(DEMO.read_text())
    del document["applications"][1]
    document["applications"][0]["args"]["model"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    del document["applications"][0]["args"]["served_as"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def changed(config: Path, **args: object) -> Fleet:
    document = yaml.safe_load(config.read_text())
    document["applications"][0]["args"].update(args)
    config.write_text(yaml.safe_dump(document))
    return load(config)


def test_run_and_reload_refuse_what_check_fails(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    fleet = changed(config, engine={"max_model_len": 100_000_000})
    told = (
        f"{config}: application 'smollm2-135m': max_model_len 100000000 is above the model's "
        "8192; set it to 8192 or less (--no-check skips this)"
    )
    assert refusal("run", str(config)) == [f"serve-app: {told}"]
    with pytest.raises(ConfigError) as refused:  # before the server is asked anything
        reload.reload(fleet, Server(None, None), tell=print)
    assert str(refused.value) == told
    with pytest.raises(UserError, match="its Ray has not started yet"):
        reload.reload(fleet, Server(None, None), tell=print, check=False)


def test_another_machine_may_have_what_this_one_lacks(config: Path) -> None:
    fleet = changed(config, resources={"device": "cpu", "num_cpus": 5000})
    judge.refuse(fleet, here=False)
    with pytest.raises(ConfigError, match="num_cpus is 5000, and this machine has"):
        judge.refuse(fleet, here=True)


def test_what_runs_already_makes_room(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "free_memory_bytes", lambda: 1 << 20)
    fleet = load(config)
    with pytest.raises(ConfigError, match=r"on the CPU, and this machine has 0\.0 GiB free"):
        judge.refuse(fleet, here=True)
    assert judge.limits(fleet, all_memory=True).free_memory_bytes is None


def test_gpus_that_cannot_be_listed_are_not_missed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = changed(config, resources={})

    def fails() -> tuple[()]:
        raise UserError("nvidia-smi fails")

    monkeypatch.setattr(this_machine, "may_have_others", lambda: False)
    monkeypatch.setattr(this_machine, "gpus", tuple)
    assert judge.limits(fleet, all_memory=False).gpus == ()
    monkeypatch.setattr(this_machine, "gpus", fails)
    assert judge.limits(fleet, all_memory=False).gpus is None
    monkeypatch.setattr(this_machine, "gpus", tuple)
    monkeypatch.setattr(this_machine, "may_have_others", lambda: True)
    assert judge.limits(fleet, all_memory=False).gpus is None


def test_it_imports_neither_ray_nor_an_engine(config: Path) -> None:
    script = (
        "import sys\n"
        "from serve_app.config.document import load\n"
        "from serve_app.local import judge\n"
        f"judge.refuse(load({str(config)!r}), here=False)\n"
        "print(*({'ray', 'vllm', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("\n", 0), done.stderr

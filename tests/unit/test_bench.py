"""The parts of ``make bench`` and of the tuning steps that need no engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import arms, clients, others, report
from benchmarks.h200 import tuning
from serve_app.config.document import parse_document
from serve_app.errors import UserError


def _setup(tmp_path: Path, front_ends: int = 1) -> arms.Setup:
    (tmp_path / "config.json").write_text("{}")
    return arms.Setup(tmp_path, tmp_path, arms.ENGINE, {}, front_ends)


def test_an_arm_that_cannot_run_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "BIN", tmp_path / "bin")
    monkeypatch.setenv("VLLM_RUST_FRONTEND_PATH", str(tmp_path / "none"))
    chosen, left_out = bench._chosen("bare,bare-n,bare-rust,litellm", _setup(tmp_path))
    assert [arm.name for arm in chosen] == ["bare"]
    assert left_out.keys() == {"bare-n", "bare-rust", "litellm"}
    assert "pip install -r requirements/gateways.txt" in left_out["litellm"]
    assert "vllm-rs" in left_out["bare-rust"]


def test_as_many_front_ends_as_ours(tmp_path: Path) -> None:
    setup = _setup(tmp_path, front_ends=3)
    chosen, left_out = bench._chosen("bare-n", setup)
    assert not left_out
    assert chosen[0].command(setup, 1)[-2:] == ["--api-server-count", "3"]
    assert setup.config.frontends == 3


def test_a_run_in_which_nothing_can_take_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one front end here"):
        bench._chosen("bare-n", _setup(tmp_path))
    with pytest.raises(UserError, match="there is no arm 'bear'"):
        bench._chosen("bear", _setup(tmp_path))


def test_unknown_clients_and_those_not_installed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "CACHE", tmp_path)
    assert list(clients.chosen("vllm")) == ["vllm"]
    assert clients.chosen("none") == {}
    with pytest.raises(UserError, match="there is no client 'abc'"):
        clients.chosen("vllm,abc")
    with pytest.raises(UserError, match="run: make bench-clients"):
        clients.chosen("aiperf")


def test_rounds_are_added_to_a_file_of_the_same_setup_only(tmp_path: Path) -> None:
    new = {"setup": {"seconds": 5}, "command": "b", "contenders": {"bare": "bare"},
           "left_out": {}, "records": []}  # fmt: skip
    path = tmp_path / "bench.json"
    assert bench._added(new, path) is new
    old = {**new, "command": "a", "contenders": {"haproxy": "ours"}, "records": [{"round": 1}]}
    path.write_text(json.dumps(old))
    found = bench._added(new, path)
    assert found["records"] == [{"round": 1}]
    assert found["contenders"] == {"bare": "bare", "haproxy": "ours"}
    assert found["command"] == "a; b"
    with pytest.raises(UserError, match="another setup"):
        bench._added({**new, "setup": {"seconds": 6}}, path)


def test_ratios_are_of_the_same_round() -> None:
    def record(arm: str, number: int, tokens: float) -> report.Record:
        level = {"tokens_per_s": tokens, "errors": 0, "others_cores": 0.0}
        return {"arm": arm, "round": number, "load": {"64": level}}

    records = report.by_number(
        [record("bare", 1, 100), record("bare", 2, 200), record("haproxy", 1, 90),
         record("haproxy", 2, 100), record("haproxy", 3, 1000)]
    )  # fmt: skip
    assert report.paired(records, "haproxy", "bare", 64) == [0.9, 0.5]
    assert report.paired(records, "bare", "bare", 64) == []


@pytest.mark.parametrize("name", tuning.EXPERIMENTS)
def test_each_prefix_of_a_load_is_asked_for(name: str) -> None:
    for load in tuning.EXPERIMENTS[name].loads.values():
        prefixes = int(load.dataset.get("prefix-repetition-num-prefixes", 1))
        assert load.prompts >= load.concurrency
        assert load.prompts % prefixes == 0, "vllm bench serve would send fewer"


@pytest.mark.parametrize("name", tuning.EXPERIMENTS)
def test_the_config_of_a_tuning_step_is_accepted(name: str, tmp_path: Path) -> None:
    experiment = tuning.EXPERIMENTS[name]
    models = tuning.applications(experiment, tmp_path, "/cache", 79.6)
    found = parse_document({"applications": models}, tmp_path / "config.yaml")
    assert found.models.keys() == experiment.variants.keys()
    parts = [model.resources.gpu_share for model in found.models.values()]
    assert sum(part or 1.0 for part in parts) <= 0.95, "more than an H100 has for them"


def test_the_first_error_of_an_engine_is_why_its_variant_is_left_out() -> None:
    line = "(ServeReplica:{}:ModelServer pid=1) (EngineCore pid=2) ERROR 11-27 21:16:29 {}"
    log = "\n".join([
        line.format("fp8", "[core.py:1374] Traceback (most recent call last):"),
        line.format("fp8", "[core.py:1374] RuntimeError: no such kernel"),
        line.format("bf16", "[utils.py:10] ImportError: an option that is not there"),
    ])  # fmt: skip
    assert tuning.failures(log) == {"fp8": "RuntimeError: no such kernel"}


def test_counters_of_a_model_are_summed_over_its_front_ends() -> None:
    text = """
vllm:num_preemptions_total{model_name="a",engine="0"} 2.0
vllm:num_preemptions_total{model_name="a",engine="1"} 3.0
vllm:num_preemptions_total{model_name="b",engine="0"} 7.0
vllm:prompt_tokens_total{model_name="a",engine="0"} 9.0
"""
    assert tuning.counters_in(text, "a") == {"num_preemptions": 5.0}


def test_help_needs_no_engine() -> None:
    for module in ("benchmarks", "tools.result_tables"):
        said = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True
        )
        assert said.returncode == 0, said.stderr

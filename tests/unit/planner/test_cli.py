"""`serve-app plan`, and `serve-app run` before it starts, as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

import serve_app.local.run
from serve_app.cli import cli
from serve_app.config.document import load
from serve_app.errors import UserError
from serve_app.planner.cli import plan

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ONE_MODEL = str(ROOT / "configs/llama70b.yaml")
FLEET = str(ROOT / "configs/fleet.yaml")
SVG = "{http://www.w3.org/2000/svg}"


def run(command: Any, *arguments: str) -> Result:
    result = CliRunner().invoke(command, arguments, catch_exceptions=True)
    if result.exception and not isinstance(result.exception, (SystemExit, UserError)):
        raise result.exception
    return result


def as_json(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(plan, *arguments, "--json").stdout)
    return found


def test_json_has_what_the_issue_names() -> None:
    found = as_json(ONE_MODEL, "--gpu", "H100")
    assert found["fits"] is True
    assert (found["tensor_parallel_size"], found["pipeline_parallel_size"]) == (4, 1)
    assert found["gpu"] == "H100"
    parts = ("weights", "non_torch", "activation", "cudagraph", "kv_cache")
    assert all(found["per_gpu"][f"{part}_bytes"] > 0 for part in parts)
    assert found["kv_bytes_per_token"] == 81_920
    assert found["kv_cache_tokens"] > 400_000
    assert found["max_concurrency"] > 40
    assert found["reasons"] == []
    assert found["instances"][0]["instance_type"] == "p5.48xlarge"
    assert {g["gpu"] for g in found["gpu_types"] if not g["fits"]} == {"V100"}


def test_the_number_of_front_ends_is_shown_with_its_reason(tmp_path: Path) -> None:
    shown = run(plan, ONE_MODEL).stdout
    said = [line.split() for line in shown.splitlines() if line.startswith("front ends")]
    assert [" ".join(words) for words in said] == [
        "front ends 2 (+1.1 GiB host): about 11,100 tokens/s of 256 requests"
    ]
    found = as_json(ONE_MODEL)["frontends"]
    assert found["count"] == 2 and "11,100 tokens/s" in found["reason"]
    assert found["host_bytes"] == pytest.approx(1.1 * 2**30, rel=0.01)
    set_ = tmp_path / "set.yaml"
    set_.write_text(
        Path(ONE_MODEL).read_text().replace("resources:", "frontends: 8\n    resources:")
    )
    assert "8 (+7.7 GiB host): as set" in run(plan, str(set_)).stdout
    # A machine alone bounds it: g6e.xlarge has 4 cores for its GPU.
    small = as_json("Qwen/Qwen3-30B-A3B", "-e", "quantization=fp8", "--gpu", "g6e.xlarge")
    assert small["frontends"]["count"] == 1 and small["frontends"]["host_bytes"] == 0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_plans_without_network(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = as_json(str(config))
    for one in found.get("models", [found]):
        assert one["fits"], one["reasons"]


def test_the_terminal_names_instances_and_reasons() -> None:
    text = run(plan, ONE_MODEL).output
    for words in ("fits", "p5.48xlarge", "KV cache", "not V100", "awq int4", "bf16 141 GB"):
        assert words in text


def test_a_model_alone_is_laid_out() -> None:
    found = as_json("deepseek-ai/DeepSeek-V3", "--gpu", "H200", "-e", "max_model_len=32768")
    assert (found["tensor_parallel_size"], found["pipeline_parallel_size"]) == (8, 1)
    fixed = as_json("meta-llama/Llama-3.3-70B-Instruct", "--gpu", "H100", "-e",
                    "tensor_parallel_size=1")  # fmt: skip
    assert fixed["fits"] is False
    assert "weights" in fixed["reasons"][0]
    assert fixed["kv_cache_tokens"] == 0
    assert fixed["smallest"]["tensor_parallel_size"] == 4
    shown = run(plan, "meta-llama/Llama-3.3-70B-Instruct", "--gpu", "H100", "-e",
                "tensor_parallel_size=3").output  # fmt: skip
    assert "does not divide the 64 attention heads" in shown


def test_an_instance_too_small_is_said(tmp_path: Path) -> None:
    found = as_json(ONE_MODEL, "--gpu", "p5.4xlarge")
    assert found["fits"] is False
    assert "span machines" in found["reasons"][0]


def test_the_legend_says_what_vllm_does_not_get_of_a_gpu() -> None:
    outside = "reserved (outside gpu_memory_utilization)"
    assert outside in run(plan, ONE_MODEL).output
    assert (
        outside not in run(plan, str(ROOT / "configs/demo.yaml")).output
    )  # a CPU's plan has no such part


def test_a_picture_of_each_model(tmp_path: Path) -> None:
    target = tmp_path / "plan.svg"
    run(plan, FLEET, "--plot", str(target))
    drawn = ElementTree.parse(target)
    text = "".join(drawn.getroot().itertext()).replace("\xa0", " ")
    for name in load(Path(FLEET)).models:
        assert f"{name} on " in text
    # Bars of several colours: each part of the memory has a class of its own.
    bars = {e.get("class") for e in drawn.iter(f"{SVG}text") if "█" in (e.text or "")}
    assert len(bars) >= 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nofile.yaml"], "no such file"),
        (["./nofolder"], "no such folder"),
        (["Qwen/Qwen3-32B", "--gpu", "H10"], "did you mean 'H100'"),
        (["Qwen/Qwen3-32B", "-e", "tensor_paralel_size=2"], "did you mean 'tensor_parallel_size'"),
        (["Qwen/Qwen3-32B", "-e", "nonsense"], "key=value"),
        (["Qwen/Qwen3-32B", "--prices", "none.yaml"], "none.yaml: no such file"),
        ([ONE_MODEL, "--model", "gpt"], "has no model 'gpt'"),
        ([ONE_MODEL, "--plot", "plan.png"], "call it plan.svg"),
        ([ONE_MODEL, "--plot", "none/plan.svg"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], words: str) -> None:
    result = run(plan, *arguments)
    assert isinstance(result.exception, UserError)
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)


def test_neither_vllm_nor_torch_nor_ray_is_imported() -> None:
    code = (
        "import sys, serve_app.planner.cli, serve_app.planner.check_model\n"
        "print([m for m in ('vllm', 'torch', 'ray', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_run_checks_before_it_starts_unless_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(
        serve_app.local.run, "run", lambda fleet, *_, **__: started.append(fleet) or 0
    )
    config = tmp_path / "bad.yaml"
    config.write_text(Path(ONE_MODEL).read_text().replace("parallel_size: 4", "parallel_size: 3"))
    refused = run(cli, "run", str(config))
    assert isinstance(refused.exception, UserError)  # what main() turns into exit status 2
    assert "tensor_parallel_size can be 1, 2, 4, 8" in str(refused.exception)
    assert not started
    assert run(cli, "run", "--no-check", str(config)).exit_code == 0
    assert len(started) == 1


def test_a_plan_on_a_cpu_has_no_words_of_gpus(tmp_path: Path) -> None:
    shown = run(cli, "plan", str(ROOT / "configs/demo.yaml")).output
    for word in ("GPU", "CUDA", " 0 GiB"):
        assert word not in shown
    assert re.search(r"11\.\d with 2,048 tokens each\n", re.sub(r" +\n", "\n", shown))


def test_what_one_type_of_gpu_cannot_run_does_not_end_the_plan_for_another(tmp_path: Path) -> None:
    """vLLM's default of ``max_num_batched_tokens`` is 8192 on an H100 and 2048 on a T4."""
    config = tmp_path / "many.yaml"
    text = Path(ONE_MODEL).read_text().replace("max_num_seqs: 256", "max_num_seqs: 4096")
    config.write_text(text)
    done = run(plan, str(config))
    assert done.exit_code == 0 and "on 4 × H100 (TP 4 × PP 1): fits" in done.output
    assert "not T4: engine.max_num_batched_tokens is 2048, below max_num_seqs (4096)" in done.output

"""The planner against what vLLM itself reported on an H200, and the recorder of those reports."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from serve_app.planner.model import metadata

ROOT = Path(__file__).parents[3]
RECORDED = ROOT / "benchmarks/results/planner_h200.json"


def benchmark() -> Any:
    path = ROOT / "benchmarks/planner_accuracy.py"
    spec = importlib.util.spec_from_file_location("planner_accuracy", path)
    assert spec and spec.loader
    import sys

    module = importlib.util.module_from_spec(spec)
    sys.modules["planner_accuracy"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not RECORDED.is_file(), reason="not measured yet")
def test_within_the_promised_error_of_vllm() -> None:
    comparisons = benchmark().compare(RECORDED)
    assert len({c.record["case"]["model"] for c in comparisons}) >= 6
    for c in comparisons:
        assert abs(c.weights_error) <= 0.01, (c.name, c.weights_error)
        assert abs(c.tokens_error) <= 0.03, (c.name, c.tokens_error)


ON_TWO_GPUS = {
    "tp2": ("RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic", {"tensor_parallel_size": 2}),
    "pp2": ("RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic", {"pipeline_parallel_size": 2}),
    "dp2": ("Qwen/Qwen3-30B-A3B", {"data_parallel_size": 2, "enable_expert_parallel": True}),
}
"""Steps of benchmarks/h200, which say what vLLM's log said; no constant was fitted on them."""


@pytest.mark.parametrize("step", ON_TWO_GPUS)
def test_as_close_on_two_gpus(step: str) -> None:
    from harness.models import kept, plan

    log = "\n".join(json.loads((RECORDED.parent / "h200.json").read_text())[step]["start"]["log"])
    weights = [float(gib) for gib in re.findall(r"Model loading took (\S+) GiB", log)]
    tokens = re.findall(r"GPU KV cache size: (\S+) tokens", log)
    name, parallel = ON_TWO_GPUS[step]
    settings = {"max_model_len": 8192, "enforce_eager": True, **parallel}
    found = plan(kept(name), **settings)
    assert [s.weights / 2**30 for s in found.stages] == pytest.approx(
        weights[: len(found.stages)], rel=0.01
    )
    # Each rank of a gang tells its own.
    measured = int(tokens[0].replace(",", "")) * parallel.get("data_parallel_size", 1)
    assert found.kv_cache_tokens == pytest.approx(measured, rel=0.03)


FOUR_GPUS = json.loads((RECORDED.parent / "four-h100.json").read_text())
SAID_BY_VLLM = FOUR_GPUS["planner, TP 4, from vLLM's log"]
"""Shapes that were planned before they were started. ``memory.COMMUNICATION_BYTES`` was fitted on
the first three."""

GROUPS = {
    "tp2-pp2": (
        "RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic",
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    ),
    "dp4-ep": ("Qwen/Qwen3-30B-A3B", {"data_parallel_size": 4, "enable_expert_parallel": True}),
    "tp4-ep": ("Qwen/Qwen3-30B-A3B", {"tensor_parallel_size": 4, "enable_expert_parallel": True}),
}
"""Groups of ranks, of which the weights were seen."""


@pytest.mark.parametrize("name", SAID_BY_VLLM)
def test_as_close_on_four_gpus(name: str) -> None:
    from harness.models import plan

    accuracy, said = benchmark(), SAID_BY_VLLM[name]
    [case] = [one for one in accuracy.CASES if one.name == name]
    of = metadata._model(case.model, accuracy.model_config(case), None, "benchmark")
    found = plan(of, "H100", **case.engine)
    assert said.keys() & {"weights_gib", "kv_cache_tokens"}
    if "weights_gib" in said:
        assert found.tightest.weights / 2**30 == pytest.approx(said["weights_gib"], rel=0.01)
    if "kv_cache_tokens" in said:
        assert found.kv_cache_tokens == pytest.approx(said["kv_cache_tokens"], rel=0.03)


@pytest.mark.parametrize("group", GROUPS)
def test_weights_of_each_rank_of_a_group(group: str) -> None:
    from harness.models import kept, plan

    name, parallel = GROUPS[group]
    said = json.dumps(FOUR_GPUS["groups"][group])
    ranks = [float(gib) for gib in re.findall(r"Model loading took (\S+) GiB", said)]
    found = plan(kept(name), "H100", max_model_len=8192, **parallel)
    assert len(ranks) == 4
    for stage in found.stages:
        assert [stage.weights / 2**30] * 4 == pytest.approx(ranks, rel=0.01)


def test_each_case_is_a_model_at_hand() -> None:
    accuracy = benchmark()
    assert len({case.name for case in accuracy.CASES}) == len(accuracy.CASES)
    for case in accuracy.CASES:
        assert accuracy.model_config(case)["architectures"]
    cut = next(case for case in accuracy.CASES if case.layers)
    assert accuracy.model_config(cut)["num_hidden_layers"] == cut.layers


def test_the_recorder_survives_cases_that_fail_or_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each case in its own process; what was recorded stays, whatever the others do."""
    accuracy = benchmark()
    good = {"kv_cache_tokens": 5, "weights": 1, "activation_peak": 1, "total_consumed": 2,
            "cudagraph_estimate": 0, "available_kv_cache": 3}  # fmt: skip

    def start(case: Any) -> dict[str, Any]:
        import time
        from dataclasses import asdict

        if case.name == "breaks":
            raise RuntimeError("no kernel image")
        if case.name == "hangs":
            time.sleep(60)
        return {"case": asdict(case), **good}

    cases = [accuracy.Case(name, "gemma-3-1b-it") for name in ("works", "breaks", "hangs")]
    monkeypatch.setattr(accuracy, "CASES", cases)
    monkeypatch.setattr(accuracy, "start_engine", start)
    accuracy.run([], tmp_path, budget_s=100, case_s=1, spawn=False)
    records = json.loads((tmp_path / "planner_h200.json").read_text())["records"]
    assert [r.get("kv_cache_tokens") for r in records] == [5, None, None]
    assert "no kernel image" in records[1]["failed"]
    assert "hangs: FAILED" in capfd.readouterr().out


def test_comparison_and_table(tmp_path: Path) -> None:
    """The planner's own numbers, set beside themselves, differ by nothing."""
    accuracy = benchmark()
    case = accuracy.CASES[0]
    from dataclasses import asdict

    from harness.models import kept, plan

    found = plan(kept(case.model), **case.engine)
    stage = found.tightest
    record = {
        "case": asdict(case),
        "total_memory": stage.total,
        "weights": stage.weights,
        "activation_peak": stage.activation,
        "total_consumed": stage.weights + stage.non_torch + stage.buffers,
        "cudagraph_estimate": 0,
        "cudagraph_sizes": [],
        "available_kv_cache": stage.kv_cache,
        "kv_cache_tokens": found.kv_cache_tokens,
    }
    recorded = tmp_path / "recorded.json"
    failed = {"case": asdict(case), "failed": "x"}
    recorded.write_text(json.dumps({"records": [record, failed]}))
    (one,) = accuracy.compare(recorded)
    assert (one.weights_error, one.tokens_error) == (0, 0)
    document = tmp_path / "table.md"
    document.write_text(f"before\n{accuracy._BEGIN}\nold\n{accuracy._END}\nafter\n")
    accuracy.write_table(document, accuracy.table([one]))
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "+0.00%" in text

"""Tables of README and docs are what the result files give, and no number in them is typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.h200 import tuning, tuning_page
from tools import result_tables

_NAMES = re.compile(r"<!-- from results: ([\w-]+), make tables -->")


@pytest.mark.parametrize("path", result_tables.PAGES, ids=lambda path: path.name)
def test_each_table_is_as_the_result_file_gives_it(path: Path) -> None:
    text = path.read_text()
    assert _NAMES.search(text), f"{path.name} has no table from a result file"
    assert result_tables.page(text) == text, "run: make tables"


def test_every_table_is_on_a_page() -> None:
    shown = [name for path in result_tables.PAGES for name in _NAMES.findall(path.read_text())]
    assert sorted(shown) == sorted(result_tables.TABLES)


def test_another_result_gives_another_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = result_tables.speed()
    for file in result_tables.RESULTS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    runs = json.loads((tmp_path / "front-ends-h100.json").read_text())
    for run in runs["runs"]:
        for one in run["rounds"]:
            if "ours-4" in one:
                one["ours-4"]["c64"]["tokens_per_s"] *= 2
    (tmp_path / "front-ends-h100.json").write_text(json.dumps(runs))
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    doubled = result_tables.speed()
    assert before != doubled
    first = [float(line.split("|")[2]) for line in before.splitlines()[2:5]]
    second = [float(line.split("|")[2]) for line in doubled.splitlines()[2:5]]
    assert second == pytest.approx([2 * it for it in first], abs=0.011)


def _step() -> tuning_page.Result:
    def one(tokens: float, hits: float) -> dict[str, float]:
        figures = dict.fromkeys(tuning_page.TITLES, 10.0)
        cached = {"prefix_cache_queries": 100.0, "prefix_cache_hits": hits}
        return {**figures, "output_throughput": tokens, "failed": 0.0, **cached}

    return {
        "date": "2026-01-02",
        "machine": {"cores": 16, "packages": {"vllm": "0.29.0"}},
        "gpus": ["a GPU, 1"],
        "variants": {"on": {"kv_tokens": 1234}, "off": {}, "broken": {"left_out": "no room"}},
        "loads": {"much": {"concurrency": 1}, "none": {"concurrency": 4}},
        "rounds": [
            {"on": {"much": one(400, 90), "none": one(99, 0)},
             "off": {"much": one(100, 0), "none": one(100, 0)}},
            {"on": {"much": one(600, 90), "none": one(100, 0)},
             "off": {"much": one(120, 0), "none": one(100, 0)}},
        ],
    }  # fmt: skip


def test_a_step_is_told_by_load_with_paired_ratios_and_what_was_left_out() -> None:
    text = tuning_page.table("tune_prefix", _step())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    header, rows = rows[0], rows[2:]
    assert header[:4] == ["load", "variant", "tokens/s", "÷ off"]
    assert rows[0][:4] == ["much", "on", "400-500-600", "4.00-4.50-5.00"]
    assert rows[1][3] == ""  # the base, of itself
    assert "failed" not in header, "a column in which nothing is"
    assert rows[0][header.index("prompt tokens cached")] == "0.90-0.90-0.90"
    assert "`broken` was left out: no room" in text
    assert "1,234" in text


def test_a_variant_that_only_one_round_has_is_told_by_that_round() -> None:
    step = _step() | {"note": "The second round is of another machine."}
    step["rounds"][1]["late"] = step["rounds"][1]["on"]
    text = tuning_page.table("tune_prefix", step)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:]]
    assert ["much", "late", "600", "5.00"] in [row[:4] for row in rows]
    assert ["much", "on", "400-500-600", "4.00-4.50-5.00"] in [row[:4] for row in rows]
    assert "The second round is of another machine." in text


def test_contenders_on_a_gpu_are_told_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(tokens: float) -> dict[str, dict[str, float]]:
        return {"c64": {"tokens_per_s": tokens, "errors": 1}}

    round_ = {
        "bare-1": one(100),
        "ours-4": one(150),
        "c1": {"bare-1": {"ttft_ms": [1, 2, 3]}, "ours-4": {"ttft_ms": [2, 4, 5]}},
    }
    step = {
        "date": "2026-01-02", "gpus": ["a GPU"], "machine": {"cores": 16},
        "left_out": {"litellm": "it is not installed"}, "rounds": [round_],
    }  # fmt: skip
    (tmp_path / "bench-gpu.json").write_text(json.dumps({"contenders_1b": step}))
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    text = result_tables.TABLES["contenders_1b"]()
    ours = next(line for line in text.splitlines() if line.startswith("| ours-4"))
    assert [cell.strip() for cell in ours.split("|")[1:-1]] == ["ours-4", "150", "1.50", "4.0", "1"]
    assert "Left out: litellm: it is not installed" in text
    assert result_tables.TABLES["contenders_8b"]() == result_tables.NOT_YET


def test_every_step_has_a_base_among_its_variants() -> None:
    for name, experiment in tuning.EXPERIMENTS.items():
        assert tuning_page.BASES[name] in experiment.variants
        assert name in tuning_page.SECOND


def test_errors_and_failed_rounds_are_told() -> None:
    level = {"tokens_per_s": 10.0, "errors": 3, "others_cores": 0.0}
    records = [
        {"arm": "bare", "round": 1, "load": {"1": level}},
        {"arm": "bare", "round": 2, "load": {}, "error": "it ended"},
    ]
    shown = report.throughput(records, {"bare": "bare"})
    assert "3, 1 rounds FAILED" in shown

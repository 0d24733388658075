"""Layouts and machines: what is chosen, and why the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.models import kept, model

from serve_app.config.settings import ModelConfig, Resources
from serve_app.errors import UserError
from serve_app.planner import choose, ec2, hardware
from serve_app.planner.vllm import parallelism
from serve_app.planner.vllm.sharding import Parallelism

LLAMA_70B = "meta-llama/Llama-3.3-70B-Instruct"
SHORT = {"max_model_len": 8192}


def test_smallest_layout_of_70b() -> None:
    of = kept(LLAMA_70B)
    found = {c.gpu.name: c for c in choose.per_gpu_type(of, SHORT)}
    assert found["H200"].plan is not None
    assert found["H200"].plan.parallel == Parallelism(2)
    assert found["L40S"].plan is not None
    assert found["L40S"].plan.parallel == Parallelism(4)
    assert found["T4"].plan is not None
    assert found["T4"].plan.parallel.pipeline > 1  # 8 × 14.6 GiB do not hold 131 GiB
    assert found["V100"].refused is not None
    assert "7.0" in found["V100"].refused


def test_a_layout_within_the_planners_own_error_is_the_last_choice() -> None:
    """Of a 70B with 16,384 tokens, TP 2 leaves an H100 next to nothing, and TP 4 a lot."""
    of, h100 = kept(LLAMA_70B), hardware.gpus()["H100"]
    arguments = {"max_model_len": 16_384}
    assert choose.plan_on(of, arguments, h100, Parallelism(2)).tight
    chosen = choose.smallest(of, arguments, h100).plan
    assert chosen is not None
    assert chosen.parallel == Parallelism(4)


@pytest.mark.parametrize(
    ("gpu", "arguments", "word"),
    [
        ("T4", {"dtype": "bfloat16"}, "bfloat16"),
        ("A100-80G", {"kv_cache_dtype": "fp8"}, "8.9"),
        ("T4", {"gpu_memory_utilization": 0.99}, "CUDA context"),
    ],
)
def test_why_a_gpu_is_refused(gpu: str, arguments: dict[str, Any], word: str) -> None:
    of = kept("HuggingFaceTB/SmolLM2-135M-Instruct")
    found = choose.plan_on(of, arguments, hardware.gpus()[gpu])
    assert not found.fits
    assert any(word in reason for reason in found.reasons)


def test_fp8_checkpoints_run_on_ampere_through_marlin() -> None:
    of = kept("Qwen/Qwen3-32B-FP8")
    assert choose.plan_on(of, SHORT, hardware.gpus()["A100-80G"]).fits


def test_precisions_that_would_do_with_fewer() -> None:
    of = kept(LLAMA_70B)
    found = choose.lighter(of, SHORT, hardware.gpus()["H100"], 4)
    assert [(x.name, x.gpus) for x in found] == [("fp8", 2), ("awq int4", 1)]
    assert 35e9 < found[1].weights_bytes < 42e9  # int4 with scales, head and embedding in 16 bits
    assert choose.lighter(kept("Qwen/Qwen3-32B-FP8"), SHORT, hardware.gpus()["H100"], 4) == []


def plan_70b(tp: int = 4, pp: int = 1, gpu: str = "H100") -> Any:
    return choose.plan_on(kept(LLAMA_70B), SHORT, hardware.gpus()[gpu], Parallelism(tp, pp))


ANY = ModelConfig(model="x")


def plan_8b() -> Any:
    of = kept("meta-llama/Llama-3.1-8B-Instruct")
    return choose.plan_on(of, SHORT, hardware.gpus()["L40S"])


def test_machines_count_idle_gpus_and_say_why_not() -> None:
    good, refused = ec2.machines(plan_70b(), ANY)
    assert [(m.instance.name, m.count, m.stranded_gpus) for m in good] == [("p5.48xlarge", 1, 4)]
    assert [r.name for r in refused] == ["p5.4xlarge"]
    assert "span machines" in refused[0].reason
    good, _ = ec2.machines(plan_70b(4, 2, "L40S"), ANY)
    assert (good[0].instance.name, good[0].count) == ("g6e.48xlarge", 1)
    assert any(m.instance.name == "g6e.12xlarge" and m.count == 2 for m in good)


def test_machines_must_hold_the_replica_beside_its_gpus() -> None:
    wide = ModelConfig(model="x", resources=Resources(num_cpus=64))
    good, refused = ec2.machines(plan_70b(4, 1, "L40S"), wide)
    assert "g6e.12xlarge" not in {m.instance.name for m in good}
    assert any("takes 69 cores" in r.reason for r in refused)
    many = ModelConfig(model="x", frontends=6)
    good, refused = ec2.machines(plan_8b(), many)
    assert "g6e.xlarge" not in {m.instance.name for m in good}
    assert any(r.name == "g6e.xlarge" and "takes 7 cores" in r.reason for r in refused)
    good, _ = ec2.machines(plan_8b(), ANY)  # `auto` takes what there is
    assert good[0].instance.name == "g6e.xlarge"


def test_prices_come_only_from_the_user(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("g6e.12xlarge: 10.5\ng6e.24xlarge: 8\n")
    prices = ec2.read_prices(file)
    good, _ = ec2.machines(plan_70b(4, 1, "L40S"), ANY, prices)
    assert [(m.instance.name, m.price) for m in good[:2]] == [
        ("g6e.24xlarge", 8), ("g6e.12xlarge", 10.5),
    ]  # fmt: skip
    assert good[2].price is None
    assert all(m.price is None for m in ec2.machines(plan_70b(4, 1, "L40S"), ANY)[0])


@pytest.mark.parametrize("text", ["[1, 2]", "p5.48xlarge: cheap", "p5.48xlarge: -3", "{", ""])
def test_bad_prices(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(UserError):
        ec2.read_prices(file)


@pytest.mark.parametrize(
    ("name", "gpu", "instance"),
    [
        ("h100", "H100", None),
        ("A100-80G", "A100-80G", None),
        ("A100", "A100-80G", None),
        ("p5.48xlarge", "H100", "p5.48xlarge"),
        ("p4d.24xlarge", "A100-40G", "p4d.24xlarge"),
    ],
)
def test_gpus_by_any_name(name: str, gpu: str, instance: str | None) -> None:
    found, machine = hardware.find(name)
    assert found.name == gpu
    assert (machine.name if machine else None) == instance


def test_ec2_table_names_only_known_gpus() -> None:
    machines = hardware.instances()
    assert len(machines) > 50
    assert machines["p5en.48xlarge"].gpus == 8
    assert machines["p5.48xlarge"].efa == 32
    assert {i.gpu.name for i in hardware.with_accelerator("A100", "x")} == {"A100-40G", "A100-80G"}
    assert "g6f.large" not in machines  # a share of a GPU
    assert "g5g.xlarge" not in machines  # arm64
    for gpu in hardware.gpus().values():
        assert gpu.ec2_memory_mib * hardware.MIB > gpu.memory_bytes


def test_moe_needs_a_size_that_divides_its_experts() -> None:
    of = model(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=100,
               model_type="qwen3_moe")  # fmt: skip
    assert any("experts" in p for p in parallelism.problems(of.shape, Parallelism(8)))
    assert not parallelism.problems(of.shape, Parallelism(8, expert_parallel=True))

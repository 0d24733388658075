"""How many front ends `auto` gives, why, and what they take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.models import LLAMA, kept, model

from serve_app.config.document import load
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.planner import choose, front_ends, hardware
from serve_app.planner.front_ends import FrontEnds, Node
from serve_app.planner.hardware import GIB
from serve_app.planner.loading import cpu_plan, load_model
from serve_app.planner.model import metadata
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.vllm.sharding import Parallelism

CONFIGS = Path(__file__).parents[3] / "configs"
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"
LLAMA_70B = "meta-llama/Llama-3.3-70B-Instruct"
SHAPE_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
LARGE = Node(cores=192, gpus=8)
"""A p5.48xlarge, nearly."""

ONE_GPU = Node(cores=16, gpus=1)
"""The machine of the measurements: one H100."""


def of(name: str) -> Model:
    return model(LLAMA, **SHAPE_1B, tie_word_embeddings=True) if name == "1B" else kept(name)


def config(**args: Any) -> ModelConfig:
    return ModelConfig.model_validate({"model": "org/model", **args})


def number(
    name: str, gpu: str, *, tp: int = 1, pp: int = 1, node: Node | None = LARGE, **args: Any
) -> FrontEnds:
    """What a planned replica gets."""
    engine = {"max_model_len": 8192, **args.pop("engine", {})}
    parallel = Parallelism(tp, pp)
    plan = choose.plan_on(of(name), engine, hardware.gpus()[gpu], parallel)
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    return front_ends.on_plan(config(engine={**engine, **sizes}, **args), plan, node)


@pytest.mark.parametrize(
    ("name", "gpu", "tp", "count"),
    [
        ("1B", "H100", 1, 4),
        ("1B", "B200", 1, 4),
        ("1B", "L4", 1, 1),
        (LLAMA_8B, "H100", 1, 2),
        (LLAMA_8B, "H100", 2, 3),
        (LLAMA_8B, "H200", 1, 3),
        (LLAMA_8B, "B200", 1, 4),
        (LLAMA_8B, "L40S", 1, 1),
        (LLAMA_8B, "L4", 1, 1),
        (LLAMA_70B, "H100", 4, 2),
        (LLAMA_70B, "H100", 8, 2),
        (LLAMA_70B, "L40S", 8, 1),
        ("Qwen/Qwen3-32B-FP8", "H100", 1, 1),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "H100", 1, 4),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "H100", 8, 2),
    ],
)
def test_auto_follows_the_expected_rate(name: str, gpu: str, tp: int, count: int) -> None:
    assert number(name, gpu, tp=tp).count == count


def test_the_rate_is_the_one_that_was_measured() -> None:
    """Where nothing in front of it limits, the 1B shape streamed 39,900 to 43,400 on an H100."""
    plan = choose.plan_on(of("1B"), {"max_model_len": 8192}, hardware.gpus()["H100"])
    assert 39_900 < front_ends.rate(plan) < 43_400


def test_more_bandwidth_more_requests_and_fewer_bytes_are_faster() -> None:
    def rate(gpu: str, *, tp: int = 1, pp: int = 1, **engine: Any) -> float:
        plan = choose.plan_on(
            of(LLAMA_8B), {"max_model_len": 8192, **engine}, hardware.gpus()[gpu],
            Parallelism(tp, pp),
        )  # fmt: skip
        return front_ends.rate(plan)

    assert rate("L40S") < rate("A100-80G") < rate("H100") < rate("H200") < rate("B200")
    assert rate("H100", max_num_seqs=32) < rate("H100", max_num_seqs=128) < rate("H100")
    assert rate("H100", max_num_seqs=256) == rate("H100", max_num_seqs=1024)
    assert rate("H100") < rate("H100", quantization="fp8")
    # Two GPUs halve what each reads, and not the rest; two stages read all of it in turn.
    assert rate("H100") < rate("H100", tp=2) < 2 * rate("H100")
    assert rate("H100", pp=2) < rate("H100")


def test_a_kv_cache_that_holds_few_requests_makes_few_tokens() -> None:
    engine = {"max_model_len": 8192, "kv_cache_memory_bytes": 2 * GIB}
    few = choose.plan_on(of(LLAMA_8B), engine, hardware.gpus()["H100"])
    assert few.fits and few.concurrency(front_ends.LENGTH) < 30
    found = front_ends.on_plan(config(engine=engine), few, LARGE)
    assert found.count == 1 and found.why.endswith("tokens/s of 26 requests")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"resources": {"device": "cpu"}}, "on a CPU the engine is what limits"),
        ({"engine": {"data_parallel_size": 2}}, "each data-parallel rank has its own"),
        ({"engine": {"runner": "pooling"}}, "the model does not write text"),
        ({"engine": {"convert": "embed"}}, "the model does not write text"),
        ({"model": "BAAI/bge-m3"}, "the model does not write text"),
    ],
)
def test_one_where_a_front_end_is_not_what_limits(args: dict[str, Any], why: str) -> None:
    asked = config(**args)
    assert front_ends.how_many(asked, LARGE, "H100") == FrontEnds(1, why)
    plan = choose.plan_on(of("1B"), {}, hardware.gpus()["H100"])
    assert front_ends.on_plan(asked, plan, LARGE) == FrontEnds(1, why)
    assert front_ends.how_many(config(**args, frontends=3), LARGE, "H100").count == 3


@pytest.mark.parametrize("engine", [{}, {"runner": "pooling"}, {"data_parallel_size": 2}])
def test_an_explicit_number_wins(engine: dict[str, Any]) -> None:
    small = Node(cores=2, gpus=1)
    asked = config(frontends=16, engine=engine, resources={"num_cpus": 1})
    assert front_ends.how_many(asked, small, "T4") == FrontEnds(16, "as set")
    assert front_ends.most_on(asked, small) == 16


@pytest.mark.parametrize(
    ("node", "tp", "pp", "count"),
    [
        (ONE_GPU, 1, 1, 4),
        (Node(4, 1), 1, 1, 1),  # worker, EngineCore, Ray: one is left
        (Node(5, 1), 1, 1, 2),
        (Node(8, 4), 1, 1, 1),  # 2 cores for each GPU
        (Node(24, 4), 1, 1, 3),
        (Node(24, 4), 4, 1, 4),  # the whole node is the replica's
        (Node(8, 4), 4, 1, 2),
        (Node(8, 4), 4, 2, 2),  # and its other stage is on another one
        (Node(1, 1), 1, 1, 1),
        (Node(64, 0), 1, 1, 4),  # a node that does not tell of GPUs
    ],
)
def test_the_cores_bound_auto(node: Node, tp: int, pp: int, count: int) -> None:
    engine = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    assert front_ends.allowed(config(engine=engine), node) == count
    found = number("1B", "B200", tp=tp, pp=pp, node=node)
    assert found.count == count
    if count < front_ends.MOST:
        gpus = "1 GPU" if node.gpus == 1 else f"{node.gpus} GPUs"
        assert found.why == f"the node has {node.cores} cores, {gpus}"


@pytest.mark.parametrize(("num_cpus", "count"), [(0, 1), (0.5, 1), (1, 1), (2.5, 2), (8, 4)])
def test_reserved_cores_bound_auto(num_cpus: float, count: int) -> None:
    found = number("1B", "H100", resources={"num_cpus": num_cpus})
    assert found.count == count
    assert count == 4 or found.why == f"resources.num_cpus is {num_cpus:g}"
    assert number("1B", "H100", resources={}).count == 4  # the default is nobody's wish


@pytest.mark.parametrize(
    ("asked", "accelerator", "why"),
    [
        (config(), None, "because the type of GPU is not"),
        (config(), "MI300X", "MI300X is made by AMD"),
        (config(), "H100", "org/model: the hub cannot be reached"),
        (config(model="/no/such/folder"), "H100", "/no/such/folder: no such folder"),
        (
            config(model=LLAMA_8B, engine={"kv_cache_dtype": "turboquant_4bit_nc"}),
            "H100",
            "is not planned for",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_one_and_said(
    monkeypatch: pytest.MonkeyPatch, asked: ModelConfig, accelerator: str | None, why: str
) -> None:
    def no_hub(name: str, _: object) -> None:
        raise UserError(f"{name}: the hub cannot be reached")

    monkeypatch.setattr(metadata, "_from_hub", no_hub)
    found = front_ends.how_many(asked, ONE_GPU, accelerator)
    assert found.count == 1
    assert found.why.startswith("the rate is not known") and why in found.why


def test_an_estimate_that_fails_does_not_keep_a_replica_from_starting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("of a config that nobody thought of")

    monkeypatch.setattr(choose, "plan_on", broken)
    found = front_ends.how_many(config(model=LLAMA_8B), ONE_GPU, "H100")
    assert (found.count, "ZeroDivisionError: of a config" in found.why) == (1, True)


def test_where_the_cores_leave_one_nothing_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(metadata, "_from_hub", asked.append)
    assert front_ends.how_many(config(), Node(4, 1), "H100").why == "the node has 4 cores, 1 GPU"
    assert not asked


def test_a_replica_takes_the_nodes_gpu_over_the_configs() -> None:
    asked = config(model=LLAMA_8B, resources={"accelerator_type": "L4"})
    assert front_ends.how_many(asked, LARGE).count == 1
    assert front_ends.how_many(asked, LARGE, "H200").count == 3


@pytest.mark.parametrize(
    ("name", "model_id", "count"),
    [
        ("llama70b", "llama-3.3-70b", 2),
        ("llama70b-2node", "llama-3.3-70b", 1),
        ("fleet", "llama-3.3-70b", 2),
        ("fleet", "llama-3.1-8b", 1),
        ("fleet", "bge-m3", 1),
        ("qwen3-32b-fp8", "qwen3-32b-fp8", 1),
        ("moe-expert-parallel", "qwen3-235b-a22b", 2),
        ("speculative", "llama-3.3-70b", 1),
        ("demo", "smollm2-135m", 1),
    ],
)
def test_shipped_configs(name: str, model_id: str, count: int) -> None:
    shipped = load(CONFIGS / f"{name}.yaml").models[model_id]
    assert front_ends.how_many(shipped, LARGE).count == count
    if shipped.resources.device == "gpu":
        plan = choose.plan_on(
            load_model(shipped, offline=True),
            choose.arguments_of(shipped),
            hardware.find(str(shipped.resources.accelerator_type))[0],
        )
        assert front_ends.on_plan(shipped, plan, LARGE).count == count


def test_every_gpu_has_its_bandwidth() -> None:
    known = hardware.gpus()
    assert all(3e11 <= gpu.bandwidth <= 8e12 for gpu in known.values())
    assert known["L4"].bandwidth < known["A10G"].bandwidth < known["L40S"].bandwidth
    assert known["A100-40G"].bandwidth < known["A100-80G"].bandwidth < known["H100"].bandwidth


def test_their_memory_counts_on_a_cpu() -> None:
    def host(**args: Any) -> int:
        asked = config(model=LLAMA_8B, resources={"device": "cpu", **args.pop("resources", {})},
                       engine={"max_model_len": 2048, "max_num_seqs": 8}, **args)  # fmt: skip
        return cpu_plan(kept(LLAMA_8B), asked).tightest.requested

    assert host(frontends=3) - host() == 2 * front_ends.FRONT_END_BYTES
    assert 1.0 * GIB < front_ends.FRONT_END_BYTES < 1.15 * GIB
    gib = host() / GIB + 1
    tight = config(model=LLAMA_8B, frontends=3, engine={"max_model_len": 2048, "max_num_seqs": 8},
                   resources={"device": "cpu", "memory_gib": gib})  # fmt: skip
    (reason,) = cpu_plan(kept(LLAMA_8B), tight).reasons
    assert "of host memory, but resources.memory_gib is" in reason


def test_a_replica_can_ask_before_it_imports_anything_large() -> None:
    code = (
        "import sys, serve_app.planner.front_ends; "
        "print([m for m in ('ray', 'vllm', 'torch', 'kubernetes', 'transformers', "
        "'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

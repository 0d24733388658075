"""Parts of a GPU: Ray's fraction, vLLM's two numbers, and what shares a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from harness.processes import REPO

from serve_app.config.document import Fleet, load, parse_document
from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError
from serve_app.planner import check_model, choose, hardware, shares, together
from serve_app.planner.check_machine import Limits
from serve_app.planner.cli import plan
from serve_app.planner.hardware import CONTEXT_BYTES, GIB
from serve_app.planner.loading import load_model
from serve_app.planner.together import Part
from serve_app.planner.vllm.share import SPARE_BYTES

ONE_GPU = REPO / "configs/one-gpu.yaml"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
H100, L40S = hardware.gpus()["H100"], hardware.gpus()["L40S"]


def config(engine: dict[str, Any] | None = None, **resources: Any) -> ModelConfig:
    engine = {"max_model_len": 8192} | (engine or {})
    return ModelConfig.model_validate({"model": LLAMA, "engine": engine, "resources": resources})


def fleet(**parts: dict[str, Any]) -> Fleet:
    """The config of one GPU with these ``resources``, by model."""
    document = yaml.safe_load(ONE_GPU.read_text())
    for application in document["applications"]:
        if application["name"] in parts:
            application["args"]["resources"] = parts[application["name"]]
    return parse_document(document, Path("f.yaml"))


def machine(gpu: str = "L40S", count: int = 1) -> Limits:
    return Limits((hardware.gpus()[gpu],) * count, 64, 500 * GIB, 400 * GIB)


# The fraction for Ray


def test_a_share_is_the_fraction_and_whole_gpus_have_none() -> None:
    assert shares.fraction(config(gpu_share=0.3)) == 0.3
    assert shares.fraction(config()) is None


def test_gib_are_a_fraction_of_the_named_gpu_rounded_up() -> None:
    part = shares.fraction(config(gpu_memory_gib=24, accelerator_type="L40S"))
    assert part is not None and 24 / 44.39 <= part < 24 / 44.39 + 0.0001
    both_sizes = shares.fraction(config(gpu_memory_gib=24, accelerator_type="A100"))
    assert both_sizes == shares.fraction(config(gpu_memory_gib=24, accelerator_type="A100-40G"))


def test_gib_without_a_type_are_a_fraction_of_the_clusters_smallest_gpu() -> None:
    some = config(gpu_memory_gib=20)
    assert shares.fraction(some, lambda: {"H100", "L4"}) == pytest.approx(20 / 22.03, abs=1e-4)
    assert shares.fraction(some, lambda: {"H100"}) == pytest.approx(20 / 79.18, abs=1e-4)
    assert shares.placed(some, lambda: {"H100"}).head["GPU"] == shares.fraction(
        some, lambda: {"H100"}
    )


@pytest.mark.parametrize(
    ("types", "said"),
    [
        (set(), "memory of the GPUs here is not known; set resources.accelerator_type, or gpu_sh"),
        ({""}, "set resources.accelerator_type, or gpu_share"),
        ({"H100", "RTX9999"}, "the memory of RTX9999 is not known; set gpu_share"),
        ({"H100", "T4"}, "resources.gpu_memory_gib is 20, and T4 has 14.6; lower it"),
    ],
)
def test_gib_of_an_unknown_gpu_are_refused(types: set[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shares.fraction(config(gpu_memory_gib=20), lambda: types)


# vLLM's numbers


@pytest.mark.parametrize("part", [{"gpu_share": 0.5}, {"gpu_memory_gib": 39.59}])
def test_all_that_the_process_takes_is_within_its_part(part: dict[str, Any]) -> None:
    one = config(**part)
    model = load_model(one)
    told = shares.engine_arguments(one, model, H100)
    budget = int(0.5 * H100.memory_bytes)
    wanted = told["gpu_memory_utilization"] * H100.memory_bytes
    # What vLLM wants free when it starts, and its context, are no more than the part.
    assert budget - 0.01 * GIB <= wanted + CONTEXT_BYTES <= budget
    without_kv = choose.plan_on(model, choose.arguments_of(one), H100).tightest.without_kv
    taken = without_kv + told["kv_cache_memory_bytes"] + CONTEXT_BYTES
    assert taken == pytest.approx(budget - SPARE_BYTES, abs=0.01 * GIB)


def test_what_sampling_takes_is_kept_where_no_engine_measures_it() -> None:
    """Two 1B shapes with parts of an H100 held 0.14 GiB more than their parts after their warm-up,
    and an alarm said so."""
    one = config({"max_num_seqs": 1024}, gpu_share=0.5)
    model = load_model(one)
    alone = choose.plan_on(model, one.engine, H100).tightest
    in_part = choose.plan_on(model, choose.arguments_of(one), H100).tightest
    logits = 1024 * model.shape.vocab_size
    hidden = (8192 + 1024) * model.shape.hidden_size * 2
    assert in_part.activation == logits * 2 + logits * 4 * 3 + hidden
    assert in_part.activation > alone.activation
    assert in_part.non_torch > alone.non_torch


def test_what_the_config_sets_holds() -> None:
    one = config({"kv_cache_memory_bytes": 2 * GIB}, gpu_share=0.5)
    told = shares.engine_arguments(one, load_model(one), H100)
    assert told.keys() == {"gpu_memory_utilization"}
    one = config({"gpu_memory_utilization": 0.4}, gpu_share=0.5)
    told = shares.engine_arguments(one, load_model(one), H100)
    assert told.keys() == {"kv_cache_memory_bytes"}
    assert told["kv_cache_memory_bytes"] < 0.4 * H100.memory_bytes - 14 * GIB


@pytest.mark.parametrize(
    "engine", [{"kv_cache_memory_bytes": 30 * GIB}, {"gpu_memory_utilization": 0.6}]
)
def test_more_than_the_part_is_refused_with_the_part_that_would_do(engine: dict[str, Any]) -> None:
    one = config(engine, gpu_share=0.5)
    with pytest.raises(ConfigError, match=r"more than its part of H100 .*gpu_share 0\.6") as said:
        shares.engine_arguments(one, load_model(one), H100)
    enough = float(str(said.value).split("gpu_share ")[1].split()[0])
    shares.engine_arguments(config(engine, gpu_share=enough), load_model(one), H100)
    with pytest.raises(ConfigError):
        shares.engine_arguments(config(engine, gpu_share=enough - 0.01), load_model(one), H100)


def test_an_encoder_gets_no_kv_cache() -> None:
    reranker = load(ONE_GPU).models["reranker"]
    told = shares.engine_arguments(reranker, load_model(reranker), L40S)
    assert told.keys() == {"gpu_memory_utilization"}


@pytest.mark.parametrize(
    ("part", "unit"), [({"gpu_share": 0.1}, "gpu_share"), ({"gpu_memory_gib": 8}, "gpu_memory_gib")]
)
def test_a_part_that_is_too_small_is_refused_with_one_that_would_fit(
    part: dict[str, Any], unit: str
) -> None:
    one = config(**part)
    found = choose.plan_on(load_model(one), choose.arguments_of(one), H100)
    assert not found.fits
    enough = float(found.reasons[-1].removeprefix(f"{unit} ").removesuffix(" would fit"))
    larger = config(**{unit: enough})
    assert choose.plan_on(load_model(one), choose.arguments_of(larger), H100).fits


def test_where_the_whole_gpu_is_too_small_no_part_is_named() -> None:
    one = config({"max_model_len": 131072}, gpu_share=0.9)
    found = choose.plan_on(load_model(one), choose.arguments_of(one), hardware.gpus()["L4"])
    assert found.reasons[-1] == "no part of L4 is enough; remove gpu_share"


# What shares a GPU


def test_parts_fill_the_fullest_gpu_that_has_room() -> None:
    parts = [Part(str(of), of, "") for of in (0.2, 0.5, 0.3, 0.4, 0.1, 0.5)]
    found = [[part.fraction for part in gpu.parts] for gpu in together.packed(parts)]
    assert found == [[0.5, 0.5], [0.4, 0.3, 0.2, 0.1]]


def test_three_thirds_are_one_gpu_as_ray_counts_them() -> None:
    third = config(gpu_share=1 / 3, accelerator_type="L40S")
    part = together.part_of("m", third, L40S)
    assert part is not None and len(together.packed([part] * 3)) == 1


def test_a_part_beyond_the_gpu_is_told_as_that() -> None:
    large = config(gpu_memory_gib=100, accelerator_type="L40S")
    found = choose.plan_on(load_model(large), choose.arguments_of(large), L40S)
    assert not found.fits
    assert found.reasons[0] == "a part of 100.0 GiB is more than L40S has (44.4)"
    assert not any("gpu_memory_utilization" in reason for reason in found.reasons)


def test_a_kv_cache_that_the_gpu_cannot_hold_beside_the_weights_is_refused() -> None:
    large = config({"kv_cache_memory_bytes": 70 * GIB})
    [said] = choose.plan_on(load_model(large), choose.arguments_of(large), H100).reasons
    assert said.startswith("engine.kv_cache_memory_bytes 70.0 GiB beside weights")
    smaller = config({"kv_cache_memory_bytes": 50 * GIB})
    assert choose.plan_on(load_model(smaller), choose.arguments_of(smaller), H100).fits


def test_a_plan_adds_up_what_shares_a_gpu() -> None:
    done = CliRunner().invoke(plan, [str(ONE_GPU)])
    shown = done.output.partition("What shares a GPU (L40S), in GiB")[2].splitlines()[2:5]
    names = [line.split()[0] for line in shown]
    assert names == ["chat", "embeddings", "reranker"]
    told = yaml.safe_load(CliRunner().invoke(plan, [str(ONE_GPU), "--json"]).output)
    [gpu] = told["shared_gpus"]
    assert gpu["free"] == 0 and gpu["gpu"] == "L40S"
    for model in gpu["models"]:
        parts = [model[f"{of}_bytes"] for of in ("weights", "working", "context", "kv_cache")]
        assert sum(parts) <= model["part_bytes"]
    assert gpu["models"][0]["kv_cache_tokens"] > 100_000
    assert "shared_gpus" not in yaml.safe_load(
        CliRunner().invoke(plan, [str(REPO / "configs/llama70b.yaml"), "--json"]).output
    )


def test_parts_that_take_several_gpus_are_told_with_what_they_ask_for(tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text(ONE_GPU.read_text().replace("gpu_share: 0.8", "gpu_share: 0.95"))
    done = CliRunner().invoke(plan, [str(over)])
    assert done.exit_code == 0
    assert "What shares GPU 1 of 2 (L40S), in GiB; 1.1" in done.output
    assert "What shares GPU 2 of 2 (L40S), in GiB; 1.1" in done.output


def test_parts_without_a_type_are_planned_on_one_gpu() -> None:
    of = {"half": config(gpu_share=0.5), "most": config(gpu_share=0.9)}
    models = {name: (load_model(one), one) for name, one in of.items()}
    assert together.one_gpu(models) is hardware.gpus()["A100-40G"]
    assert together.one_gpu({"whole": (load_model(config()), config())}) is None
    # No machine has 170 GiB for one A100 of 40 GB.
    of = {name: config(gpu_share=0.5, memory_gib=80) for name in ("a", "b")}
    models = {name: (load_model(one), one) for name, one in of.items()}
    assert together.one_gpu(models) is L40S


def test_what_shares_a_gpu_and_no_machine_holds_is_told(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    text = ONE_GPU.read_text()
    large.write_text(text.replace("gpu_share: 0.1}", "gpu_share: 0.1, memory_gib: 250}"))
    done = CliRunner().invoke(plan, [str(large)])
    assert done.exit_code == 1
    assert done.output.startswith("each model fits, but what shares a GPU does not: see below\n")
    said = (
        "chat, embeddings, reranker share a GPU, and need a pod with 6 cores and 524 GiB of host "
        "memory; of EC2's machines g6e.16xlarge gives the most to one L40S, 62 and 463; lower "
        "their resources.num_cpus or memory_gib, or give them larger parts"
    )
    assert f"does not fit: {said}\n" in done.output
    told = yaml.safe_load(CliRunner().invoke(plan, [str(large), "--json"]).output)
    (found,) = told["on_no_machine"]
    assert told["fits"] is False and found["status"] == "fail"
    assert f"{found['message']}; {found['fix']}" == said
    with pytest.raises(ConfigError, match="application 'chat': chat, embeddings, reranker share"):
        check_model.refuse(load(large))
    check_model.refuse(load(large), machine())  # this one may have the memory: another check's


def test_the_most_replicas_are_what_a_machine_must_hold() -> None:
    document = yaml.safe_load(ONE_GPU.read_text())
    small = document["applications"][1]["args"]
    small["resources"]["memory_gib"] = 70
    small["autoscaling"] = {"min_replicas": 1, "max_replicas": 2}
    assert not [*together.problems(parse_document(document, Path("f.yaml")))]
    small["autoscaling"]["max_replicas"] = 9
    [finding] = together.problems(parse_document(document, Path("f.yaml")))
    # The largest parts first: the chat model's with two of the small ones, then the others.
    assert finding.message.startswith("7 × embeddings, reranker share a GPU, and need a pod with")


def test_a_machine_runs_what_its_gpu_holds() -> None:
    check_model.refuse(load(ONE_GPU), machine())
    check_model.refuse(fleet(chat={}), machine(count=2))  # a GPU of its own, one for the others


def test_parts_that_are_more_than_the_gpu_are_refused_with_one_that_would_fit() -> None:
    over = fleet(embeddings={"gpu_share": 0.2}, reranker={"gpu_memory_gib": 6})
    said = (
        r"all replicas together need 2 GPUs \(chat: gpu_share 0.8, embeddings: gpu_share 0.2, "
        r"reranker: gpu_memory_gib 6\), and this machine has 1; with gpu_share (\S+) 'chat' fits"
    )
    with pytest.raises(ConfigError, match=said) as refused:
        check_model.refuse(over, machine())
    smaller = float(str(refused.value).split("with gpu_share ")[1].split()[0])
    assert smaller + 0.2 + 6 / 44.39 == pytest.approx(1, abs=1e-3)
    small = {"gpu_share": 0.2}, {"gpu_memory_gib": 6}
    mended = fleet(chat={"gpu_share": smaller}, embeddings=small[0], reranker=small[1])
    check_model.refuse(mended, machine())


def test_a_whole_gpu_leaves_none_for_parts() -> None:
    with pytest.raises(ConfigError, match=r"need 2 GPUs \(chat: 1, embeddings: gpu_share 0\.1"):
        check_model.refuse(fleet(chat={}), machine())


def test_a_part_is_tight_by_its_own_size() -> None:
    """What is little of a whole H200 is a lot of a thirtieth of one."""
    config = ModelConfig(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        resources={"gpu_share": 0.035},
        engine={"max_model_len": 2048, "max_num_seqs": 8, "enforce_eager": True},
    )
    found = choose.plan_on(
        load_model(config, offline=True), choose.arguments_of(config), hardware.gpus()["H200"]
    )
    assert found.fits
    assert found.tightest.kv_cache < 0.03 * found.tightest.total
    assert not found.tight


def test_what_shares_a_gpu_is_readable_on_a_narrow_screen() -> None:
    done = CliRunner(env={"COLUMNS": "80"}).invoke(plan, [str(REPO / "configs/fleet.yaml")])
    table = done.output.partition("What shares a GPU (L4)")[2].partition("──")[0]
    assert table.count("gpu_share 0.5") == 2 and "KV tokens" in table and "…" not in table


def test_many_replicas_are_packed_like_few() -> None:
    """10,000, the most of a model."""
    three, one = Part("m", 0.3, ""), Part("n", 0.1, "")
    packed = together.packed([three] * 10_000 + [one] * 3_000)
    assert Counter(len(gpu.parts) for gpu in packed) == {4: 3_000, 3: 333, 1: 1}

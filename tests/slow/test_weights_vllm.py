"""Weights on each GPU against vLLM's own layers, built on the meta device for one rank of many.

Half a minute for each, most of it vLLM's import and config.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.planner import hardware
from serve_app.planner.model import derive, shape
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.vllm import defaults, memory
from serve_app.planner.vllm.sharding import Parallelism

ROOT = Path(__file__).parents[2]


def group(size: int, rank: int) -> Any:
    """What layers ask of a process group while they are built."""
    ranks = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    return SimpleNamespace(
        world_size=size, rank_in_group=rank, rank=rank, ranks=list(range(size)), local_rank=0,
        is_first_rank=rank == 0, is_last_rank=rank == size - 1, first_rank=0,
        device_group=ranks, cpu_group=ranks, use_device_communicator=False,
        device_communicator=None,
    )  # fmt: skip


def vllm_bytes(
    config: dict[str, Any], folder: Path, tp: int, pp: int, patch: pytest.MonkeyPatch
) -> list[int]:
    """Bytes of the parameters and buffers that vLLM builds, for each stage."""
    import torch
    import vllm.distributed.parallel_state as state
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    (folder / "config.json").write_text(json.dumps(config))
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, max_model_len=4096, dtype="bfloat16",
        load_format="dummy", enforce_eager=True,
    )  # fmt: skip
    resolved = arguments.create_engine_config()
    resolved.parallel_config.tensor_parallel_size = tp
    for name in ("_TP", "_EP"):
        patch.setattr(state, name, group(tp, 0), raising=False)
    for name in ("_DP", "_PCP", "_DCP", "_WORLD", "_EPLB"):
        patch.setattr(state, name, group(1, 0), raising=False)
    stages = []
    for rank in range(pp):
        patch.setattr(state, "_PP", group(pp, rank))
        _ROPE_DICT.clear()  # shared within one engine, not between two
        with (
            set_current_vllm_config(resolved),
            set_default_torch_dtype(torch.bfloat16),
            torch.device("meta"),
        ):
            built = initialize_model(vllm_config=resolved)
        tensors = {id(t): t for t in (*built.parameters(), *built.buffers())}
        stages.append(sum(t.numel() * t.element_size() for t in tensors.values()))
    return stages


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 4, 1),
        ("meta-llama/Llama-3.1-8B-Instruct", 16, 3),  # replicated KV heads, uneven stages
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 1, 2),  # tied embeddings on both stages
        ("Qwen/Qwen3-30B-A3B", 4, 2),  # experts; embedding and head on every stage
        ("deepseek-v2-lite", 4, 1),  # MLA, shared experts
        ("gemma-3-1b-it", 2, 1),  # two rotary tables
        ("BAAI/bge-m3", 2, 1),
    ],
)
def test_each_stage_holds_what_vllm_builds(
    name: str, tp: int, pp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ROOT / "serve_app/data/models" / name.replace("/", "--") / "config.json"
    path = kept if kept.is_file() else ROOT / "benchmarks/shapes" / f"{name}.json"
    config = json.loads(path.read_text())
    described = shape.from_config(config)
    of = Model(name, described, tuple(derive.tensors(described)), False, "test")
    arguments = {"max_model_len": 4096, "dtype": "bfloat16"}
    resolved = defaults.resolve(arguments, described, hardware.gpus()["H200"], Parallelism(tp, pp))
    planned = memory.tensor_bytes(of, resolved)
    # What is left out: the attention's scales (a few bytes a layer) and BERT's position ids.
    assert planned == pytest.approx(vllm_bytes(config, tmp_path, tp, pp, monkeypatch), rel=2e-4)

"""What `serve-app run` refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.configs import LLAMA_70B, write

from serve_app.config.document import load
from serve_app.errors import ConfigError
from serve_app.planner.check_model import refuse
from serve_app.planner.model import metadata


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": {"tensor_parallel_size": 1}}, "weights.* smallest that fits on H100 is TP"),
        ({"engine": {"tensor_parallel_size": 6}}, "can be 1, 2, 4, 8"),
        ({"resources": {"accelerator_type": "V100"}}, "too old"),
    ],
)
def test_run_refuses_what_cannot_work(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"application 'llama': .*{words}") as refused:
        refuse(load(write(tmp_path, **changes)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engine": {"tensor_parallel_size": 2, "max_model_len": 131_072}},  # an estimate says no
        {"engine": {"tensor_parallel_size": 16}},  # no EC2 machine, but there are others
        {"engine": {"tensor_parallel_size": 1, "cpu_offload_gb": 100}},
        {"engine": {"tensor_parallel_size": 1}, "resources": {}},  # on which GPU is not said
        {"engine": {"tensor_parallel_size": 1}, "resources": {"accelerator_type": "MI300X"}},
        {"engine": {"tensor_parallel_size": 6, "hf_overrides": {"num_attention_heads": 6}}},
        {"model": "nobody/nothing"},
        {
            "model": "./models/other",  # may be any model, whatever it is called
            "served_as": [LLAMA_70B["model"]],
            "engine": {"tensor_parallel_size": 1},
        },
    ],
)
def test_run_starts_whatever_might_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    judged = []
    monkeypatch.setattr(metadata, "_from_hub", judged.append)
    refuse(load(write(tmp_path, **changes)))
    assert not judged  # the hub was not asked


def test_run_starts_every_shipped_config() -> None:
    configs = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
    for path in configs:
        refuse(load(path))
    assert len(configs) > 5

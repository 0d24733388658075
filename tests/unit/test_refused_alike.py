"""One mistake, one sentence, wherever a config is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import configs
from harness.command import refusal

from serve_app import model
from serve_app.check import checklist
from serve_app.config.document import load
from serve_app.errors import ConfigError
from serve_app.kuberay.render.files import render
from serve_app.kuberay.render.profile import ClusterProfile
from serve_app.kuberay.validate.judge import judge
from serve_app.planner import check_model

MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"engine": {"gpu_memory_utilization": 90}},
        "engine.gpu_memory_utilization is 90, but must be above 0 and at most 1",
    ),
    ({"engine": {"max_num_seqs": -5}}, "engine.max_num_seqs is -5, but must be at least 1"),
    ({"engine": {"max_num_seqs": 10**400}}, "engine.max_num_seqs is 1000"),
    (
        {"engine": {"tensor_parallel_size": 10**9}},
        "engine.tensor_parallel_size is 1000000000; no cluster has that many GPUs",
    ),
    (
        {"replicas": 10**9, "resources": {"gpu_share": 0.3}},
        "replicas is 1000000000, but should be less than or equal to 10000",
    ),
    ({"engine": {"quantization": "fp88"}}, "engine.quantization is 'fp88', but vLLM 0.29.0 has"),
    ({"engine": {"load_format": "safetensor"}}, "engine.load_format is 'safetensor', but vLLM"),
    ({"engine": {"enable_auto_tool_choice": True}}, "engine.enable_auto_tool_choice needs engine."),
    ({"engine": {"accelerator_type": "H100"}}, "engine.accelerator_type is not an argument of "),
    ({"model": "${MODEL}"}, "model is '${MODEL}', but variables are not replaced in a config"),
    (
        {"resources": {"accelerator_type": "p5.48xlarge"}},
        "resources.accelerator_type is 'p5.48xlarge', a machine of EC2; name its GPU as Ray does",
    ),
]


@pytest.mark.parametrize(("changes", "why"), MISTAKES)
def test_every_command_says_the_same(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    path = configs.write(tmp_path, gateway=True, **changes)
    for command in ("run", "plan", "render", "deploy"):
        [line] = refusal(command, str(path))
        assert why in line, command
    failed = [f for f in checklist.static(path, None) if f.status == "fail"]
    assert [f for f in failed if why in f.message], failed


@pytest.mark.parametrize(("changes", "why"), MISTAKES)
def test_a_plain_serve_run_and_manifests_say_it_too(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    wrong = yaml.safe_load(configs.write(tmp_path, gateway=True, **changes).read_text())
    with pytest.raises(ConfigError) as raised:  # Serve calls the application's builder
        model.app(wrong["applications"][1]["args"])
    assert why in str(raised.value)
    files = render(load(configs.write(tmp_path, gateway=True)), ClusterProfile())
    text = next(t for name, t in files.items() if str(name).endswith("base/rayservice.yaml"))
    service = yaml.safe_load(text)
    service["spec"]["serveConfigV2"] = yaml.safe_dump(wrong)
    assert [f for f in judge([service]) if f.status == "fail" and why in f.message]


LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"model": LLAMA, "engine": {"max_num_seqs": 10**6, "max_model_len": 8192}},
            "engine.max_num_batched_tokens is 8192, below max_num_seqs (1000000); every running",
        ),
        (
            {"model": LLAMA, "fallback": ["vectors"]},
            "fallback has 'vectors', which generates no text; remove it",
        ),
    ],
)
def test_what_only_the_models_metadata_tells_is_said_alike(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    path = configs.write(tmp_path, gateway=True, resources={"accelerator_type": "H100"}, **changes)
    config = yaml.safe_load(path.read_text())
    vectors = {"model": "BAAI/bge-m3", "resources": {"accelerator_type": "H100"}}
    own = {"name": "vectors", "route_prefix": None, "import_path": "serve_app.model:app"}
    config["applications"].append({**own, "args": vectors})
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError) as raised:  # as `run` does on a machine that has enough
        check_model.refuse(load(path))
    said = [str(raised.value), *(refusal(it, str(path))[-1] for it in ("plan", "render", "deploy"))]
    assert all(f"application 'llama': {why}" in line for line in said), said
    failed = [f for f in checklist.static(path, None) if f.status == "fail"]
    assert [f for f in failed if f.about == "llama" and why in f.message], failed

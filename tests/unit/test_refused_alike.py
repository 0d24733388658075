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

MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"engine": {"gpu_memory_utilization": 90}},
        "engine.gpu_memory_utilization is 90, but must be above 0 and at most 1",
    ),
    ({"engine": {"max_num_seqs": -5}}, "engine.max_num_seqs is -5, but must be at least 1"),
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

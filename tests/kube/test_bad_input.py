"""What people type wrong: each gives one line that says what to change, and never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from harness.manifests import ROOT

from serve_app.cli import cli
from serve_app.errors import UserError

CONFIG = ROOT / "configs/llama70b.yaml"


def said(command: str, *args: str) -> str:
    """The one line with which a command refuses."""
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(cli.commands[command], list(args), catch_exceptions=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("[a, b]", "a profile is a mapping of settings, such as 'max_gpus: 16'"),
        ("max_gpus: many", "max_gpus is 'many', but must be a whole number"),
        ("upgrade: NewCluster", "upgrade is 'NewCluster', but must be a mapping with some of"),
        ("upgrade: {strategy: none}", "upgrade.strategy is 'none', but should be 'NewCluster'"),
        ("redis: localhost", "redis is 'localhost', but must be a mapping with some of: address"),
        ("namespace: Serve_App", "namespace: 'Serve_App' is no name"),
        ("service_account: My_SA", "service_account: 'My_SA' is no name"),
        ("cache: {claim: a.b}", "cache.claim: 'a.b' is no name"),
        ("image: serve-app", "image: 'serve-app' names no fixed version"),
        ("image: r/serve-app:latest", "image: 'r/serve-app:latest' names no fixed version"),
        ("image: r/serve-app@sha256:abc", "names no fixed version; write name:tag or name@sha256"),
        ("redis: {address: 'fd00::1:6379'}", "redis.address"),  # without brackets
        ("client_cidrs: ['fd00::1/56']", "'fd00::1/56' is no network"),
        ("client_cidrs: [everywhere]", "client_cidrs.0: 'everywhere' is no network"),
        ("client_cidrs: []", "client_cidrs is []"),  # in a NetworkPolicy: from anywhere
        ("zones: us-east-1a", "zones is 'us-east-1a', but must be a list, such as ['us-east-1a']"),
        ("instance_types: [p5.48xlrge]", "'p5.48xlrge' is no EC2 type with a GPU"),
        ("max_gpus: 4", "takes 8 GPUs when every model is at its most"),
    ],
)
def test_a_wrong_profile(tmp_path: Path, profile: str, says: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(profile)
    assert says in said("render", str(CONFIG), "--cluster", str(path))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("accelerator_type: H100", "accelerator_type: H1000", "did you mean 'H100'?"),
        ("tensor_parallel_size: 4", "tensor_parallel_size: 0", "must be at least 1"),
        ("tensor_parallel_size: 4", "tensor_parallel_size: four", "must be a whole number"),
        (
            "tensor_parallel_size: 4",
            "tensor_parallel_size: 3",
            "leaves some of a machine with H100",
        ),
        ("num_cpus: 8", "num_cpus: 1000", "lower resources.num_cpus"),
        (
            "resources:",
            "frontends: 16\n    resources:\n      memory_gib: 9000",
            "lower frontends, resources.num_cpus or resources.memory_gib",
        ),
        ("max_replicas: 2", "max_replicas: 0", "max_replicas is 0"),
        (
            "    replicas: 2",
            "    replicas: auto",
            "the number of these pods is fixed; give a number",
        ),
        ("applications:", "applicatons:", "not a Serve config"),
        ("host: 0.0.0.0", "host: 5", "http_options.host is 5"),
        ("  args:\n    replicas: 2", "  deployments: [{name: Gate}]", "names 'Gate'"),
        ("  args:\n    replicas: 2", "  deployments: Gateway", "deployments must be a list"),
    ],
)
def test_a_wrong_config(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = CONFIG.read_text()
    assert old in text
    path = tmp_path / "llama70b.yaml"
    path.write_text(text.replace(old, new))
    assert says in said("render", str(path))


def test_a_config_without_models(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(
        "applications:\n- {name: g, route_prefix: /, import_path: 'serve_app.gateway:app'}\n"
    )
    assert "no model: add an application" in said("render", str(path))


@pytest.mark.parametrize("name", ["my model", "70b", "x-", "modèle", "a" * 60])
def test_a_file_name_that_no_rayservice_can_have(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text(CONFIG.read_text())
    assert said("render", str(path)).endswith("start with a letter: rename the file")


def test_folders_and_files_in_each_others_place(tmp_path: Path) -> None:
    assert "cannot be read" in said("render", str(tmp_path))
    assert "cannot be read" in said("render", str(CONFIG), "--cluster", str(tmp_path))
    (tmp_path / "file").touch()
    assert "cannot be written" in said("render", str(CONFIG), "-o", str(tmp_path / "file"))
    assert "no such file" in said("render", str(tmp_path / "none.yaml"))
    assert "cannot be read" in said("render", str(CONFIG), "--crd", str(tmp_path / "none"))


def test_a_profile_that_nobody_filled_in_is_not_deployed() -> None:
    """Rendered it may be, as kuberay/ is."""
    text = said("deploy", str(CONFIG), "--cluster", str(ROOT / "kuberay/profile.yaml"))
    assert "REPLACE_ME" in text and text.endswith("put your own value into the profile")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "no kubeconfig"),
        (b"just text", "no kubeconfig"),
        (b"clusters: 5\ncontexts: [a]\n", "no kubeconfig"),
    ],
)
def test_a_file_that_is_no_kubeconfig(tmp_path: Path, content: bytes, says: str) -> None:
    pytest.importorskip("kubernetes", reason="needs the extra 'eks'")
    path = tmp_path / "kubeconfig"
    path.write_bytes(content)
    assert says in said("status", "llama70b", "--kubeconfig", str(path))


@pytest.mark.parametrize(
    "args",
    [
        ["status", "a/b"],
        ["status", ""],
        ["rollback", "Llama70B"],
        ["delete", "Llama70B", "--yes"],
        ["rollback", "llama70b", "--to", "x"],
        ["logs", "llama70b", "--tail", "-5"],
        ["deploy", "x.yaml", "--timeout", "-1"],
        ["validate"],
        ["render", "--no-such-option"],
    ],
)
def test_arguments_that_cannot_be(args: list[str]) -> None:
    code = "from serve_app.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("serve-app: ") and done.stderr.count("\n") == 1

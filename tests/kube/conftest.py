"""A stand-in API server for each test, and the CLI against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from deploying import CONFIG, SPACE
from harness.manifests import CRD
from kube_api import KubeAPI
from operator_model import Operator

from serve_app.cli import cli
from serve_app.kuberay.live import follow, upgrade
from serve_app.kuberay.validate import schema


@pytest.fixture(scope="session")
def crd() -> dict[str, Any] | None:
    return schema.load_crd(CRD)


@pytest.fixture
def api(crd: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeAPI]:
    server = KubeAPI(crd)
    monkeypatch.setattr(follow, "_SETTLE_S", 0.2)
    monkeypatch.setattr(follow, "_FAILED_S", 3.0)
    monkeypatch.setattr(follow, "_LOOK_S", 0.5)
    monkeypatch.setattr(upgrade, "_OPERATOR_S", 5.0)  # where no operator is, all of it is waited
    server.store("namespaces", {"metadata": {"name": SPACE}})
    yield server
    server.close()


@pytest.fixture
def operator(api: KubeAPI) -> Operator:
    """KubeRay's operator, which does something when the test lets it."""
    return Operator(api)


@pytest.fixture
def kubeconfig(api: KubeAPI, tmp_path: Path) -> Path:
    return api.kubeconfig(tmp_path / "kubeconfig")


@pytest.fixture
def run(kubeconfig: Path) -> Callable[..., Result]:
    """Run a command of the CLI; errors for users come out as exceptions."""

    def run(command: str, *args: str) -> Result:
        return CliRunner().invoke(
            cli.commands[command],
            [*args, "--kubeconfig", str(kubeconfig)],
            catch_exceptions=False,
        )

    return run


@pytest.fixture
def image(tmp_path: Path) -> Callable[[str], tuple[str, ...]]:
    """Arguments of deploy with an image of this tag."""

    def arguments(tag: str) -> tuple[str, ...]:
        profile = tmp_path / f"{tag}.yaml"
        profile.write_text(f"image: example.com/serve-app:{tag}\n")
        return ("deploy", str(CONFIG), "--no-wait", "--force", "--cluster", str(profile))

    return arguments

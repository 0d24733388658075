"""`serve-app run` for real, on a machine that others use too."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from harness import processes
from harness.local_run import Run
from harness.processes import REPO, eventually, free_port
from harness.servers import BIN

from serve_app.config.document import load

THEIRS = """
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Theirs:
    def __call__(self, request):
        return "theirs"

app = Theirs.bind()
"""


class Other:
    """Somebody else's Ray on this machine, with a Serve application of theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"
        self.address = f"127.0.0.1:{free_port()}"
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self.env = {"TMPDIR": str(folder), "PYTHONPATH": str(folder), "RAY_AUTH_MODE": "disabled"}

    def start(self) -> None:
        (self.folder / "theirs.py").write_text(THEIRS)
        application = {"name": "theirs", "import_path": "theirs:app", "route_prefix": "/"}
        http = {"host": "127.0.0.1", "port": int(self.url.rpartition(":")[2])}
        path = self.folder / "theirs.yaml"
        path.write_text(yaml.safe_dump({"http_options": http, "applications": [application]}))
        if not self._is_up():
            self.stop()  # Ray gives a node 30 s, which a busy machine may not keep
            assert self._is_up(), (self.folder / "ray.log").read_text()
        deploy = [BIN / "serve", "deploy", path, "--address", self.dashboard]
        subprocess.run(deploy, env=os.environ | self.env, check=True, timeout=120)
        assert eventually(self.answers, 120, 0.5)

    def _is_up(self) -> bool:
        ports = [
            "--port",
            self.address.split(":")[1],
            "--dashboard-port",
            self.dashboard.rpartition(":")[2],
        ]
        command = [str(BIN / "ray"), "start", "--head", "--num-cpus", "4", *ports, "--block"]
        command += ["--disable-usage-stats", "--node-ip-address", "127.0.0.1"]
        self.process = processes.start(command, self.folder / "ray.log", **self.env)

        def up() -> bool:
            url = f"{self.dashboard}/api/serve/applications/"
            try:
                return self.process.poll() is not None or httpx.get(url).status_code == 200
            except httpx.HTTPError:
                return False

        return bool(eventually(up, 120, 0.5)) and self.process.poll() is None

    def answers(self) -> bool:
        try:
            return httpx.get(self.url, timeout=5).text == "theirs"
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        """At once: Ray takes its time for an orderly end."""
        processes.kill_session(self.process.pid)
        self.process.wait()


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder under which Ray can make its sockets; pytest's own have too long a path."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def other() -> Iterator[Other]:
    with short_folder() as folder:
        other = Other(folder)
        try:
            other.start()
            yield other
        finally:
            other.stop()


def test_others_keep_their_models_and_ours_start_beside_them(other: Other, tmp_path: Path) -> None:
    """A model that is only named, from a folder with a space, behind a proxy, without a home, a
    terminal or UTF-8.
    """
    folder = tmp_path / "my models"
    folder.mkdir()
    proxy = "http://127.0.0.1:9"  # nobody listens
    run = Run(
        folder,
        name="all-minilm-l6-v2",
        **other.env,
        HTTP_PROXY=proxy,
        http_proxy=proxy,
        NO_PROXY="corp.example",
        no_proxy="corp.example",
        HOME="/no/such/home",
        LANG="C",
        LC_ALL="C",
        HF_TOKEN="of-the-shell",
    )
    model, kept = REPO / "models/all-minilm-l6-v2", folder / "fleet.yaml"
    run.command[2:] = [str(model), "--port", str(run.port), "--save", str(kept)]
    run.start()
    try:
        said = run.wait_until_ready()
        assert f"{run.name} is ready" in said
        assert "export no_proxy=corp.example,127.0.0.1," in said
        assert kept.read_text() in said
        # What `serve-app check` advises for a token: it is where a model is loaded.
        [replica] = [it for it in psutil.Process(run.process.pid).children(recursive=True)
                     if f"ServeReplica:{run.name}" in " ".join(it.cmdline())]  # fmt: skip
        assert replica.environ()["HF_TOKEN"] == "of-the-shell"
        assert run.models() == [run.name, "sentence-transformers/all-MiniLM-L6-v2"]
        assert run.embeds() == 384
        assert other.answers()
        assert run.end() == {}
    finally:
        run.kill()
    assert other.answers()
    log = Path(re.findall(r"full log: (\S+)", said)[0])
    assert log.is_relative_to(other.folder / f"sa-{os.getuid()}")
    assert sorted(file.name for file in log.parent.iterdir()) == ["lock", "serve.log"]
    fleet = load(kept)
    assert list(fleet.models) == [run.name]
    assert fleet.port == run.port


def test_a_cluster_that_serves_something_is_refused_by_its_names(
    other: Other, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    done = subprocess.run(
        [BIN / "serve-app", "run", run.config],
        env={**os.environ, **other.env, "RAY_ADDRESS": other.address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"serve-app: the Ray cluster at {other.address} (RAY_ADDRESS) serves theirs already, which "
        "this run would replace; add the models there with serve deploy, or unset RAY_ADDRESS for "
        "a Ray of this run's own\n"
    )
    assert other.answers()

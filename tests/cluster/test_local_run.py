"""`serve-app run` for real, on a machine that others use too."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from harness import processes, servers
from harness.processes import REPO, eventually, free_port, in_session, is_port_free
from harness.servers import BIN, EMBED

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
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        processes.kill_session(self.process.pid)


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


class Run:
    """A `serve-app run` of the embedding model."""

    def __init__(self, folder: Path, name: str = EMBED, **env: str) -> None:
        self.port = free_port()
        application = servers.embed_application() | {"name": name}
        application["args"]["served_as"] = []
        application["args"]["model"] = str(REPO / application["args"]["model"])
        self.config = folder / "config.yaml"
        self.config.write_text(servers.as_yaml(servers.document(self.port, application)))
        self.name = name
        self.out = folder / "out"
        self.env = env
        self.before: Callable[[], Any] | None = None

    def start(self) -> None:
        command = [str(BIN / "serve-app"), "run", str(self.config)]
        env = {**os.environ, **self.env}
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                cwd=self.config.parent,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={key: value for key, value in env.items() if value},
                preexec_fn=self._prepare,
            )

    def _prepare(self) -> None:
        processes._ready_for_ctrl_c()
        if self.before:
            self.before()

    def wait_until_ready(self) -> str:
        """What it has printed when it was ready."""

        def ready() -> bool:
            assert self.process.poll() is None, self.out.read_text()
            return "Ctrl-C ends it." in self.out.read_text()

        assert eventually(ready, 300, 0.5), self.out.read_text()
        return self.out.read_text()

    def models(self) -> list[str]:
        answer = httpx.get(f"http://127.0.0.1:{self.port}/v1/models", trust_env=False, timeout=30)
        return [model["id"] for model in answer.json()["data"]]

    def embeds(self) -> int:
        """The length of an embedding."""
        answer = httpx.post(
            f"http://127.0.0.1:{self.port}/v1/embeddings",
            json={"model": self.name, "input": "Paris"},
            trust_env=False,
            timeout=60,
        )
        return len(answer.json()["data"][0]["embedding"])

    def end(self, number: signal.Signals = signal.SIGINT) -> dict[int, str]:
        """What is left of it after this signal."""
        [serve] = [int(pid) for pid in _children(self.process.pid)]
        self.process.send_signal(number)
        try:
            assert self.process.wait(timeout=120) == 0, self.out.read_text()
        finally:
            left = in_session(self.process.pid) | in_session(serve)
            self.kill()
            processes.kill_session(serve)
        assert is_port_free(self.port)
        return left

    def kill(self) -> None:
        processes.kill_session(self.process.pid)


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_others_keep_their_models_and_ours_start_beside_them(other: Other, tmp_path: Path) -> None:
    """From a folder with a space, behind a proxy, without a home, a terminal or UTF-8."""
    folder = tmp_path / "my models"
    folder.mkdir()
    proxy = "http://127.0.0.1:9"  # nobody listens
    run = Run(
        folder,
        **other.env,
        HTTP_PROXY=proxy,
        http_proxy=proxy,
        NO_PROXY="corp.example",
        no_proxy="corp.example",
        HOME="/no/such/home",
        LANG="C",
        LC_ALL="C",
    )
    run.start()
    try:
        said = run.wait_until_ready()
        assert f"{EMBED} is ready" in said
        assert "export no_proxy=corp.example,127.0.0.1," in said
        assert run.models() == [EMBED]
        assert run.embeds() == 384
        assert other.answers()
        assert run.end() == {}
    finally:
        run.kill()
    assert other.answers()
    log = Path(re.findall(r"full log: (\S+)", said)[0])
    assert log.is_relative_to(other.folder / f"sa-{os.getuid()}")
    assert sorted(file.name for file in log.parent.iterdir()) == ["lock", "serve.log"]


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


# ------------------------------------------------------------------- strange machines


def _few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "before", "number"),
    [
        ({"TMPDIR": "long"}, None, signal.SIGTERM),
        ({"HOME": ""}, _few_files, signal.SIGHUP),
    ],
    ids=["a long TMPDIR, SIGTERM", "no HOME, 1024 files, SIGHUP"],
)
def test_a_strange_machine_serves_too(
    env: dict[str, str], before: Callable[[], Any] | None, number: signal.Signals, tmp_path: Path
) -> None:
    folder = tmp_path / "/".join(["a path of 150 characters and more"] * 5)
    folder.mkdir(parents=True)
    if env.get("TMPDIR") == "long":
        env = {"TMPDIR": str(folder)}
    run = Run(folder, **env)
    run.before = before
    run.start()
    try:
        run.wait_until_ready()
        assert run.embeds() == 384
        assert run.end(number) == {}
    finally:
        run.kill()


@pytest.mark.slow
def test_two_at_once_each_with_its_own(tmp_path: Path) -> None:
    """Behind HAProxy, whose files and ports Ray keeps at fixed places."""
    runs = []
    try:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            run = Run(tmp_path / name, name=name, RAY_SERVE_ENABLE_HA_PROXY="1")
            run.start()
            runs.append(run)
        for run in runs:
            run.wait_until_ready()
        for run in runs:
            assert run.models() == [run.name]
            assert run.embeds() == 384
        first, second = runs
        assert first.end() == {}
        assert second.models() == ["two"]
        assert second.embeds() == 384
        assert second.end() == {}
    finally:
        for run in runs:
            run.kill()


@pytest.mark.slow
def test_output_that_nobody_reads_any_more_ends_nothing(tmp_path: Path) -> None:
    """`serve-app run … | head`: the reader goes, the server stays."""
    run = Run(tmp_path)
    reader, writer = os.pipe()
    run.before = lambda: (os.dup2(writer, 1), None)[1]
    run.start()
    os.close(writer)
    os.close(reader)
    try:

        def ready() -> bool:
            assert run.process.poll() is None, run.out.read_text()
            try:
                url = f"http://127.0.0.1:{run.port}/ready"
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        assert eventually(ready, 300, 0.5), run.out.read_text()
        assert run.embeds() == 384
        assert run.end(signal.SIGTERM) == {}
    finally:
        run.kill()

"""The commands beside a running server, as far as they need no server.

Which one they mean, the door to Ray's dashboard, the log, what a reload did. With a server:
tests/cluster/test_second_terminal.py.
"""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from harness.command import refusal
from harness.processes import free_port
from rich.console import Console

from serve_app.cli import cli
from serve_app.cluster import connection, serve
from serve_app.cluster.connection import Connection
from serve_app.cluster.serve import Application, ReplicaStatus
from serve_app.config.document import GATEWAY_IMPORT_PATH, parse_document
from serve_app.errors import UserError
from serve_app.local import door, found, instance, logs, reload, run, runs, status
from serve_app.local.door import Door
from serve_app.local.runs import Run

TOKEN = "t0ken"


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """A small HTTP server on loopback: its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


# --------------------------------------------------------------------------------------- the door


class Dashboard(BaseHTTPRequestHandler):
    """As much of Ray's dashboard as a token takes."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        known = self.headers.get_all("authorization") == [f"Bearer {TOKEN}"]
        self.send_response(200 if known else 401)
        self.send_header("content-length", str(len(body)))
        self.send_header("connection", self.headers["connection"])  # as aiohttp does
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def opened() -> Iterator[Door]:
    with answering(Dashboard) as port:
        opened = Door(lambda: ("127.0.0.1", port, TOKEN), port=0)
        yield opened
        opened.close()


def ask(opened: Door, body: str = "", **headers: str) -> tuple[int, bytes]:
    port = opened.server_address[1]
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    client.request("PUT", "/api", body=body, headers={"Host": f"localhost:{port}", **headers})
    answer = client.getresponse()
    return answer.status, answer.read()


def test_a_request_of_this_user_gets_the_token(opened: Door) -> None:
    assert ask(opened, "x" * 300_000) == (200, b"x" * 300_000)
    assert ask(opened, Authorization="Bearer of another cluster") == (200, b"")


def test_the_second_request_of_a_connection_gets_it_too(opened: Door) -> None:
    client = http.client.HTTPConnection("127.0.0.1", opened.server_address[1], timeout=10)
    for _ in range(2):
        client.request("GET", "/api", headers={"Connection": "keep-alive"})
        answer = client.getresponse()
        assert (answer.status, answer.read()) == (200, b"")


def test_a_web_page_of_elsewhere_does_not_come_in(opened: Door) -> None:
    ours = f"http://localhost:{opened.server_address[1]}"
    assert ask(opened, Origin=ours, **{"Sec-Fetch-Site": "same-origin"})[0] == 200
    assert ask(opened, Origin="https://evil.example")[0] == 403
    assert ask(opened, **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert ask(opened, Host="evil.example:8265")[0] == 403  # a name of theirs that leads here


def test_a_process_of_another_user_does_not_come_in(
    opened: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door.os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        ask(opened)


def test_before_ray_has_started_the_door_says_so() -> None:
    def not_yet() -> tuple[str, int, str]:
        raise UserError("its Ray has not started yet")

    opened = Door(not_yet, port=0)
    assert ask(opened) == (503, b"Ray has not started yet.")
    opened.close()


# ----------------------------------------------------------------------------- which server it is


def record(base: Path, port: int, **fields: Any) -> Run:
    folder = base / str(port)
    folder.mkdir(parents=True)
    given: dict[str, Any] = {
        "folder": folder,
        "pid": os.getpid(),
        "born": runs.birth(os.getpid()),
        "host": "127.0.0.1",
        "ray_address": None,
        "config": base / "fleet.yaml",
        "working_folder": base,
        "logs": True,
    }
    run = Run(**given | fields)
    runs.record(run)
    return run


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder in which runs are looked for; no Ray is here."""
    monkeypatch.setattr(instance, "bases", lambda: iter([tmp_path / "sa"]))
    monkeypatch.setattr(connection, "at_hand", lambda: None)
    monkeypatch.setattr(found, "at_hand", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for variable in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "sa"


def test_a_run_is_found_while_its_process_lives(base: Path) -> None:
    run = record(base, 8001)
    record(base, 8000, born=1)  # its pid is another process's now
    (base / "8002").mkdir()
    (base / "8002" / "run.json").write_text("{}")  # of another version
    assert runs.running([base]) == [run]
    server = found.server()
    assert server.run == run and server.connection is None
    with pytest.raises(UserError, match="its Ray has not started yet"):
        server.reached()
    ports = run.folder / "ray" / "session_latest"
    ports.mkdir(parents=True)
    (ports / "gcs_server_port_0abc").write_text("6390")
    assert found.server().reached().address == "127.0.0.1:6390"
    runs.forget(run.folder)
    assert found.here() is None


def test_of_several_runs_one_is_named_by_its_port(base: Path) -> None:
    one, two = record(base, 8000), record(base, 8001)
    with pytest.raises(UserError, match=r"2 servers run here; name one by --port \(ports: 8000, "):
        found.server()
    assert [found.server(port).run for port in (8000, 8001)] == [one, two]
    with pytest.raises(UserError, match=r"no serve-app run has port 9 here \(ports: 8000, 8001\)"):
        found.server(9)


def test_ray_address_may_be_that_of_a_run(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `eval "$(serve-app env)"` a reload still knows the config."""
    run = record(base, 8000)
    ports = run.folder / "ray" / "session_latest"
    ports.mkdir(parents=True)
    (ports / "gcs_server_port_0abc").write_text("6390")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6390")
    assert found.server().run == run
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6391")
    assert found.server().run is None


@pytest.mark.parametrize(
    "command",
    [("status",), ("logs",), ("reload",), ("env",), ("admin", "m", "wake")],
    ids=lambda command: command[0],
)
def test_a_command_without_a_server_says_how_to_start_one(
    base: Path, command: tuple[str, ...]
) -> None:
    base.mkdir()
    assert refusal(*command) == [
        "serve-app: nothing is served here; start it: serve-app run CONFIG"
    ]


def test_what_does_not_run_is_not_to_be_started_to_be_stopped(base: Path) -> None:
    base.mkdir()
    assert refusal("stop") == ["serve-app: nothing runs here"]


def test_a_ray_that_listens_and_says_nothing_is_not_waited_for(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE"):  # the command sets them
        monkeypatch.setenv(variable, os.environ.get(variable, "0"))
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        [line] = refusal("admin", "m", "wake", "--address", address)
    assert line.startswith(f"serve-app: no Ray cluster answers at {address} (--address): no answer")


def test_ray_s_own_commands_are_told_of_loopback_and_of_the_token(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    here, away = Connection("127.0.0.1:6379", "x"), Connection("192.0.2.1:6379", "x")
    alone = {"RAY_ADDRESS": "127.0.0.1:6379", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    assert here.environment() == alone
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert here.environment() == alone | {"RAY_AUTH_MODE": "token"}
    assert away.environment() == {"RAY_ADDRESS": "192.0.2.1:6379"}  # it never gets the token
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert here.environment() == alone


# ------------------------------------------------------------------------------------------ status


READY = {
    "status": "not ready",
    "waiting_for": ["llama", "broken"],
    "models": {
        "smollm": {"status": "RUNNING", "replicas": 2, "message": "", "starting": []},
        "cold": {"status": "RUNNING", "replicas": 0, "message": "", "starting": []},
        "swapped": {
            "status": "RUNNING",
            "replicas": 1,
            "message": "",
            "starting": [],
            "asleep": True,
        },
        "llama": {
            "status": "DEPLOYING",
            "replicas": 0,
            "message": "",
            "starting": [{"replica": "r", "phase": "loading weights", "seconds": 42}],
        },
        "broken": {
            "status": "DEPLOY_FAILED",
            "replicas": 0,
            "message": "no such model",
            "starting": [],
        },
    },
}


class Gateway(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()
        self.wfile.write(json.dumps(READY).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_status_says_of_each_model_what_it_does(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, NVIDIA H100 80GB HBM3, 73220, 81559, 97'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    out = io.StringIO()
    with answering(Gateway) as port:
        record(base, port)
        assert not status.show(found.server(), Console(file=out, width=100))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert lines == [
        f"http://127.0.0.1:{port}/v1 (serve-app run, pid {os.getpid()})",
        "model status replicas",
        "smollm ready 2",
        "cold scaled to zero 0",
        "swapped asleep 1",
        "llama starting 0 loading weights, 42 s",
        "broken failed 0 no such model",
        "GPU 0 NVIDIA H100 80GB HBM3: 71.5 of 79.6 GiB in use, 97 % busy",
    ]


def test_status_has_the_troubles_that_ready_has(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = {"keys": "keys.yaml: key a: x", "usage": "the database is away since 12:00 [UTC]"}
    monkeypatch.setattr(f"{__name__}.READY", READY | why)
    out = io.StringIO()
    with answering(Gateway) as port:
        record(base, port)
        status.show(found.server(), Console(file=out, width=40))
    assert out.getvalue().splitlines()[1:3] == [f"{what}: {said}" for what, said in why.items()]


def test_status_of_one_model(base: Path) -> None:
    with answering(Gateway) as port:
        record(base, port)
        for model, status_ in (("smollm", 0), ("llama", 1)):
            shown = CliRunner().invoke(cli, ["status", model])
            assert shown.exit_code == status_
            assert [line.split()[0] for line in shown.output.splitlines()[2:3]] == [model]
        [line] = refusal("status", "lama")
    assert line == (
        "serve-app: the server of this machine has no model 'lama'; did you mean 'llama'?"
    )


def test_a_run_s_port_is_not_taken_by_a_stranger(base: Path, tmp_path: Path) -> None:
    with answering(Gateway) as port:
        record(base, port)
        config = tmp_path / "own.yaml"
        own = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [GATEWAY]}
        config.write_text(yaml.safe_dump(own))
        [line] = refusal("run", str(config))
    assert line == (
        f"serve-app: port {port} is another serve-app run's; choose another with --port, or change "
        f"that one: serve-app reload CONFIG --port {port}"
    )


def gateway_in_serve(state: str, *replicas: str) -> dict[str, Any]:
    """What Serve reports of an application whose one deployment has this state."""
    running = [
        {"replica_id": id, "state": "RUNNING", "node_id": "n", "start_time_s": 0} for id in replicas
    ]
    of: dict[str, Any] = {"status": state, "message": "", "replicas": running}
    why = "Traceback …\nserve_app.errors.ConfigError: usage_dir: x cannot be written; name another"
    return {
        "status": state,
        "message": "Failed to update the deployments ['Gateway'].",
        "deployed_app_config": {"import_path": GATEWAY_IMPORT_PATH},
        "deployments": {"Gateway": of | ({"message": why} if state == "DEPLOY_FAILED" else {})},
    }


def test_a_gateway_that_failed_is_told_by_serve(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = record(base, free_port())
    ports = silent.folder / "ray" / "session_latest"
    ports.mkdir(parents=True)
    (ports / "gcs_server_port_0abc").write_text("6390")
    reported = gateway_in_serve("DEPLOYING")
    answer: Any = lambda _: SimpleNamespace(  # noqa: E731
        get_serve_details=lambda: {"applications": {"gateway": reported}}
    )
    monkeypatch.setattr(Connection, "serve", answer)
    why = "usage_dir: x cannot be written; name another"

    def said() -> str:
        out = io.StringIO()
        assert not status.show(found.server(), Console(file=out, width=40))
        return out.getvalue()

    assert "does not answer yet: it is starting" in said()
    reported = gateway_in_serve("DEPLOY_FAILED", "r")  # an update; the one before serves on
    assert found.failed_gateway(found.of(silent)) == ""
    reported = gateway_in_serve("DEPLOY_FAILED")
    assert f"does not answer: the gateway failed: {why} (serve-app run, pid" in said()
    monkeypatch.setattr(run, "_SILENT_S", 0.0)
    fleet: Any = SimpleNamespace(models={"m": None})
    lives: Any = SimpleNamespace(poll=lambda: None)
    goes_on: Any = SimpleNamespace(asked=False)
    console = Console(file=io.StringIO())
    with pytest.raises(UserError, match=f"the gateway failed: {why}"):
        run._wait_until_ready(fleet, silent, None, lives, goes_on, console, 0.0)


def test_status_of_a_run_that_does_not_answer_yet(base: Path) -> None:
    record(base, free_port())
    out = io.StringIO()
    assert not status.show(found.server(), Console(file=out, width=200))
    assert "does not answer yet: it is starting" in out.getvalue()


# ------------------------------------------------------------------------------------------- logs


LOG = """\
INFO scripts.py -- Running config file
\x1b[36m(ServeReplica:a:ModelServer pid=1)\x1b[0m one
\x1b[36m(ServeReplica:ab:ModelServer pid=2)\x1b[0m two
\x1b[36m(ServeReplica:a:ModelServer pid=1)\x1b[0m three
"""


def test_the_log_of_one_model_or_of_all(base: Path) -> None:
    run = record(base, 8000)
    run.log.write_text(LOG)
    (run.folder / "config.yaml").write_text("applications: [{name: a}, {name: ab}]")
    shown = list(logs.lines(run, "a", tail=10, follow=False))
    assert shown == [
        "(ServeReplica:a:ModelServer pid=1) one",
        "(ServeReplica:a:ModelServer pid=1) three",
    ]
    assert list(logs.lines(run, None, tail=1, follow=False)) == shown[1:]
    with pytest.raises(UserError, match=r"there is no model 'xyz' \(there are: a, ab\)"):
        logs.lines(run, "xyz", tail=1, follow=False)
    verbose = record(base, 8001, logs=False)
    with pytest.raises(UserError, match="started with --verbose"):
        logs.lines(verbose, None, tail=1, follow=False)


def test_new_lines_are_followed_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "serve.log"
    log.write_text("old\n")
    monkeypatch.setattr(logs, "_POLL_S", 0)
    more = iter(["ha", "lf\n", "last\n"])

    def goes_on() -> bool:
        piece = next(more, None)
        if piece:
            with log.open("a") as file:
                file.write(piece)
        return piece is not None

    assert list(logs.read(log, None, tail=5, goes_on=goes_on)) == ["old", "half", "last"]


# ----------------------------------------------------------------------------------------- reload


def application(status: str = "RUNNING", *replicas: str, message: str = "") -> Application:
    states = tuple(ReplicaStatus(id, "RUNNING", "node", 0.0) for id in replicas)
    return Application("m", status, message, {}, 0.0, states)


@pytest.mark.parametrize(
    ("before", "now", "changed", "said"),
    [
        (None, application("RUNNING", "b"), True, ("added", True)),
        (application("RUNNING", "a"), None, True, ("removed", True)),
        (application("RUNNING", "a"), application("RUNNING", "a"), False, ("kept", True)),
        (
            application("RUNNING", "a"),
            application("RUNNING", "a"),
            True,
            ("updated in place (same replicas)", True),
        ),
        (
            application("RUNNING", "a"),
            application("RUNNING", "a", "b"),
            True,
            ("updated in place (1 to 2 replicas)", True),
        ),
        (
            application("RUNNING", "a"),
            application("RUNNING", "b"),
            True,
            ("replaced", True),
        ),
        (application("DEPLOY_FAILED"), application("RUNNING", "b"), True, ("started", True)),
        (
            application("RUNNING", "a"),
            application("DEPLOY_FAILED", "a", message="no such model"),
            True,
            ("deploy failed: no such model", False),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_what_a_reload_did_is_told_by_the_replicas(
    before: Application | None, now: Application | None, changed: bool, said: tuple[str, bool]
) -> None:
    assert reload._outcome(before, now, changed) == said


class Serve:
    """A connection and its client, whose applications become ``later`` ones with each look."""

    def __init__(self, *later: dict[str, Application], **http_options: Any) -> None:
        self.later, self.http_options = list(later), http_options
        self.deployed: list[Any] = []

    def serve(self) -> Serve:
        return self

    def get_serve_details(self) -> dict[str, Any]:
        return {"http_options": self.http_options}

    def deploy_applications(self, document: Any) -> None:
        self.deployed.append(document)

    def applications(self, details: object) -> dict[str, Application]:
        return self.later.pop(0) if len(self.later) > 1 else self.later[0]


@pytest.fixture
def reloaded(base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What a reload of the running config tells, beside a server that does as it is scripted."""

    def reloaded(connection: Serve, told: list[str] | None = None, **options: Any) -> list[str]:
        told = [] if told is None else told
        monkeypatch.setattr(serve, "applications", connection.applications)
        monkeypatch.setattr(reload, "_POLL_S", 0.0)
        document = {
            "http_options": options,
            "applications": [{"name": "gateway", "import_path": GATEWAY_IMPORT_PATH}],
        }
        fleet = parse_document(document, Path("fleet.yaml"))
        server = found.Server(record(base, free_port()), connection)  # type: ignore[arg-type]
        reload.reload(fleet, server, tell=told.append, check=False)
        return told

    return reloaded


GATEWAY = {"name": "gateway", "import_path": GATEWAY_IMPORT_PATH}


def gateway(status: str, *replicas: str) -> dict[str, Application]:
    one = application(status, *replicas)
    return {"gateway": dataclasses.replace(one, name="gateway", config=GATEWAY)}


def test_a_change_that_goes_on_is_followed(reloaded: Callable[..., list[str]]) -> None:
    connection = Serve(gateway("DEPLOYING", "a"), gateway("DEPLOYING"), gateway("RUNNING", "b"))
    assert reloaded(connection) == [
        "nothing changed since the change before, which goes on: gateway",
        "gateway: deploying",
        "gateway: started",
    ]
    assert not connection.deployed
    assert reloaded(Serve(gateway("RUNNING", "b"))) == ["nothing changed"]


def test_ctrl_c_ends_the_waiting_and_says_so(
    reloaded: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(reload.time, "sleep", interrupted)
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        reloaded(Serve(gateway("DEPLOYING", "a")), told)
    assert told[-1] == "the change goes on; serve-app status shows it"


def test_options_that_wait_for_the_next_start_are_said(
    reloaded: Callable[..., list[str]],
) -> None:
    there = {"host": "127.0.0.1", "port": 8830}
    assert reloaded(Serve(gateway("RUNNING", "a"), **there), **there) == ["nothing changed"]
    told = reloaded(Serve(gateway("RUNNING", "a"), **there), port=8831, hots="127.0.0.1")
    assert told == [
        "note: http_options.hots is no option of Serve, which ignores it; did you mean 'host'?",
        "note: the Serve that runs already ignores http_options.port (8830 there); the file's take "
        "effect after `serve-app stop` and `serve-app run fleet.yaml`",
        "nothing changed",
    ]


def test_a_port_that_was_given_stays(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base.mkdir()
    config = base / "fleet.yaml"
    config.write_text(yaml.safe_dump({"http_options": {"port": 1}, "applications": [GATEWAY]}))
    monkeypatch.chdir(base)  # to which the command goes too
    monkeypatch.setattr(reload, "reload", lambda fleet, *_, **__: ports.append(fleet.port))
    ports: list[int] = []
    for given in (True, False):
        run = record(base, 8801 + given, port_given=given, config=config)
        CliRunner().invoke(cli, ["reload", "--port", str(run.port)])
    assert ports == [8802, 1]


def test_an_application_that_was_deployed_by_code_has_no_config_to_compare() -> None:
    written = {"name": "m", "import_path": "serve_app.model:app", "args": {"model": "x"}}
    assert reload._plain({}) == {} != reload._plain(written)
    assert reload._plain(written | {"route_prefix": None})["route_prefix"] is None


def test_a_changed_file_is_seen_once_and_not_between_delete_and_rename(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("one")
    watch = reload.Watch(file)
    assert not watch.changed()
    file.unlink()
    assert not watch.changed()
    file.write_text("two")
    assert watch.changed() and not watch.changed()


def test_a_server_that_tells_nothing_without_a_key_is_asked_by_serve() -> None:
    models = {"up": {"status": "RUNNING"}, "new": {"status": "DEPLOYING"}}
    silent = {"status": "not ready", "waiting_for": [], "models": {}}
    assert status._waiting(silent, models) == {"new"}
    assert status._waiting(silent | {"models": models, "waiting_for": ["up"]}, models) == {"up"}
    assert status._waiting(None, models) == {"up", "new"}


def test_a_run_on_a_cluster_with_keys_ends_its_waiting() -> None:
    reports = iter(["not ready", "ready"])
    endpoint = SimpleNamespace(
        ready=lambda ours: {"status": next(reports), "waiting_for": [], "models": {}}
    )
    answers: Any = SimpleNamespace(endpoint=endpoint)
    fleet: Any = SimpleNamespace(models={"m": None})
    lives: Any = SimpleNamespace(poll=lambda: None)
    goes_on: Any = SimpleNamespace(asked=False)
    console = Console(file=io.StringIO())
    assert run._wait_until_ready(fleet, answers, None, lives, goes_on, console, 0.0)
    assert list(reports) == []

"""`serve-app run` on a machine that is not ours: what it asks, what it owns, what it says."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from harness import servers
from harness.command import refusal
from harness.processes import REPO, free_port
from rich.console import Console

from serve_app import addresses
from serve_app.config.document import RUN_ID, Fleet, load
from serve_app.errors import ConfigError, UserError
from serve_app.local import endpoint, instance, named, reasons, serve_process, weights
from serve_app.local import run as run_module
from serve_app.local.endpoint import Endpoint
from serve_app.local.first_request import how_to_ask
from serve_app.local.instance import Instance


def fleet_of(tmp_path: Path, *models: dict[str, Any], **http_options: Any) -> Fleet:
    document = servers.document(8000, *(models or (servers.embed_application(),)))
    document["http_options"] = http_options
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return load(path)


# ----------------------------------------------------------------- the address it is bound to


@pytest.mark.parametrize(
    ("options", "bound", "url"),
    [
        ({}, "0.0.0.0", "http://127.0.0.1:8000"),  # Serve's own default
        ({"host": "0.0.0.0", "port": 81}, "0.0.0.0", "http://127.0.0.1:81"),
        ({"host": "127.0.0.2"}, "127.0.0.2", "http://127.0.0.2:8000"),
        ({"host": "::"}, "::", "http://[::1]:8000"),
        ({"host": "::0"}, "::0", "http://[::1]:8000"),
        ({"host": "fd00::2"}, "fd00::2", "http://[fd00::2]:8000"),
    ],
)
def test_each_probe_asks_where_the_server_is_bound(
    tmp_path: Path, options: dict[str, Any], bound: str, url: str
) -> None:
    fleet = fleet_of(tmp_path, **options)
    found = Endpoint.of(fleet)
    assert (found.bound, found.url) == (bound, url)
    assert f'base_url="{url}/v1"' in how_to_ask(fleet, found)


def test_the_first_request_has_a_key_where_there_are_keys(tmp_path: Path) -> None:
    fleet = load(REPO / "configs/team.yaml")
    told = how_to_ask(fleet, Endpoint.of(fleet))
    assert '-H "authorization: Bearer $SERVE_APP_API_KEY"' in told
    assert 'api_key=os.environ["SERVE_APP_API_KEY"]' in told
    open_to_all = fleet_of(tmp_path)
    assert "SERVE_APP_API_KEY" not in how_to_ask(open_to_all, Endpoint.of(open_to_all))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_port_is_free_or_taken_on_the_address_that_is_asked_for(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken.*--port"):
            Endpoint(host, port).refuse_if_taken()
        Endpoint("127.0.0.3", port).refuse_if_taken()


def test_an_address_of_another_machine_is_told_so() -> None:
    for host in ("192.0.2.1", "no-such-host.invalid"):
        with pytest.raises(UserError, match="no address of this machine"):
            Endpoint(host, free_port()).refuse_if_taken()


def test_the_port_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, host="127.0.0.1", port=8000)
    moved = fleet.on_port(8123)
    assert Endpoint.of(moved).url == "http://127.0.0.1:8123"
    assert fleet.port == 8000
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        [line] = refusal("run", str(fleet.path), "--port", str(port))
    assert line.startswith(f"serve-app: port {port} is taken")


@contextmanager
def answering(body: Any, status: int = 200) -> Iterator[Endpoint]:
    """A server that answers every GET with this."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Endpoint("127.0.0.1", server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_answer_of_somebody_else_s_server_is_never_taken_for_ours() -> None:
    ours = {"run": "a1", "models": {"m": {}}, "waiting_for": []}
    for body, expected in (
        (ours, ours),
        ({**ours, "run": "b2"}, None),
        ({"models": {}}, None),  # started without serve-app run
        ({"status": "ok"}, None),
        ([1], None),
        (b"ready", None),
    ):
        with answering(body) as there:
            assert there.ready("a1") == expected
    with answering({"models": {}}, 503) as there:
        assert there.ready() == {"models": {}}
    assert Endpoint("127.0.0.1", free_port()).ready() is None


def test_nothing_for_this_machine_goes_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "corp.example")
    with answering({"models": {}, "run": "a1"}) as there:
        assert there.ready("a1")
        assert endpoint.goes_through_proxy(there.url)
        told = endpoint.without_proxy("127.0.0.2")
        assert told["no_proxy"] == told["NO_PROXY"]
        assert told["no_proxy"].split(",") == [
            *("corp.example", "127.0.0.1", "localhost", "::1", "127.0.0.2")
        ]
        # With that said, a shell's own clients reach it.
        monkeypatch.setenv("no_proxy", told["no_proxy"])
        assert not endpoint.goes_through_proxy(there.url)


def test_where_there_is_no_proxy_nothing_is_said_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    assert endpoint.without_proxy() == {}


def test_the_printed_commands_say_how_to_get_past_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of(tmp_path, host="127.0.0.1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert "export no_proxy=127.0.0.1,localhost" in how_to_ask(fleet, Endpoint.of(fleet))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "no_proxy" not in how_to_ask(fleet, Endpoint.of(fleet))


# ------------------------------------------------------------------- a folder of its own


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A TMPDIR in which sockets can be made."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_two_instances_share_no_folder_and_no_port(short: Path) -> None:
    first, second = Instance(8000), Instance(8001)
    assert first.folder.is_relative_to(short)
    one, two = first.environment(), second.environment()
    apart = ("RAY_TMPDIR", "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", "RAY_SERVE_HAPROXY_STATS_PORT")
    assert not {one[key] for key in apart} & {two[key] for key in apart}
    # The port may be free still, because the first one is only starting.
    with pytest.raises(UserError, match="port 8000 is another serve-app run's"):
        Instance(8000)
    first.close(keep=False)
    Instance(8000).close(keep=False)
    second.close(keep=False)


def test_the_sockets_that_vllm_leaves_go_with_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Instance(free_port())
    sockets = Path(made.environment()["VLLM_RPC_BASE_PATH"])
    assert sockets.is_relative_to(made.folder)
    assert len(str(sockets / str(uuid.uuid4()))) <= 107
    (sockets / "left").touch()
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/elsewhere")
    assert made.environment()["VLLM_RPC_BASE_PATH"] == "/elsewhere"
    made.close(keep=False)
    assert not sockets.exists()


def test_every_path_of_ray_s_that_is_no_option_is_moved() -> None:
    """Ray's own list: a path that a later Ray adds must not be shared between users again."""
    from ray.serve._private import constants

    source = Path(constants.__file__).read_text()
    named_paths = set(re.findall(r'"(RAY_\w+)",\s+"/tmp/', source))
    made = Instance(free_port())
    try:
        assert len(named_paths) >= 4
        assert named_paths <= made.environment().keys()
    finally:
        made.close(keep=False)


def test_python_has_a_path_without_spaces(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray puts it into a shell's command as it is."""
    made = Instance(free_port())
    assert made.serve()[0] == sys.executable
    prefix = tmp_path / "my $HOME"
    prefix.symlink_to(sys.prefix)
    monkeypatch.setattr(sys, "executable", str(prefix / "bin/python"))
    monkeypatch.setattr(sys, "prefix", str(prefix))
    for _ in range(2):
        command = made.serve()
    assert command[0] == str(made.folder / "python/bin/python")
    # Not imported: that it is found among the packages of this environment is enough.
    program = (
        "import sys; from importlib.metadata import version; print(version('ray'), sys.prefix)"
    )
    shell = f'{command[0]} -c "{program}"'
    said = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert said.stdout == f"2.60.0 {made.folder / 'python'}\n", said.stderr
    made.close(keep=False)
    assert Path(sys.executable).exists()


def test_what_ended_well_leaves_only_its_log(short: Path) -> None:
    for keep in (True, False):
        made = Instance(8000)
        made.log.write_text("said")
        (made.folder / "ray").mkdir()
        made.close(keep=keep)
        assert (made.folder / "ray").exists() == keep
        assert made.log.read_text() == "said"


def test_folders_of_long_ago_go_and_those_in_use_stay(short: Path) -> None:
    old, used = Instance(1), Instance(2)
    old.close(keep=True)
    for made in (old, used):
        past = time.time() - 30 * 86_400
        os.utime(made.folder, (past, past))
    Instance(3).close(keep=True)
    assert not old.folder.exists()
    assert used.folder.exists()
    used.close(keep=True)


def test_a_temporary_folder_that_is_too_long_for_sockets_is_not_used(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = short / "/".join(["slurm_jobdir_"] * 6)
    long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    made = Instance(free_port())
    try:
        assert len(str(made.folder)) <= instance.LONGEST
        environment = made.environment()
        with socket.socket(socket.AF_UNIX) as probe:  # as long as any of vLLM's
            probe.bind(f"{environment['TMPDIR']}/{'x' * 36}")
    finally:
        made.close(keep=False)


def test_with_no_folder_at_all_it_is_said_what_to_set(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (short / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(short / "file"))
    monkeypatch.setattr(instance, "_SHORT", (str(short / "file"),))
    with pytest.raises(UserError, match="set TMPDIR to one that can"):
        Instance(8000)


def test_a_folder_that_somebody_put_in_our_place_is_not_used(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (short / "theirs").mkdir()
    (short / f"sa-{os.getuid()}").symlink_to(short / "theirs")
    made = Instance(free_port())
    assert not made.folder.is_relative_to(short)
    made.close(keep=False)


@pytest.mark.parametrize("home", ["/no/such/home", "/proc"])
def test_without_a_home_that_can_be_written_there_is_another(
    home: str, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray keeps a token there, vLLM its caches."""
    monkeypatch.setenv("HOME", home)
    made = Instance(8000)
    environment = made.environment()
    made.close(keep=False)
    assert Path(environment["HOME"]) == short / f"sa-{os.getuid()}/home"
    assert Path(environment["HOME"]).is_dir()


def test_a_home_that_can_be_written_stays(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(short))
    made = Instance(8000)
    assert made.environment()["HOME"] == str(short)
    made.close(keep=False)


# ---------------------------------------------------------- a cluster that was named on purpose


def test_without_an_address_the_ray_is_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("", "local"):
        monkeypatch.setenv("RAY_ADDRESS", given)
        assert named.named_cluster() is None


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (f"127.0.0.1:{free_port()}", "no Ray cluster answers at 127.0.0.1:"),
        (f"ray://127.0.0.1:{free_port()}", "no Ray cluster answers at ray://"),
        (f"[::1]:{free_port()}", "no Ray cluster answers at [::1]:"),
        ("nonsense", "RAY_ADDRESS is 'nonsense', which is no address; write host:6379 (an"),
    ],
)
def test_an_address_where_nobody_is_is_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, told: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    [line] = refusal("run", str(fleet_of(tmp_path).path))
    assert line.startswith(f"serve-app: {told}")
    assert "unset it for a Ray of this run's own" in line


def test_an_address_is_of_this_machine_or_not() -> None:
    assert addresses.is_here("127.0.0.1") and addresses.is_here("::1")
    assert not addresses.is_here("192.0.2.1") and not addresses.is_here("2001:db8::1")


# ------------------------------------------------------------------------ what it is to load


def _model(model: str, **args: Any) -> dict[str, Any]:
    return servers.application("m", model=model, **args)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"model": "/no/such/model"}, "model is '/no/such/model', but there is no folder /no/such"),
        ({"model": "./here"}, "there is no folder {cwd}/here; correct it, or give a hub id"),
        ({"model": "empty"}, "the folder {cwd}/empty is empty"),
        ({"model": "bare"}, "model is 'bare', but the folder {cwd}/bare has no weights (*.safe"),
        ({"model": "gpt3"}, "no folder {cwd}/gpt3, and as a hub id it cannot be had"),
        ({"model": "~nobody-of-that-name/x"}, "there is no folder {cwd}/~nobody-of-that-name/x"),
        ({"model": "models/mine"}, "no folder {cwd}/models/mine, and as a hub id it cannot be had"),
        (
            {"model": "full", "engine": {"tokenizer": "./tokens"}},
            "engine.tokenizer is './tokens', but there is no folder {cwd}/tokens",
        ),
        (
            {"model": "full", "adapters": [{"name": "sql", "path": "./sql"}]},
            "the path of the adapter 'sql' is './sql', but there is no folder {cwd}/sql",
        ),
        (
            {"model": "full", "engine": {"speculative_config": {"model": "./draft"}}},
            "engine.speculative_config.model is './draft'",
        ),
        (
            {"model": "full", "engine": {"chat_template": "chat.jinja"}},
            "engine.chat_template: there is no file {cwd}/chat.jinja",
        ),
    ],
)
def test_what_is_nowhere_is_said_at_once_with_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/config.json").write_text("{}")
    (tmp_path / "full/pytorch_model.bin").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text("{}")
    fleet = fleet_of(tmp_path, _model(**args), host="127.0.0.1", port=free_port())
    [line] = refusal("run", str(fleet.path))
    assert told.format(cwd=tmp_path) in line


def test_what_is_there_is_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/config.json").write_text("{}")
    (tmp_path / "full/pytorch_model.bin").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text("{}")
    (tmp_path / "cache/huggingface/hub/models--org--cached").mkdir(parents=True)
    template = {"chat_template": "{{ messages }}"}
    weights.refuse_missing(
        fleet_of(
            tmp_path,
            _model("full", engine=template) | {"name": "a"},
            _model("s3://bucket/model") | {"name": "b"},
            _model("full", engine={"speculative_config": {"model": "ngram"}}) | {"name": "d"},
            _model("bare", engine={"load_format": "dummy"}) | {"name": "f"},
            _model("org/elsewhere", engine={"download_dir": "/models"}) | {"name": "e"},
            _model("org/cached", cache_dir=str(tmp_path / "cache")) | {"name": "c"},
        )
    )


def test_the_hub_is_asked_for_what_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for status, told in ((404, "the hub has no such model"), (500, "the hub cannot be reached")):
        with answering({"error": "Repository not found"}, status) as hub:
            model = _model("org/name", env={"HF_ENDPOINT": hub.url})
            with pytest.raises(ConfigError, match=told):
                weights.refuse_missing(fleet_of(tmp_path, model))
    with answering({"id": "org/name", "modelId": "org/name"}) as hub:
        model = _model("org/name", env={"HF_ENDPOINT": hub.url})
        weights.refuse_missing(fleet_of(tmp_path, model))


# ------------------------------------------------------------------------ the first request

SIZES = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10}
POOLING = [{"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
NORMALIZE = [{"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]


@pytest.mark.parametrize(
    ("architecture", "modules", "engine", "embeds"),
    [
        ("LlamaForCausalLM", None, {}, False),
        ("MiniCPMV", None, {}, False),
        ("InternVLChatModel", None, {}, False),
        ("BertModel", None, {}, True),
        ("Qwen3ForCausalLM", POOLING, {}, True),
        ("Qwen3ForCausalLM", NORMALIZE, {}, False),
        ("Qwen3ForCausalLM", {"not": "a list"}, {}, False),
        ("Qwen3ForCausalLM", POOLING, {"runner": "generate"}, False),
        ("LlamaForCausalLM", None, {"runner": "pooling"}, True),
        ("LlamaForCausalLM", None, {"convert": "embed"}, True),
        ("LlamaForCausalLM", None, {"runner": "auto", "convert": "none"}, False),
    ],
)
@pytest.mark.parametrize("cached", [False, True], ids=["a folder", "the Hugging Face cache"])
def test_a_model_is_asked_for_what_vllm_makes_it_do(
    tmp_path: Path, architecture: str, modules: Any, engine: Any, embeds: bool, cached: bool
) -> None:
    name, folder = str(tmp_path / "model"), tmp_path / "model"
    if cached:
        name, hub = "org/model", tmp_path / "huggingface/hub/models--org--model"
        folder = hub / "snapshots/1"
        (hub / "refs").mkdir(parents=True)
        (hub / "refs/main").write_text("1")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SIZES | {"architectures": [architecture]}))
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
    fleet = fleet_of(tmp_path, _model(name, engine=engine, cache_dir=str(tmp_path)))
    said = how_to_ask(fleet, Endpoint.of(fleet))
    assert ("client.embeddings.create" in said) is embeds
    assert ("client.chat.completions.create" in said) is not embeds
    assert ("/v1/chat/completions" in said) is not embeds


def test_a_model_of_which_nothing_is_at_hand_is_taken_for_one_that_chats(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, _model("org/unknown", cache_dir=str(tmp_path)))
    assert "client.chat.completions.create" in how_to_ask(fleet, Endpoint.of(fleet))


# ----------------------------------------------------------------------- why it ended


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "OSError: validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes",
            "set TMPDIR to a shorter one",
        ),
        ("OSError: [Errno 28] No space left on device", "the disk of its folder is full"),
        (
            "PermissionError: [Errno 13] Permission denied: '/tmp/ray/session_latest'",
            "it may not write /tmp/ray/session_latest",
        ),
        (
            "OSError: [Errno 30] Read-only file system: '/root/.ray'",
            "it may not write /root/.ray",
        ),
        (
            "\x1b[36m(ProxyActor pid=7)\x1b[0m RuntimeError: "
            "Failed to bind to address '127.0.0.1:8000'.",
            "127.0.0.1:8000 was taken meanwhile",
        ),
        (
            "Exception: The current node timed out during startup. This could happen",
            "Ray did not start in its 30 s, twice",
        ),
        (
            "UserWarning: [Errno 13] Permission denied: '/root/.triton'\n"
            "RuntimeError: Failed to bind to address '0.0.0.0:8000'.",
            "0.0.0.0:8000 was taken meanwhile",
        ),
        ("RuntimeError: can't start new thread", "raise it (ulimit -u"),
        ("OSError: [Errno 24] Too many open files", "raise it (ulimit -n"),
        (
            "Traceback (most recent call last):\n  x\nValueError: first\n"
            "ray.exceptions.AuthenticationError: the token is wrong.\nsome more",
            "ended by itself: the token is wrong (its log",
        ),
        ("nothing of interest", "it gave no reason but status 1 (its log"),
    ],
)
def test_why_it_ended_is_one_sentence(tmp_path: Path, said: str, told: str) -> None:
    log = tmp_path / "serve.log"
    log.write_text(said)
    sentence = reasons.why_it_ended(1, log)
    assert told in sentence
    assert str(log) in sentence
    assert "\n" not in sentence


def test_a_signal_is_called_by_its_name(tmp_path: Path) -> None:
    assert "ended by SIGKILL, as the kernel does where memory runs out" in reasons.why_it_ended(
        -9, None
    )


@pytest.fixture
def signals() -> Iterator[None]:
    """What a run makes of signals is not pytest's, whose Ctrl-C is to end it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_ray_that_gave_up_on_itself_is_started_once_more(
    signals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def start(fleet: Fleet, made: Instance, env: dict[str, str], log: Path) -> Any:
        started.append(env[RUN_ID])
        with log.open("wb") as out:
            script = "raise Exception('The current node timed out during startup.')"
            return subprocess.Popen([sys.executable, "-c", script], stdout=out, stderr=out)

    monkeypatch.setattr(serve_process, "start", start)
    fleet = fleet_of(tmp_path, host="127.0.0.1", port=free_port(), request_timeout_s=30)
    said = io.StringIO()
    with pytest.raises(UserError, match="Ray did not start in its 30 s, twice"):
        run_module.run(fleet, Console(file=said), check=False)
    assert "starting it once more" in said.getvalue()
    assert said.getvalue().count("note: http_options.request_timeout_s is 30: Serve ends") == 1
    assert len(started) == 2


def test_ray_s_own_longest_socket_fits() -> None:
    """As Ray makes them: the bound is about the names that it has."""
    from ray.dashboard.subprocesses.utils import get_socket_path

    assert len(get_socket_path("", "MetricsHead")) >= len(get_socket_path("", "ServeHead"))
    folder = "/" + "x" * (instance.LONGEST - 1)
    session = f"{folder}/ray/session_2026-11-26_06-11-12_123456_4194304/sockets"
    assert len(get_socket_path(session, "MetricsHead")) <= 107


def test_haproxy_s_longest_socket_fits(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HAProxy itself says so, of a path as long as it may become."""
    folder = short / ("x" * (instance.LONGEST - len(str(short)) - 1)) / ("f" * 56)
    folder.mkdir(parents=True)
    file = folder / "haproxy.cfg"
    file.write_text(f"global\n  stats socket {folder}/metrics.sock\n")
    check = [Path(sys.executable).with_name("serve-app-haproxy"), "-c", "-f", file]
    assert len(str(folder.parent)) == instance.LONGEST
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file.write_text(f"global\n  stats socket {folder}x/metrics.sock\n")
    done = subprocess.run(check, capture_output=True, text=True)
    assert "too long (max 97)" in done.stderr


def test_a_state_folder_that_cannot_be_written_means_no_usage_db(tmp_path: Path) -> None:
    """Else the gateway would not start, though nobody asked for a database."""
    env = {"XDG_STATE_HOME": str(tmp_path)}
    assert run_module._usage_db(env) == f"sqlite:///{tmp_path}/serve_app/usage.db"
    (tmp_path / "serve_app").rmdir()
    (tmp_path / "serve_app").symlink_to("/proc/self")  # a folder in which not even root makes files
    assert run_module._usage_db(env) is None


# --------------------------------------------------------------------------------------- the end


METRICS = b"""\
# HELP serve_app_gateway_inflight_requests now
serve_app_gateway_inflight_requests{gateway="a",model="m"} 2.0
serve_app_gateway_inflight_requests{gateway="b",model="m"} 1.0
serve_app_gateway_queued_requests{gateway="a",model="m"} 7.0
"""


class Metrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.headers["authorization"] == "Bearer sk-x" and self.path == "/metrics"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(METRICS if known else b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_the_gateways_tell_how_many_requests_are_running() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        assert Endpoint("127.0.0.1", port, "sk-x").running() == 3
        assert Endpoint("127.0.0.1", port, "sk-y").running() == 0
        server.shutdown()
    assert Endpoint("127.0.0.1", port).running() == 0


@pytest.mark.parametrize(
    ("counts", "patience_s", "again_after", "ended"),
    [
        ([0], 30.0, None, True),
        ([2, 1, 0], 30.0, None, True),
        ([2, 2, 2], 0.0, None, True),  # the config gives them no time: none is asked for
        ([1, 1, 1], 30.0, 1, False),
    ],
    ids=["none", "they end", "no time", "a second Ctrl-C"],
)
def test_running_requests_get_their_time(
    counts: list[int],
    patience_s: float,
    again_after: int | None,
    ended: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop: Any = SimpleNamespace(again=False)
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        stop.again = len(sleeps) == again_after

    monkeypatch.setattr(run_module.time, "sleep", sleep)
    asked = iter(counts)
    endpoint: Any = SimpleNamespace(running=lambda: next(asked))
    serve: Any = SimpleNamespace(poll=lambda: None)
    out = io.StringIO()
    console = Console(file=out, width=200)
    assert run_module._let_end(endpoint, patience_s, serve, stop, console) == ended
    assert ("running and may take 30 s to end" in out.getvalue()) == bool(sleeps)


def test_a_signal_that_comes_twice_at_once_is_one(
    signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([10.0, 10.2, 12.0])
    stop = run_module._Stop()
    monkeypatch.setattr(run_module.time, "monotonic", lambda: next(now))
    seen = []
    for _ in range(3):
        stop._note(signal.SIGINT, None)
        seen.append((stop.asked, stop.again))
    assert seen == [(True, False), (True, False), (True, True)]


def test_a_second_ctrl_c_does_not_wait_for_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_process.orphans, "orphans", list)  # others' are none of ours
    deaf = ["/bin/sh", "-c", "trap '' INT; echo deaf; while :; do sleep 0.1; done"]
    serve = subprocess.Popen(deaf, start_new_session=True, stdout=subprocess.PIPE)
    assert serve.stdout and serve.stdout.readline() == b"deaf\n"
    serve_process.end(serve, Console(file=io.StringIO()), patience_s=600, at_once=lambda: True)
    assert serve.returncode == -signal.SIGKILL
    serve.stdout.close()

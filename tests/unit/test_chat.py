"""`serve-app chat` against a real HTTP server that answers as OpenAI's API does."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from harness.command import refusal
from harness.processes import free_port

from serve_app import cli
from serve_app.errors import UserError
from serve_app.local.chat import Server

CHAT = {"id": "smol", "root": "models/smol", "parent": None}
ALIAS = {"id": "org/smol", "root": "models/smol", "parent": None}
ADAPTER = {"id": "sql", "root": "/adapters/sql", "parent": "smol"}
EMBED = {"id": "minilm", "root": "sentence-transformers/all-MiniLM-L6-v2", "parent": None}
OTHER = {"id": "qwen", "root": "models/qwen", "parent": None}
COMMAND = [sys.executable, "-c", "from serve_app.cli import main; main()", "chat"]


class OpenAI:
    """The server, what it was asked, and what it does next."""

    def __init__(self) -> None:
        self.cards: list[dict[str, Any]] = [CHAT, ALIAS, ADAPTER, EMBED]
        self.asked: list[dict[str, Any]] = []
        self.deltas: list[dict[str, Any]] = [{"content": "Par"}, {"content": "is."}]
        self.refuses: str | None = None
        self.breaks = False
        self.endless = False
        self.left = threading.Event()
        """Set when a client goes away in the middle of an endless answer."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path != "/v1/models":
                    self.send_error(404)
                    return
                self.reply(200, {"object": "list", "data": server.cards})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                server.asked.append(json.loads(body))
                if server.refuses:
                    self.reply(404, {"error": {"message": server.refuses, "type": "x"}})
                else:
                    self.stream()

            def reply(self, status: int, document: Any) -> None:
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def stream(self) -> None:
                self.send_response(200)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for delta in server.deltas:
                    self.event({"choices": [{"delta": delta, "finish_reason": None}]})
                try:
                    while server.endless:
                        self.event({"choices": [{"delta": {"content": "more "}}]})
                        time.sleep(0.01)
                except OSError:
                    server.left.set()
                if server.breaks or server.endless:
                    self.close_connection = True
                    return
                self.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
                self.chunk(b"data: [DONE]\n\n")
                self.chunk(b"")

            def event(self, event: dict[str, Any]) -> None:
                self.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

            def chunk(self, data: bytes) -> None:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = str(self.http.server_port)


@pytest.fixture
def server() -> Iterator[OpenAI]:
    server = OpenAI()
    thread = threading.Thread(target=server.http.serve_forever)
    thread.start()
    yield server
    server.endless = False
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str, stdin: str
) -> str:
    """Standard output of a run that succeeds."""
    monkeypatch.setattr(sys, "argv", ["serve-app", "chat", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert (ended.value.code, captured.err) == (0, "")
    return captured.out


# --- one question ------------------------------------------------------------------------------


def test_what_is_piped_in_is_asked_of_the_only_chat_model(
    server: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Whatever the proxy is, this machine is asked directly.
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert said(monkeypatch, capsys, "--port", server.port, stdin="hi\n") == "Paris.\n"
    [asked] = server.asked
    assert (asked["model"], asked["stream"]) == ("smol", True)
    assert asked["messages"] == [{"role": "user", "content": "hi"}]


def test_a_message_a_system_prompt_and_a_named_model(
    server: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.deltas = [{"reasoning": "hm"}, {"content": "\x1bSELECT"}]
    where = ["--url", f"http://127.0.0.1:{server.port}/v1/"]
    asked = ["sql", "-m", "question", "--system", "Be short."]
    # Not on a terminal: the answer as it is, and no thoughts.
    assert said(monkeypatch, capsys, *where, *asked, stdin="unread") == "\x1bSELECT\n"
    [request] = server.asked
    assert request["model"] == "sql"
    assert request["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "question"},
    ]


def test_a_reader_that_leaves_is_no_error(server: OpenAI) -> None:
    server.endless = True
    command = [*COMMAND, "--port", server.port, "-m", "hi"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    assert process.stdout.read(5) == b"Paris"
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
    assert server.left.wait(timeout=60)


# --- what goes wrong ---------------------------------------------------------------------------


def test_no_server_is_one_sentence() -> None:
    port = free_port()
    assert refusal("chat", "--port", str(port), "-m", "hi") == [
        f"serve-app: http://127.0.0.1:{port}/v1 does not answer (Connection refused); start a "
        "server with serve-app run, or name another with --url or --port"
    ]


@pytest.mark.parametrize(
    ("cards", "arguments", "told"),
    [
        ([CHAT, OTHER, EMBED], [], "has several models; name one: serve-app chat smol | qwen"),
        ([CHAT], ["smoll"], "has no model 'smoll'; did you mean 'smol'?"),
        ([CHAT, EMBED], ["x"], "has no model 'x' (there are: smol, minilm)"),
        ([EMBED], [], "has no chat model (there are: minilm)"),
        ([], [], "has no chat model (there are: none yet)"),
        (["?"], [], "is no OpenAI endpoint; correct --url"),
    ],
)
def test_the_model_must_be_clear(
    server: OpenAI, cards: list[Any], arguments: list[str], told: str
) -> None:
    server.cards = cards
    [line] = refusal("chat", *arguments, "--port", server.port, "-m", "hi")
    assert told in line


def test_a_model_s_folder_is_looked_for_where_the_server_was_started(
    server: OpenAI, tmp_path: Path
) -> None:
    """Else the answer to which models write text would be that of the folder that one is in."""
    embedder = tmp_path / "models/embedder"
    embedder.mkdir(parents=True)
    modules = [{"type": "sentence_transformers.models.Pooling"}]
    (embedder / "modules.json").write_text(json.dumps(modules))
    server.cards = [CHAT, {"id": "e", "root": "models/embedder", "parent": None}]
    url = f"http://127.0.0.1:{server.port}"
    assert Server.at(url, folder=tmp_path).chat_model(None) == "smol"
    with pytest.raises(UserError, match="has several models"):
        Server.at(url).chat_model(None)


def test_a_server_that_still_starts_is_said(server: OpenAI) -> None:
    [line] = refusal("chat", "--url", f"http://127.0.0.1:{server.port}/elsewhere", "-m", "hi")
    assert "answers 404 Not Found; it is no OpenAI endpoint, or still starting" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--url", "ftp://x"], "--url is ftp://x, but must be like http://127.0.0.1:8000/v1"),
        (["--url", "http://x", "--port", "1"], "give --url or --port, not both"),
    ],
)
def test_a_wrong_address_is_one_sentence(arguments: list[str], told: str) -> None:
    assert refusal("chat", *arguments, "-m", "hi") == [f"serve-app: {told}"]


def test_an_empty_question_is_not_asked(server: OpenAI) -> None:
    [line] = refusal("chat", "--port", server.port, "-m", " ")
    assert "there is no question" in line
    assert server.asked == []


def test_the_server_s_own_sentence_is_said(
    server: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refuses = "The model 'smol' is asleep."
    monkeypatch.setattr(sys, "argv", ["serve-app", "chat", "--port", server.port, "-m", "hi"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "serve-app: The model 'smol' is asleep.\n"


def test_a_connection_that_breaks_is_not_the_end_of_an_answer(
    server: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.breaks = True
    monkeypatch.setattr(sys, "argv", ["serve-app", "chat", "--port", server.port, "-m", "hi"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "Paris.\n"
    assert "the connection ended in the middle of the answer" in err


# --- a conversation, on a terminal -------------------------------------------------------------


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [*COMMAND, *arguments], {**os.environ, "TERM": "dumb"})
        self.shown = ""

    def until(self, text: str) -> str:
        """Wait until ``text`` is shown; what has been shown since the last wait."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            ready, _, _ = select.select([self.terminal], [], [], 1)
            assert time.monotonic() < deadline, self.shown
            if ready:
                try:
                    self.shown += os.read(self.terminal, 4096).decode()
                except OSError:  # its other end is closed
                    raise AssertionError(f"it ended after {self.shown!r}") from None
        before, _, self.shown = self.shown.partition(text)
        return before

    def press_until(self, key: str, text: str) -> None:
        """Press a key until ``text`` is shown: Python's prompt may miss a signal.

        In Modules/readline.c, one that comes just before the select() is seen at the next key.
        """
        deadline = time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            self.type(key)
            if select.select([self.terminal], [], [], 1)[0]:
                self.shown += os.read(self.terminal, 4096).decode()
        self.until(text)

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def status(self) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.terminal)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"it does not end: {self.shown!r}")


def test_a_conversation_goes_on_after_ctrl_c_and_an_error(server: OpenAI) -> None:
    terminal = Terminal("--port", server.port)
    terminal.until("Ctrl-D or /exit the conversation.")
    terminal.until("> ")
    terminal.type("What is the capital of France?\n")
    terminal.until("Paris.")
    terminal.until("> ")

    server.endless = True
    terminal.type("And of Spain?\n")
    terminal.until("more more")
    terminal.type("\x03")
    terminal.until("> ")
    assert server.left.wait(timeout=60)  # the server is not left to generate for nobody
    server.endless = False

    server.refuses = "too long"
    terminal.type("And of Italy?\n")
    terminal.until("serve-app: too long")
    terminal.until("> ")
    server.refuses = None

    server.deltas = [{"reasoning": "hm"}, {"content": "\x1b]0;x\x07Lis"}, {"content": "bon"}]
    terminal.type("And of Portugal?\n")
    assert "hm" in terminal.until("]0;xLisbon")  # a thought is shown, an escape is not passed on
    terminal.until("> ")
    terminal.press_until("\x03", "(Ctrl-D or /exit ends the conversation)")
    terminal.until("> ")
    terminal.type("/exit\n")
    assert terminal.status() == 0

    # The last question came with all that was said, but for the one that was refused.
    roles = [message["role"] for message in server.asked[-1]["messages"]]
    contents = [message["content"] for message in server.asked[-1]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert contents[:3] == ["What is the capital of France?", "Paris.", "And of Spain?"]
    assert contents[3].startswith("Paris.more more")
    assert contents[4] == "And of Portugal?"


def test_ctrl_d_ends_it(server: OpenAI) -> None:
    terminal = Terminal("--port", server.port, "--system", "Be short.")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.status() == 0

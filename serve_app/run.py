"""``serve-app run``: ``serve run`` with a readable start, and nothing left at the end."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from serve_app import haproxy, processes
from serve_app.config import Fleet, ModelConfig
from serve_app.errors import UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(fleet: Fleet, console: Console, *, verbose: bool = False) -> int:
    """Run the config in the foreground until Ctrl-C; the exit status.

    Ray's and vLLM's own output goes to a log file, or to the terminal with ``verbose``.

    Raises:
        UserError: the port is taken, or no model came up.
    """
    if fleet.gateway is None:
        raise UserError(
            f"{fleet.path}: there is no gateway; add an application with "
            "import_path serve_app.gateway:app and route_prefix /"
        )
    _refuse_taken_port(fleet.port)
    log = None if verbose else _log_file()
    started = time.monotonic()
    serve = _start(fleet, log)
    stop = _Stop()
    try:
        if log:
            console.print(f"starting {len(fleet.models)} models; full log: {log}", highlight=False)
        if _wait_until_ready(fleet, serve, stop, console, started):
            print(how_to_ask(fleet), flush=True)  # never wrapped: it is to be copied
        while serve.poll() is None and not stop.asked:
            time.sleep(0.2)
        if not stop.asked:
            where = f"; its log is {log}" if log else ""
            raise UserError(f"serve run ended by itself with status {serve.returncode}{where}")
        return 0
    finally:
        _end(serve, console)


class _Stop:
    """Ctrl-C and SIGTERM, noted; a second one is not needed and does nothing."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._note)
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def _refuse_taken_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(
                f"port {port} is taken; stop what uses it, or set http_options.port in the config "
                "(left over from a killed run? make clean-processes ends it)"
            ) from None


def _log_file() -> Path:
    handle, name = tempfile.mkstemp(prefix="serve-app-", suffix=".log")
    os.close(handle)
    return Path(name)


def _start(fleet: Fleet, log: Path | None) -> subprocess.Popen[bytes]:
    env = os.environ.copy()
    if not env.get("RAY_ADDRESS"):
        # A Ray of its own stays on the loopback interface.
        env.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Ray runs its workers at nice 15, behind whatever else the machine does.
        env.setdefault("RAY_worker_niceness", "0")
        env = haproxy.environment() | env
    output = log.open("wb") if log else None
    try:
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", str(fleet.path)],
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            stdin=subprocess.DEVNULL,
            env=env,
            # Ctrl-C in the terminal reaches only us; we pass it on, once.
            start_new_session=True,
            preexec_fn=_interrupt_when_parent_dies,
        )
    finally:
        if output:
            output.close()


def _interrupt_when_parent_dies() -> None:
    """If this command is killed, `serve run` gets the Ctrl-C that it would have passed on."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _wait_until_ready(
    fleet: Fleet, serve: subprocess.Popen[bytes], stop: _Stop, console: Console, started: float
) -> bool:
    """Say when each model is up; True when all are, False when asked to stop."""
    told: set[str] = set()
    with console.status("starting Ray") as status:
        while serve.poll() is None and not stop.asked:
            report = _ask_ready(fleet.port) or {"models": {}, "waiting_for": []}
            waiting = [n for n in fleet.models if n not in told]
            if report["models"]:
                status.update("; ".join(_doing(n, report["models"].get(n, {})) for n in waiting))
            for name, model in report["models"].items():
                seconds = time.monotonic() - started
                if name in told:
                    continue
                if model["status"] == "DEPLOY_FAILED":
                    told.add(name)
                    console.print(f"[red]{name} failed[/]: {model['message']}", highlight=False)
                elif name not in report["waiting_for"]:
                    told.add(name)
                    console.print(f"[green]{name} is ready[/] ({seconds:.0f} s)", highlight=False)
            if told >= fleet.models.keys():
                if len(report["waiting_for"]) == len(fleet.models):
                    raise UserError("no model came up; see the reasons above")
                return True
            time.sleep(0.5)
    return False


def _doing(name: str, model: dict[str, Any]) -> str:
    """What the last of a model's replicas to start is doing."""
    starting = model.get("starting") or [{"phase": "loading"}]
    return f"{name}: {starting[-1]['phase']}"


def _ask_ready(port: int) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        try:
            body = json.load(error)
        except ValueError:
            return None  # Serve's own plain-text answer while there is no gateway yet
        return body if "models" in body else None
    except (OSError, ValueError):
        return None


def how_to_ask(fleet: Fleet) -> str:
    """A curl command and an OpenAI SDK snippet that work as they are."""
    base = f"http://127.0.0.1:{fleet.port}/v1"
    chat = next((n for n, m in fleet.models.items() if _chats(m)), None)
    embed = next((n for n, m in fleet.models.items() if m.engine.get("runner") == "pooling"), None)
    lines = [f"\nThe OpenAI endpoint is {base}\n"]
    if chat:
        body = {
            "model": chat,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,  # a small model that samples soon talks nonsense, and for long
        }
        lines += [
            f"curl -s {base}/chat/completions -H 'content-type: application/json' \\",
            f"  -d '{json.dumps(body)}'\n",
        ]
    lines += ["from openai import OpenAI", f'client = OpenAI(base_url="{base}", api_key="-")']
    if chat:
        lines += [
            "answer = client.chat.completions.create(",
            f'    model="{chat}",',
            '    messages=[{"role": "user", "content": "What is the capital of France?"}],',
            "    temperature=0,",
            ")",
            "print(answer.choices[0].message.content)",
        ]
    if embed:
        lines += [
            f'vector = client.embeddings.create(model="{embed}", input="Paris")',
            "print(len(vector.data[0].embedding))",
        ]
    return "\n".join([*lines, "\nCtrl-C ends it."])


def _chats(model: ModelConfig) -> bool:
    return model.engine.get("runner", "auto") in ("auto", "generate")


def _end(serve: subprocess.Popen[bytes], console: Console) -> None:
    if serve.poll() is None:
        console.print("stopping")
        serve.send_signal(signal.SIGINT)
        try:
            serve.wait(timeout=60)
        except subprocess.TimeoutExpired:
            serve.kill()
            serve.wait()
    # What Ray started may need a moment to notice that its driver is gone.
    for _ in _moments(5.0):
        if not _in_session(serve.pid):
            break
    for pid in _in_session(serve.pid):
        _kill(pid)
    processes.end(processes.orphans())


def _moments(seconds: float) -> Iterator[None]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(0.2)


def _in_session(session: int) -> list[int]:
    """Pids of the session that `serve run` led: all that it started and is still there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if os.getsid(int(entry.name)) == session and state != "Z":
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

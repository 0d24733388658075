"""The contenders: this gateway with everything off and on, and others from the registry."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import others, processes
from benchmarks.gateway.upstream import MODELS
from serve_app.config import keys
from serve_app.errors import UserError

TREE = Path(__file__).parents[2]
_KEYS = 100
_ALL_LIMITS = {
    "requests_per_minute": 10**9,
    "tokens_per_minute": 10**12,
    "concurrent_requests": 10**6,
    "tokens_per_day": 10**15,
}
"""Of each key, and once more of it for each model. Every kind is counted, none is ever reached."""

_START_S = 90.0

_SCRAPE_S = 15
_SCRAPE = """
import time, urllib.request
asked = urllib.request.Request("{url}", headers={{"authorization": "Bearer {key}"}})
while True:
    urllib.request.urlopen(asked, timeout=60).read()
    time.sleep({every})
"""
"""What a Prometheus does meanwhile."""


@dataclass
class Arm:
    """One contender that runs."""

    name: str
    port: int
    pid: int | None = None
    """None of the upstream itself."""

    headers: str = ""
    """What its clients send, each line with its end."""

    def cpu_s(self) -> float:
        return processes.cpu_s(self.pid) if self.pid else 0.0


def everything_on(work: Path, receiver: str) -> tuple[dict[str, Any], list[str]]:
    """The gateway's args with all that can be on, and the keys of its clients.

    The first key is an admin's. ``receiver`` is the URL to which spans go.
    """
    secrets, entries = [], []
    for number in range(_KEYS):
        secret, entry = _key(f"team-{number}", admin=number == 0)
        secrets.append(secret)
        entries.append(entry)
    file = work / "keys.yaml"
    file.write_text(yaml.safe_dump(entries))
    args = {
        "keys": {"file": str(file)},
        "usage_db": f"sqlite:///{work / 'usage.db'}",
        "usage_dir": str(work / "usage"),
        "access_log": True,
        "otlp_endpoint": receiver,
    }
    return args, secrets


def _key(name: str, *, admin: bool) -> tuple[str, dict[str, Any]]:
    secret, hash = keys.new()
    entry = {"name": name, "hash": hash, "admin": admin, **_ALL_LIMITS}
    return secret, {**entry, "model_limits": {"*": _ALL_LIMITS}}


class Contenders:
    """Starts them; they live as long as ``running``."""

    def __init__(self, work: Path, upstream: int, running: contextlib.ExitStack) -> None:
        self._work, self._upstream, self._running = work, upstream, running
        self.secrets: list[str] = []
        """Keys of :meth:`on`."""

    def upstream(self) -> Arm:
        self._start("upstream", self._module("upstream", self._upstream))
        return self._up(Arm("upstream alone", self._upstream))

    def off(self, port: int) -> Arm:
        return self._gateway("off", port, {})

    def on(self, port: int) -> Arm:
        receiver = f"http://127.0.0.1:{self._upstream}"
        args, self.secrets = everything_on(self._work, receiver)
        arm = self._gateway("on", port, args)
        arm.headers = authorization(self.secrets[0])
        url = f"http://127.0.0.1:{port}/metrics"
        command = _SCRAPE.format(url=url, key=self.secrets[0], every=_SCRAPE_S)
        self._start("scrapes", [sys.executable, "-c", command])
        return arm

    def litellm(self, port: int) -> Arm:
        """LiteLLM's proxy as it is fastest: one worker, no database, no keys, no log."""
        command = others.litellm(self._work, port, self._upstream, MODELS)
        pid = self._start("litellm", command, others.LITELLM_ENV)
        return self._up(Arm(f"LiteLLM {others.version('litellm')}", port, pid))

    def vllm_router(self, port: int) -> Arm:
        pid = self._start("vllm-router", others.vllm_router(port, self._upstream, port + 1))
        return self._up(Arm(f"vllm-router {others.version('vllm-router')}", port, pid))

    def _gateway(self, what: str, port: int, args: dict[str, Any]) -> Arm:
        config = self._work / f"{what}.json"
        config.write_text(json.dumps(args))
        pid = self._start(what, [*self._module("server", port), self._upstream, config])
        return self._up(Arm(f"serve_app, everything {what}", port, pid))

    def _module(self, name: str, port: int) -> list[Any]:
        return [sys.executable, "-m", f"benchmarks.gateway.{name}", port]

    def _start(self, name: str, command: list[Any], env: dict[str, str] | None = None) -> int:
        path = os.pathsep.join(str(part) for part in (TREE, TREE / "tests"))
        log = self._running.enter_context((self._work / f"{name}.log").open("wb"))
        started = processes.process(command, {"PYTHONPATH": path, **(env or {})}, log)
        return self._running.enter_context(started)

    def _up(self, arm: Arm) -> Arm:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{arm.port}/health", timeout=10):
                    return arm
            except OSError as error:
                if hasattr(error, "code"):  # an answer
                    return arm
            if time.monotonic() > deadline or (arm.pid and not processes.tree(arm.pid)):
                raise UserError(f"{arm.name} does not answer; its log ends with:\n{self._log(arm)}")
            time.sleep(0.2)

    def _log(self, arm: Arm) -> str:
        logs = sorted(self._work.glob("*.log"), key=lambda log: log.stat().st_mtime)
        return "\n".join(logs[-1].read_text(errors="replace").splitlines()[-5:])


def authorization(secret: str) -> str:
    """The header with a key, and its end."""
    return f"Authorization: Bearer {secret}\r\n"


@contextlib.contextmanager
def load(program: Path, arm: Arm, connections: int, requests: int, body: dict[str, Any],
         events: int, rate: float = 0.0) -> Iterator[subprocess.Popen[str]]:  # fmt: skip
    """The client in C, running; killed at the end if it still does."""
    command = [program, "client", arm.port, connections, requests, json.dumps(body), events, rate,
               arm.headers]  # fmt: skip
    client = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    try:
        yield client
    finally:
        client.kill()
        client.wait()

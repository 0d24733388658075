"""`serve-app run` in a process of its own, and what is left of it after a signal."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from harness import servers
from harness.processes import (
    REPO,
    children,
    eventually,
    free_port,
    in_session,
    is_port_free,
    kill_session,
)
from harness.servers import BIN, EMBED
from serve_app import lifeline
from serve_app.config import keys


class Run:
    """A `serve-app run` of the embedding model."""

    headers: Mapping[str, str] = {}
    """What requests need to be let in."""

    def __init__(
        self,
        folder: Path,
        name: str = EMBED,
        options: tuple[str, ...] = (),
        with_keys: bool = False,
        **env: str,
    ) -> None:
        self.port = free_port()
        application = servers.embed_application() | {"name": name}
        application["args"]["served_as"] = []
        application["args"]["model"] = str(REPO / application["args"]["model"])
        self.folder = folder
        self.config = folder / "config.yaml"
        document = servers.document(self.port, application)
        if with_keys:
            key, hash = keys.new()
            self.headers = {"authorization": f"Bearer {key}"}
            (folder / "keys.yaml").write_text(f"- name: tests\n  hash: {hash}\n")
            document["applications"][-1]["args"]["keys"] = {"file": "keys.yaml"}
        self.config.write_text(servers.as_yaml(document))
        self.command = [str(BIN / "serve-app"), "run", str(self.config), *options]
        self.name = name
        self.out = folder / "out"
        self.env = env
        self.before: Callable[[], Any] | None = None

    def start(self) -> None:
        env = {**os.environ, **self.env}
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={key: value for key, value in env.items() if value},
                preexec_fn=self._prepare,
            )

    def _prepare(self) -> None:
        lifeline.interrupt_with_parent()
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
        answer = httpx.get(
            f"http://127.0.0.1:{self.port}/v1/models",
            headers=self.headers,
            trust_env=False,
            timeout=30,
        )
        return [model["id"] for model in answer.json()["data"]]

    def embeds(self) -> int:
        """The length of an embedding."""
        answer = httpx.post(
            f"http://127.0.0.1:{self.port}/v1/embeddings",
            json={"model": self.name, "input": "Paris"},
            headers=self.headers,
            trust_env=False,
            timeout=60,
        )
        return len(answer.json()["data"][0]["embedding"])

    def end(self, number: signal.Signals = signal.SIGINT) -> dict[int, str]:
        """What is left of it after this signal."""
        return self.left_by(lambda: self.process.send_signal(number))

    def left_by(self, ending: Callable[[], object]) -> dict[int, str]:
        """What is left of it after ``ending``, which ends it."""
        [serve] = children(self.process.pid)
        ending()
        try:
            assert self.process.wait(timeout=120) == 0, self.out.read_text()
        finally:
            left = in_session(self.process.pid) | in_session(serve)
            self.kill()
            kill_session(serve)
        assert is_port_free(self.port)
        return left

    def kill(self) -> None:
        kill_session(self.process.pid)


class Demo(Run):
    """`serve-app run configs/demo.yaml` in a checkout, on a port of its own."""

    def __init__(self, checkout: Path) -> None:
        self.port = free_port()
        self.folder = checkout
        self.config = checkout / "configs/demo.yaml"
        text = self.config.read_text()
        assert "port: 8000" in text
        self.config.write_text(text.replace("port: 8000", f"port: {self.port}"))
        self.command = [str(BIN / "serve-app"), "run", str(self.config)]
        self.name = "all-minilm-l6-v2"
        self.out = checkout / "out-of-the-server"
        self.env = {}
        self.before = None

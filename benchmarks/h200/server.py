"""Servers under measurement, bare vLLM or ours, and what can be seen of them from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.load import NONE
from benchmarks.planner_accuracy import without_weights
from serve_app import lifeline
from serve_app.cluster import haproxy

MODEL = "m"
"""The id of the one model that a measured server has."""

# Lines of vLLM's log that say how long a part of the start took.
_TOOK = re.compile(
    r"(Model loading took .*|torch\.compile took .*|torch\.compile and initial .*"
    r"|Initial profiling/warmup run took .*|Graph capturing finished .*|init engine .* took .*"
    r"|GPU KV cache size.*|Maximum concurrency.*|Directly load AOT .*|Applying persisted .*"
    r"|Saved startup plan.*)"
)
# Lines of our replicas' log: the phase that begins, and the seconds since the start.
_PHASE = re.compile(r"start: (.*) \(after (\d+) s\)")

_NO_GATEWAY = re.compile(r"the gateway cannot start: .*")
"""In our gateway's log. Serve tries again and again, and the engines would start for nothing."""

RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
    "RAY_ADDRESS": "local",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
}
HAPROXY = RAY | {"RAY_SERVE_ENABLE_HA_PROXY": "1"} | haproxy.environment()

BASE: dict[str, Any] = {}
"""``args`` that every application of ours has."""


def completion(
    port: int, tokens: int = 64, timeout: float = 120, headers: Mapping[str, str] = NONE,
    model: str = MODEL,
) -> dict[str, Any]:  # fmt: skip
    body = {"model": model, "prompt": "x " * 200, "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body | {"temperature": 0}).encode(),
        {"content-type": "application/json", **headers},
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return dict(json.load(answer))


def ready(port: int) -> dict[str, Any]:
    """Our gateway's GET /ready; empty while there is none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        with contextlib.suppress(ValueError):
            return dict(json.load(error))
    except (OSError, ValueError):
        pass
    return {}


def gpu_memory_mib(kind: str = "used") -> list[int]:
    """Memory of each GPU that this process may use, in MiB: what is ``used``, or the ``total``."""
    query = ["nvidia-smi", f"--query-gpu=memory.{kind}", "--format=csv,noheader,nounits"]
    if mine := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={mine}")
    shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return [int(line) for line in shown.split()]


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` has them."""
    mine = os.environ.get("CUDA_VISIBLE_DEVICES")
    return mine.split(",") if mine else [str(it) for it in range(len(gpu_memory_mib()))]


def until(what: Callable[[], bool], limit_s: float) -> float | None:
    """Seconds until ``what`` holds; None when it does not within the limit."""
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        with contextlib.suppress(OSError, psutil.Error):
            if what():
                return round(time.monotonic() - began, 2)
        time.sleep(0.1)
    return None


class Server:
    """A started server; ``seconds`` until it answered its first request."""

    def __init__(self, command: list[str], port: int, log: Path, **env: str) -> None:
        self.port, self.log, self.env = port, log, env
        self.headers = NONE
        """What requests need to be let in."""

        self.model = MODEL

        self._began = time.monotonic()
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, start_new_session=True, env=os.environ | env,
                preexec_fn=lifeline.interrupt_with_parent,
            )  # fmt: skip

    def wait(self, limit_s: float = 600) -> Server:
        """Until it answers.

        Raises:
            SystemExit: it ended, failed to deploy, or the time is up; the end of its log.
        """
        try:
            while not self.answers():
                broken = ready(self.port).get("models", {}).get(self.model, {})
                if broken.get("status") == "DEPLOY_FAILED":
                    raise SystemExit(f"failed: {broken['message']}\n{self.text()[-6000:]}")
                if len(why := _NO_GATEWAY.findall(self.text())) > 1:
                    raise SystemExit(why[-1])
                if self.process.poll() is not None or time.monotonic() - self._began > limit_s:
                    raise SystemExit(f"no server: {self.text()[-6000:]}")
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise
        self.seconds = round(time.monotonic() - self._began, 1)
        return self

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(completion(self.port, 1, headers=self.headers, model=self.model))
        return False

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def start_report(self) -> dict[str, Any]:
        """The start as the server's own log tells it, in seconds."""
        phases = [[name, int(after)] for name, after in _PHASE.findall(self.text())]
        report: dict[str, Any] = {"first_answer_s": self.seconds}
        if phases:
            report["phases_begin_s"] = phases
        return report | {"log": list(dict.fromkeys(_TOOK.findall(self.text())))}

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Processes of the server with one of these in their command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) != self.process.pid or process.status() == "zombie":
                    continue
                line = " ".join(process.cmdline())
                if not titles or any(title in line for title in titles):
                    found.append(process)
        return found

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(2)


def bare(model: Path, port: int, **engine: Any) -> list[str]:
    """The command of ``vllm serve``."""
    flags = [x for k, v in engine.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model),
        "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), *flags,
    ]  # fmt: skip


def application(name: str, model: Path, engine: dict[str, Any], **args: Any) -> dict[str, Any]:
    """A model's block of a config, with dummy weights."""
    args = {"model": str(model), "engine": {"load_format": "dummy", **engine}, **BASE, **args}
    return {
        "name": name,
        "route_prefix": None,
        "import_path": "serve_app.model:app",
        "args": {"graceful_shutdown_timeout_s": 5, **args},
    }


def serve_run(
    folder: Path, port: int, *models: dict[str, Any], gateways: int = 1, **args: Any
) -> list[str]:
    """The command of ``serve run`` for a config with these models and a gateway with ``args``."""
    gateway = {
        "name": "gateway",
        "route_prefix": "/",
        "import_path": "serve_app.gateway:app",
        "args": {"replicas": gateways, **args},
    }
    return serve_applications(folder, port, [*models, gateway])


def serve_applications(folder: Path, port: int, applications: list[dict[str, Any]]) -> list[str]:
    """The command of ``serve run`` for these blocks of a config."""
    path = folder / f"serve-{port}-{len(list(folder.iterdir()))}.yaml"
    http = {"host": "127.0.0.1", "port": port}
    path.write_text(yaml.safe_dump({"http_options": http, "applications": applications}))
    return [sys.executable, "-m", "ray.serve.scripts", "run", str(path)]


def shaped(model: Path, config: Path, folder: Path, **changes: Any) -> Path:
    """A model's folder with another model's ``config.json`` and this one's tokenizer."""
    shape = folder / f"{config.parent.name}-{len(list(folder.iterdir()))}"
    shutil.copytree(model, shape, copy_function=shutil.copyfile)
    changed = without_weights(json.loads(config.read_text()) | changes)
    (shape / "config.json").write_text(json.dumps(changed))
    return shape

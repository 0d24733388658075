"""The contenders: how each is started, its processes, and its end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks import load, others
from serve_app import lifeline
from serve_app.cluster import haproxy
from serve_app.config import engine_args
from serve_app.config.environment import environment
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.local import orphans

ENGINE: dict[str, Any] = {
    "max_model_len": 2048,
    "max_num_seqs": 128,
    "enforce_eager": True,
    "dtype": "float32",
    # Ray Serve LLM sets this on a CPU and takes no other; so that all engines are the same.
    "distributed_executor_backend": "mp",
}
_START_S = 420


@dataclass(frozen=True)
class Setup:
    """What all arms have in common."""

    model: Path
    work: Path
    engine: dict[str, Any]
    env: dict[str, str]
    front_ends: int = 1
    """Of ours. On a CPU ``auto`` is 1: they would use the cores that the engine needs."""

    upstream: int = 0
    """The port of the server behind a gateway by others."""

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.model_validate(
            {
                "model": str(self.model.resolve()),
                "resources": {"device": "cpu", "num_cpus": 0.5},
                "engine": self.engine,
                "env": self.env,
                "frontends": self.front_ends,
                "graceful_shutdown_timeout_s": 5,
            }
        )

    @property
    def environment(self) -> dict[str, str]:
        """vLLM's environment; the same in all arms."""
        return environment(self.config)


@dataclass(frozen=True)
class Arm:
    """One contender."""

    name: str
    title: str
    command: Callable[[Setup, int], list[str]]
    env: dict[str, str] = field(default_factory=dict)
    profiled: tuple[str, ...] = ()
    """What the titles of the processes that are worth a profile hold."""

    behind: str = ""
    """The arm in front of which it stands; that one is started first."""

    left_out: Callable[[Setup], str] = lambda setup: ""
    """Why it cannot run here, in one sentence; empty where it can."""


def _bare(setup: Setup, port: int) -> list[str]:
    argv = engine_args.to_argv(setup.engine)
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(setup.model.resolve()),
        "--served-model-name", load.MODEL, "--host", "127.0.0.1", "--port", str(port), *argv,
    ]  # fmt: skip


def _bare_n(setup: Setup, port: int) -> list[str]:
    return [*_bare(setup, port), "--api-server-count", str(setup.front_ends)]


def _no_more(setup: Setup) -> str:
    return "ours has one front end here, and bare with one is measured" * (setup.front_ends < 2)


def rust_front_end() -> str:
    """The path of vLLM's Rust front end; empty where this build of vLLM has none."""
    package = importlib.util.find_spec("vllm")
    assert package is not None and package.origin is not None
    named = os.environ.get("VLLM_RUST_FRONTEND_PATH", Path(package.origin).with_name("vllm-rs"))
    return str(named) if os.access(named, os.X_OK) else ""


def no_rust() -> str:
    """Why vLLM's Rust front end cannot run here; empty where it can."""
    if rust_front_end():
        return ""
    return (
        "this build of vLLM has no vllm-rs (its wheel for CPUs has none); "
        "VLLM_RUST_FRONTEND_PATH can name one"
    )


def rust_env() -> dict[str, str]:
    return {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": rust_front_end()}


def no_ray_llm() -> str:
    """Why Ray Serve LLM cannot run here; empty where it can."""
    return (
        "" if importlib.util.find_spec("pyarrow") else "it imports pyarrow, which is not installed"
    )


def _vllm_router(setup: Setup, port: int) -> list[str]:
    return others.vllm_router(port, setup.upstream, free_port())


def _litellm(setup: Setup, port: int) -> list[str]:
    return others.litellm(setup.work, port, setup.upstream, [load.MODEL])


def _serve_run(setup: Setup, port: int, name: str, applications: list[dict[str, Any]]) -> list[str]:
    path = setup.work / f"{name}.yaml"
    http = {"host": "127.0.0.1", "port": port}
    path.write_text(yaml.safe_dump({"http_options": http, "applications": applications}))
    return [str(Path(sys.executable).with_name("serve")), "run", str(path)]


def _ours(setup: Setup, port: int) -> list[str]:
    model = {
        "name": load.MODEL,
        "route_prefix": None,
        "import_path": "serve_app.model:app",
        "args": setup.config.model_dump(exclude_unset=True),
    }
    gateway = {
        "name": "gateway",
        "route_prefix": "/",
        "import_path": "serve_app.gateway:app",
        "args": {"num_cpus": 0.5, "graceful_shutdown_timeout_s": 5},
    }
    return _serve_run(setup, port, "ours", [model, gateway])


def ray_llm(name: str, model: Path, engine: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An application of Ray Serve LLM with one model, for Serve's config file."""
    config = {
        "model_loading_config": {"model_id": name, "model_source": str(model)},
        "engine_kwargs": engine,
        "deployment_config": {"num_replicas": 1},
        **more,
    }
    return {
        "name": "llm",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [config]},
    }


def _ray_llm(setup: Setup, port: int) -> list[str]:
    app = ray_llm(
        load.MODEL, setup.model.resolve(), setup.engine,
        accelerator_config={"kind": "cpu"}, runtime_env={"env_vars": setup.environment},
    )  # fmt: skip
    return _serve_run(setup, port, "ray-llm", [app])


_RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a Ray of its own, on the loopback interface
    "RAY_ADDRESS": "local",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's workers run at nice 15; bare vLLM, with which they are compared, as it was started.
    "RAY_worker_niceness": str(os.nice(0)),
    # Ray Serve LLM reserves more cores than this machine may have; reserving is all it does.
    "RAY_OVERRIDE_RESOURCES": '{"CPU": 16}',
}
_HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # at the end, not under load
}
DIRECT = {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}
"""Ray Serve LLM's path for one model: HAProxy asks the replica itself."""

_OURS = (":Gateway", ":ModelServer")
_LLM = (":OpenAiIngress", ":LLMServer")
_VLLM = ("vllm.entrypoints.cli.main",)

ARMS = {
    arm.name: arm
    for arm in (
        Arm("bare", "bare `vllm serve`", _bare, profiled=_VLLM),
        Arm("vllm-router", "vllm-router, bare behind it", _vllm_router, behind="bare",
            left_out=lambda setup: others.absent("vllm-router", "vllm-router")),
        Arm("litellm", "LiteLLM, bare behind it", _litellm, others.LITELLM_ENV, behind="bare",
            left_out=lambda setup: others.absent("litellm", "litellm")),
        Arm("bare-n", "bare, as many front ends as ours", _bare_n, profiled=_VLLM,
            left_out=_no_more),
        Arm("bare-rust", "bare, its Rust front end", _bare, rust_env(), _VLLM,
            left_out=lambda setup: no_rust()),
        Arm("haproxy", "serve_app, HAProxy", _ours, _RAY | _HAPROXY | haproxy.environment(), _OURS),
        Arm("python", "serve_app, Serve's Python proxy", _ours, _RAY, (*_OURS, "ProxyActor")),
        Arm("rayllm", "Ray Serve LLM, any number of models", _ray_llm, _RAY,
            (*_LLM, "ProxyActor"), left_out=lambda setup: no_ray_llm()),
        Arm("rayllm-haproxy", "the same, HAProxy", _ray_llm, _RAY | _HAPROXY, _LLM,
            left_out=lambda setup: no_ray_llm()),
        Arm("rayllm-direct", "Ray Serve LLM, one model (direct streaming)", _ray_llm,
            _RAY | _HAPROXY | DIRECT, _LLM, left_out=lambda setup: no_ray_llm()),
    )
}  # fmt: skip


class Running:
    """A started arm."""

    def __init__(self, arm: Arm, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.arm = arm
        self.port = port
        self.log = log
        self._process = process
        self._seen: set[psutil.Process] = set()

    def processes(self) -> list[psutil.Process]:
        """All processes of this arm that live."""
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self._process.pid)
            self._seen |= {leader, *leader.children(recursive=True)}
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if os.getsid(process.pid) == self._process.pid:
                    self._seen.add(process)
        self._seen = {p for p in self._seen if p.is_running()}
        return sorted(self._seen, key=lambda p: p.pid)

    def wait_until_it_answers(self) -> float:
        """Seconds since the start.

        Raises:
            UserError: it ended, or took too long; the end of its log.
        """
        began = time.monotonic()
        while time.monotonic() - began < _START_S:
            if self._process.poll() is not None:
                raise UserError(f"{self.arm.name} ended while it started; {self.end_of_log()}")
            if "DEPLOY_FAILED" in self._log_text():
                raise UserError(f"{self.arm.name} failed to deploy; {self.end_of_log()}")
            if load.answers(self.port):
                return time.monotonic() - began
            time.sleep(0.5)
        raise UserError(f"{self.arm.name} did not answer in {_START_S} s; {self.end_of_log()}")

    def _log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def end_of_log(self) -> str:
        return f"{self.log} ends with:\n" + "\n".join(self._log_text().splitlines()[-15:])

    def stop(self) -> None:
        """End it and everything it started."""
        self.processes()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=60)
        deadline = time.monotonic() + 5
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        orphans.end(orphans.orphans())


@contextlib.contextmanager
def started(arm: Arm, setup: Setup) -> Iterator[Running]:
    """The arm, running; gone afterwards, whatever happens."""
    port = free_port()
    log = setup.work / f"{arm.name}.log"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "VLLM_"))}
    env |= setup.environment | arm.env
    with log.open("wb") as output:
        process = subprocess.Popen(
            arm.command(setup, port),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
            preexec_fn=lifeline.interrupt_with_parent,
        )
    running = Running(arm, port, process, log)
    try:
        yield running
    finally:
        running.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def title(process: psutil.Process) -> str:
    """A process's name, short enough for a table."""
    command = process.cmdline()
    first = str(command[0] if command else process.name())
    if first.startswith(("ray::", "VLLM::")):
        return first.split("#")[0]
    line = " ".join(command)
    for part, name in _KNOWN.items():
        if part in line:
            return name
    return Path(first).name


_KNOWN = {
    "vllm.entrypoints.cli.main": "vllm.entrypoints.cli.main",
    "/bin/serve run": "serve run",
    "multiprocessing.resource_tracker": "resource_tracker",
    "multiprocessing.forkserver": "forkserver",
    "haproxy": "haproxy",
    "dashboard/agent.py": "dashboard agent",
    "dashboard/dashboard.py": "dashboard",
    "runtime_env/agent": "runtime_env agent",
    "log_monitor": "log_monitor",
    "monitor.py": "autoscaler monitor",
    "gcs_server": "gcs_server",
    "raylet/raylet": "raylet",
}


def cpu_seconds(running: Running) -> dict[psutil.Process, tuple[str, float]]:
    """CPU seconds that each process has used so far."""
    found = {}
    for process in running.processes():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[process] = (title(process), times.user + times.system)
    return found


def as_json(setup: Setup) -> dict[str, Any]:
    """The common settings, for the record."""
    return {"engine": setup.engine, "environment": setup.environment, "model": _shape(setup.model)}


def _shape(model: Path) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text())
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {k: config[k] for k in keys}

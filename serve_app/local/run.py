"""``serve-app run``: ``serve run`` with a readable start, and no process left at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from serve_app import addresses
from serve_app.addresses import V6_IS_V4
from serve_app.cluster import haproxy
from serve_app.cluster.connection import token
from serve_app.config import keys, notices
from serve_app.config.document import OPERATOR_HASH, RUN_ID, USAGE_DB, Fleet, load
from serve_app.config.settings import usage_url
from serve_app.errors import UserError
from serve_app.local import endpoint as endpoints
from serve_app.local import found, gateway_needs, reasons, runs, serve_process
from serve_app.local import instance as instances
from serve_app.local.door import Door
from serve_app.local.endpoint import Endpoint
from serve_app.local.first_request import how_to_ask
from serve_app.local.instance import Instance
from serve_app.local.named import NamedCluster, named_cluster
from serve_app.local.reload import Watch, reload
from serve_app.local.runs import Run


def run(
    fleet: Fleet,
    console: Console,
    *,
    port: int | None = None,
    verbose: bool = False,
    check: bool = True,
    watch: bool = False,
) -> int:
    """Run the config in the foreground until Ctrl-C; return the exit status.

    It runs on a Ray of its own, unless RAY_ADDRESS names one. ``port`` replaces
    ``http_options.port``. Ray's and vLLM's own output goes to a log file, or to the terminal with
    ``verbose``. With ``watch`` each change of the config's file is applied; with ``check`` only
    what can work.

    Raises:
        UserError: no engine is installed, the port is taken, RAY_ADDRESS names a cluster that is
            silent or serves something, the gateway or no model came up, or ``serve run`` ended by
            itself.
    """
    fleet.require_gateway()
    assert fleet.gateway
    patience_s = min(_DRAIN_S, fleet.gateway.graceful_shutdown_timeout_s)
    if port is not None:
        fleet = fleet.on_port(port)
    cluster = named_cluster()
    if cluster is None and find_spec("vllm") is None:  # a cluster has it on its own machines
        raise UserError(
            "no engine is installed in this environment; install serve-app[gpu], or serve-app[cpu] "
            "on a machine without a GPU (docs/install.md)"
        )
    key, hash = keys.new() if cluster is None else ("", "")
    endpoint = dataclasses.replace(_endpoint(fleet, cluster), key=key)
    for sentence in _notices(fleet, cluster):
        console.print(f"note: {sentence}", soft_wrap=True, markup=False, highlight=False)
    instance = Instance(endpoint.port)
    ours = secrets.token_hex(8) if cluster is None else None
    env = _environment(instance, endpoint, {RUN_ID: ours, OPERATOR_HASH: hash} if ours else {})
    if ours and USAGE_DB not in env and (url := _usage_db(env)):
        env[USAGE_DB] = url
    started = time.monotonic()
    log = None if verbose else instance.log
    stop = _Stop()
    asked = cut = False
    run = _recorded(
        fleet,
        instance,
        endpoint,
        own=cluster is None,
        logs=not verbose,
        port_given=port is not None,
    )
    door = _door(run) if cluster is None else None
    serve = serve_process.start(fleet, instance, env, log)
    try:
        if log:
            console.print(f"starting {len(fleet.models)} models; full log: {log}", highlight=False)
        ready = _wait_until_ready(fleet, run, ours, serve, stop, console, started)
        if serve.poll() is not None and not stop.asked and reasons.was_slow(log):
            console.print("Ray did not start in its 30 s; starting it once more")
            serve_process.end(serve, console)
            serve = serve_process.start(fleet, instance, env, log)
            ready = _wait_until_ready(fleet, run, ours, serve, stop, console, started)
        if ready:
            told = how_to_ask(fleet, endpoint)  # never wrapped, so that it can be copied
            console.print(told, soft_wrap=True, markup=False, highlight=False)
        changes = Watch(fleet.path) if watch else None
        while serve.poll() is None and not stop.asked:
            time.sleep(0.2)
            if changes and changes.changed():
                _reload(run, port, console, lambda: stop.asked or serve.poll() is not None, check)
        asked = stop.asked
        if not asked:
            raise UserError(reasons.why_it_ended(serve.returncode, log))
        cut = not _let_end(endpoint, patience_s, serve, stop, console)
        return 0
    finally:
        own = cluster is None  # on another's Ray what it deployed is to be ended, too
        serve_process.end(
            serve,
            console,
            patience_s=_CUT_S if cut and own else _END_S,
            at_once=lambda: own and stop.again,
        )
        if door:
            door.close()
        instance.close(keep=not asked)


def _recorded(
    fleet: Fleet,
    instance: Instance,
    endpoint: Endpoint,
    *,
    own: bool,
    logs: bool,
    port_given: bool,
) -> Run:
    """What the other commands find this run by."""
    run = Run(
        folder=instance.folder,
        pid=os.getpid(),
        born=runs.birth(os.getpid()) or 0,
        host=endpoint.bound,
        ray_address=None if own else os.environ["RAY_ADDRESS"].strip(),
        config=fleet.path.resolve() if fleet.path.is_file() else None,
        working_folder=Path.cwd(),
        logs=logs,
        port_given=port_given,
        key=endpoint.key,
    )
    runs.record(run)
    return run


def _door(run: Run) -> Door | None:
    """Let ``serve status`` in at Ray's usual port; None where another process has that."""

    def dashboard() -> tuple[str, int, str]:
        connection = found.of(run).reached()
        split = urlsplit(connection.dashboard())
        return str(split.hostname), int(split.port or 80), token() or ""

    with contextlib.suppress(OSError):
        return Door(functools.cache(dashboard))
    return None


def _reload(
    run: Run, port: int | None, console: Console, stopped: Callable[[], bool], check: bool
) -> None:
    """Apply the run's changed config; a mistake in it is told, and changes nothing."""
    assert run.config is not None

    def tell(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    tell(f"{run.config.name} has changed")
    try:
        fleet = load(run.config)
        fleet = fleet if port is None else fleet.on_port(port)
        reload(fleet, found.of(run), tell=tell, check=check, stopped=stopped)
    except UserError as error:
        tell(f"nothing was changed: {error}")


def _endpoint(fleet: Fleet, cluster: NamedCluster | None) -> Endpoint:
    """The address at which the server will answer.

    Raises:
        UserError: another server answers there already.
    """
    endpoint = Endpoint.of(fleet)
    if fleet.host == "::" and haproxy.in_front():
        raise UserError(f"http_options.host is {V6_IS_V4}")
    if cluster is not None and cluster.http_options:
        # A running Serve keeps the options that it started with.
        endpoint = Endpoint(cluster.http_options["host"], cluster.http_options["port"])
    elif cluster is None or addresses.is_here(cluster.host):
        _refuse_own(endpoint.port)
        endpoint.refuse_if_taken()
    if cluster is not None and not addresses.is_here(cluster.host):
        if endpoint.host in ("localhost", "127.0.0.1", "::1") and endpoint.host == endpoint.bound:
            raise UserError(
                f"http_options.host is {endpoint.bound}, where the cluster at {cluster.host} "
                "answers nobody else; set 0.0.0.0"
            )
        endpoint = dataclasses.replace(endpoint, bound=cluster.host)
    return endpoint


def _refuse_own(port: int) -> None:
    """Say of a port that is taken by another run of this user how that is changed."""
    if any(other.port == port for other in runs.running(instances.bases())):
        raise UserError(
            f"port {port} is another serve-app run's; choose another with --port, or change that "
            f"one: serve-app reload CONFIG --port {port}"
        )


def _notices(fleet: Fleet, cluster: NamedCluster | None) -> list[str]:
    running = cluster.http_options if cluster else None
    ignored = [] if running is None else notices.ignored_by_running_serve(fleet, running)
    of_keys = [*gateway_needs.open_to_all(fleet), *gateway_needs.odd_keys(fleet, os.environ)]
    return [*of_keys, *notices.notices(fleet), *ignored]


def _environment(instance: Instance, endpoint: Endpoint, ours: dict[str, str]) -> dict[str, str]:
    """``ours`` is for a Ray of our own, and empty for a named one."""
    proxy = endpoints.without_proxy(endpoint.host)
    if not ours:
        return os.environ | proxy
    return haproxy.environment() | instance.environment() | proxy | ours


def _usage_db(env: Mapping[str, str]) -> str | None:
    """This user's file for the usage of all runs; None where it cannot be had."""
    try:
        state = env.get("XDG_STATE_HOME") or f"{env.get('HOME') or Path.home()}/.local/state"
        folder = Path(state) / "serve_app"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # it may be root's, of a run with sudo
        return usage_url(f"sqlite:///{folder}/usage.db")
    except (OSError, RuntimeError, ValueError):
        return None


_SILENT_S = 15.0
"""Seconds of a silent gateway after which Serve is asked whether it has failed."""


class Terminal(Console):
    """Standard output. The server goes on when nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        """Called by rich on a broken pipe; rich's own version ends the process."""
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, but a terminal that is gone (EIO) does not end the process."""
        with contextlib.suppress(OSError):
            super().print(*objects, **options)


class _Stop:
    """Notes Ctrl-C, SIGTERM or a closed terminal, and a second one of them.

    A shell passes the end of its terminal on to what was told of it already, and other wrappers do
    so with Ctrl-C: that is not a second one.
    """

    def __init__(self) -> None:
        self.asked = self.again = False
        self._asked_at = 0.0
        signal.signal(signal.SIGINT, self._note)
        signal.signal(signal.SIGTERM, self._note)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._asked_at = True, now
        elif now > self._asked_at + _SAME_S:
            self.again = True


_SAME_S = 1.0
"""Seconds within which two signals are one."""

_DRAIN_S = 30.0
"""Seconds at most that running requests get to end."""

_END_S = 60.0
"""Seconds that ``serve run`` gets to end by itself."""

_CUT_S = 5.0
"""The same where requests run on, whose clients Serve has left: it would wait 30 s for them."""


def _let_end(
    endpoint: Endpoint,
    patience_s: float,
    serve: subprocess.Popen[bytes],
    stop: _Stop,
    console: Console,
) -> bool:
    """Wait for the requests that are running; whether all have ended.

    Serve's own shutdown ends its proxies first, and with them each client's connection.
    """
    running = endpoint.running() if patience_s else 0
    if not running:
        return True
    what = "1 request is" if running == 1 else f"{running} requests are"
    console.print(
        f"{what} running and may take {patience_s:g} s to end; Ctrl-C again ends all now",
        highlight=False,
    )
    deadline = time.monotonic() + patience_s
    while running and serve.poll() is None and not stop.again and time.monotonic() < deadline:
        time.sleep(0.5)
        running = endpoint.running()
    return not running


def _wait_until_ready(
    fleet: Fleet,
    run: Run,
    ours: str | None,
    serve: subprocess.Popen[bytes],
    stop: _Stop,
    console: Console,
    started: float,
) -> bool:
    """Report each model when it is up; True when all are, False when asked to stop.

    Raises:
        UserError: the gateway, or no model, came up.
    """
    told: set[str] = set()
    ask_serve = time.monotonic() + _SILENT_S
    with console.status("starting Ray") as status:
        while serve.poll() is None and not stop.asked:
            report = run.endpoint.ready(ours)
            if report is None and time.monotonic() > ask_serve:
                if why := found.failed_gateway(found.of(run)):
                    raise UserError(f"the gateway failed: {why}")
                ask_serve = time.monotonic() + _SILENT_S
            report = report or {"models": {}, "waiting_for": []}
            waiting = [n for n in fleet.models if n not in told]
            if report["models"]:
                status.update("; ".join(_doing(n, report["models"].get(n, {})) for n in waiting))
            for name, model in report["models"].items():
                seconds = time.monotonic() - started
                if name in told or name not in fleet.models:
                    continue
                if model["status"] == "DEPLOY_FAILED":
                    told.add(name)
                    console.print(f"[red]{name} failed[/]: {model['message']}", highlight=False)
                elif name not in report["waiting_for"]:
                    told.add(name)
                    console.print(f"[green]{name} is ready[/] ({seconds:.0f} s)", highlight=False)
            if not report["models"] and report.get("status") == "ready":
                return True  # a cluster with API keys, of which this command has none
            if told >= fleet.models.keys():
                if len(report["waiting_for"]) == len(fleet.models):
                    raise UserError("no model came up; see the reasons above")
                return True
            time.sleep(0.5)
    return False


def _doing(name: str, model: dict[str, Any]) -> str:
    """The phase of the replica that started last."""
    starting = model.get("starting") or [{"phase": "loading"}]
    return f"{name}: {starting[-1]['phase']}"

"""Starts the process ``serve run``, and ends it with everything that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from rich.console import Console

from serve_app import lifeline
from serve_app.config.document import RUN_ID, Fleet
from serve_app.local import orphans
from serve_app.local.instance import Instance


def start(
    fleet: Fleet, instance: Instance, env: dict[str, str], log: Path | None
) -> subprocess.Popen[bytes]:
    """Start ``serve run`` with this config and environment; its output goes to ``log``, if any."""
    # A copy of the config, because --port changes it.
    config = instance.folder / "config.yaml"
    config.touch(mode=0o600)  # models' env may hold secrets
    config.write_text(yaml.safe_dump(fleet.document, sort_keys=False))
    command = [*instance.serve(), "run", str(config)]
    if RUN_ID in env:
        # Never another Ray on this machine: `serve run` would replace the applications there.
        command += ["--address", "local"]
        env.pop("RAY_ADDRESS", None)
    output = log.open("wb") if log else None
    try:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            stdin=subprocess.DEVNULL,
            env=env,
            # Ctrl-C in the terminal reaches this process only, which passes it on once.
            start_new_session=True,
            preexec_fn=lifeline.interrupt_with_parent,
        )
    finally:
        if output:
            output.close()


def end(
    serve: subprocess.Popen[bytes],
    console: Console,
    *,
    patience_s: float = 60.0,
    at_once: Callable[[], bool] = lambda: False,
) -> None:
    """Pass Ctrl-C on, and kill all that ``serve run`` started and is still there later.

    ``at_once`` ends the patience.
    """
    if serve.poll() is None:
        console.print("stopping")
        serve.send_signal(signal.SIGINT)
        deadline = time.monotonic() + patience_s
        while serve.poll() is None and time.monotonic() < deadline and not at_once():
            time.sleep(0.1)
        if serve.poll() is None:
            serve.kill()
            serve.wait()
    # Ray's processes may need a moment to notice that their driver is gone.
    deadline = time.monotonic() + 5.0
    while _in_session(serve.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in _in_session(serve.pid):
        orphans.send_signal(pid, signal.SIGKILL)
    orphans.end(orphans.orphans())


def _in_session(session: int) -> list[int]:
    """Pids in the session of `serve run`: all that it started and is still there."""
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

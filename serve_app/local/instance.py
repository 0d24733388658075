"""A folder and ports of its own for each ``serve-app run`` on a machine.

By default Ray puts everything under ``/tmp/ray`` and HAProxy's files into ``/tmp/haproxy-serve``. A
second instance, or a second user, would collide with the files of the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shlex
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from serve_app.config import environment
from serve_app.errors import UserError
from serve_app.local import runs

LONGEST = min(
    # Ray's longest socket path is that of a part of its dashboard.
    107 - len("/ray/session_2026-11-26_06-11-12_123456_4194304/sockets/dash_MetricsHead"),
    # HAProxy binds a temporary name, 10 letters longer; Serve prefixes the node's id.
    107 - 10 - len(f"/{56 * 'f'}/metrics.sock"),
)
"""Most characters of the folder's path. Unix sockets are made in it, and Linux allows 107 for a
socket's path (unix(7))."""

_SHORT = ("/tmp", "/var/tmp", "/dev/shm")

_KEEP_S = 7 * 86_400.0
"""Seconds for which the folder of an ended run is kept, with its logs."""


class Instance:
    """This run's folder, locked while the run lives, and the environment of its Ray.

    ``folder`` is named by the port. It has ``serve.log``, Ray's sessions and HAProxy's files.

    Raises:
        UserError: another run has this port, or no folder with a short enough path can be written.
    """

    def __init__(self, port: int) -> None:
        self._base = _base()
        _forget_old(self._base)
        self.folder = self._base / str(port)
        self.folder.mkdir(exist_ok=True)
        lock = _lock(self.folder)
        if lock is None:  # the other run may be about to listen
            raise UserError(f"port {port} is another serve-app run's; choose another with --port")
        self._lock = lock
        _empty(self.folder, but=("lock",))
        self.log = self.folder / "serve.log"

    def environment(self) -> dict[str, str]:
        """This process's environment, with changes for a Ray of this run's own."""
        defaults = {
            # This Ray stays on the loopback interface.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Ray's default, nice 15, starves its workers beside other processes.
            "RAY_worker_niceness": "0",
            # Serve gives a proxy three times 5 s to come up, and then ends `serve run`. On a slow
            # or busy machine the imports of HAProxy's manager alone take longer.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            **environment.front(),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
            # vLLM leaves a socket of each of its processes, and here they go with the folder.
            "VLLM_RPC_BASE_PATH": str(self.folder / "sockets"),
        }
        (self.folder / "sockets").mkdir(exist_ok=True)
        apart = {
            "RAY_TMPDIR": str(self.folder),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(self.folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(self.folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(self.folder / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(self.folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(self.folder / "server-state"),
        }
        return defaults | os.environ | apart | self._short_temporary_folder() | _home(self._base)

    def serve(self) -> list[str]:
        """The command ``serve`` of this Python.

        Ray 2.60 puts the interpreter's path unquoted into a shell command
        (``ray/_private/runtime_env/context.py``). A path with a space is replaced by a link.
        """
        python = Path(sys.executable)
        if shlex.quote(str(python)) != str(python):
            link = self.folder / "python"
            if not link.is_symlink():
                link.symlink_to(sys.prefix)
            python = link / python.relative_to(sys.prefix)
        return [str(python), "-m", "ray.serve.scripts"]

    def _short_temporary_folder(self) -> dict[str, str]:
        """TMPDIR: multiprocessing makes sockets in it, with names of up to 40 letters."""
        usual = _temporary_folder()
        if usual and len(usual) <= 107 - 40:
            return {}
        (self.folder / "tmp").mkdir(exist_ok=True)
        return {"TMPDIR": str(self.folder / "tmp")}

    def close(self, *, keep: bool) -> None:
        """Release the folder; without ``keep`` all but the log is deleted."""
        runs.forget(self.folder)
        (self.folder / "config.yaml").unlink(missing_ok=True)  # models' env may hold secrets
        if not keep:
            _empty(self.folder, but=("lock", self.log.name))
        os.close(self._lock)


def _empty(folder: Path, *, but: tuple[str, ...]) -> None:
    for old in folder.iterdir():
        if old.name in but:
            continue
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink()


def bases() -> Iterator[Path]:
    """The folders in which this user's runs may be, there or not."""
    name = f"sa-{os.getuid()}"  # up to ten digits
    for parent in filter(None, (os.environ.get("RAY_TMPDIR"), _temporary_folder(), *_SHORT)):
        yield Path(parent) / name


def _base() -> Path:
    """This user's folder for all runs, with a path short enough for sockets."""
    for base in bases():
        # Ray puts paths unquoted into shell commands.
        if len(str(base / "65535")) > LONGEST or shlex.quote(str(base)) != str(base):
            continue
        with contextlib.suppress(OSError):
            base.mkdir(mode=0o700, exist_ok=True)
            there = base.lstat()
            # Not a folder that another user made under this name.
            if stat.S_ISDIR(there.st_mode) and there.st_uid == os.getuid():
                base.chmod(0o700)
                tempfile.TemporaryFile(dir=base).close()
                return base
    raise UserError(
        f"there is no folder for this run's sockets and logs: of TMPDIR, {', '.join(_SHORT)} none "
        f"can be written under a path of at most {LONGEST} characters; set TMPDIR to one that can"
    )


def _temporary_folder() -> str | None:
    try:
        return tempfile.gettempdir()
    except OSError:  # no temporary folder is writable
        return None


def _lock(folder: Path) -> int | None:
    """Lock the folder for this process's life, however it ends; None if another process has it."""
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _forget_old(base: Path) -> None:
    for folder in base.iterdir():
        file = folder / "lock"
        if file.exists() and time.time() - folder.stat().st_mtime > _KEEP_S:
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _home(base: Path) -> dict[str, str]:
    """A substitute for a home that is not writable: Ray keeps its token there, vLLM its caches.

    The Hugging Face cache of the real home stays in use.
    """
    env = {}
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:  # a container's arbitrary user id: getpass and others need a name
        env = {"USER": f"uid-{os.getuid()}", "LOGNAME": f"uid-{os.getuid()}"}
    home = Path(os.environ.get("HOME", ""))
    try:
        home = home if home.is_absolute() else Path.home()
        tempfile.TemporaryFile(dir=home).close()
        return env
    except (OSError, RuntimeError):  # read-only, or the user has none
        pass
    instead = base / "home"
    instead.mkdir(exist_ok=True)
    env["HOME"] = str(instead)
    hub = home / ".cache/huggingface"
    if hub.is_dir() and "HF_HOME" not in os.environ:
        env["HF_HOME"] = str(hub)
    return env


def _free_port() -> int:
    """A free port. The usual ones, 9101 and 8404, may be another instance's that is starting."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

"""A real PostgreSQL of the test's own, that can be stopped and killed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from harness.processes import free_port

_DEBIAN = Path("/usr/lib/postgresql")


def programs() -> Path | None:
    """The folder of its programs: as Debian's package ``postgresql`` has it, or on the PATH."""
    newest = sorted(_DEBIAN.glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    found = newest[-1] if newest else shutil.which("postgres")
    return Path(found).resolve().parent if found else None


class Postgres:
    """Its address is :attr:`url`; any user of this machine may connect, by loopback."""

    def __init__(self) -> None:
        found = programs()
        assert found, "ask programs() before"
        self._programs = found
        # Root may run none. A short path: a socket is made in it.
        self._user = "nobody" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
        self._folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        if os.getuid() == 0:
            shutil.chown(self._folder, self._user)
        self._port = free_port()
        self.url = f"postgresql://tester:pass%2Fword@127.0.0.1:{self._port}/postgres"

    def __enter__(self) -> Self:
        password = self._folder / "password"
        password.write_text("pass/word")
        password.chmod(0o644)
        self._run(
            "initdb", "--username=tester", f"--pwfile={password}", "--auth=scram-sha-256",
            "--no-sync", "--encoding=UTF8", "--locale=C",
        )  # fmt: skip
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop("immediate")
        shutil.rmtree(self._folder)

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -p {self._port} -k {self._folder} -c fsync=off"
        log = self._folder / "log"
        self._run("pg_ctl", "start", "--wait", "--silent", f"--log={log}", f"--options={options}")

    def stop(self, mode: str = "fast") -> None:
        """Stop it: ``fast`` breaks off its connections, ``immediate`` is as if it were killed."""
        if (self._folder / "data/postmaster.pid").exists():
            self._run("pg_ctl", "stop", "--wait", "--silent", f"--mode={mode}")

    def _run(self, name: str, *arguments: str) -> None:
        subprocess.run(
            [self._programs / name, f"--pgdata={self._folder / 'data'}", *arguments],
            user=self._user if os.getuid() == 0 else None,
            cwd=self._folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )

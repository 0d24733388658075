"""The ``serve-app run``s of this user on this machine: each leaves a record in its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from serve_app.local.endpoint import Endpoint

_RECORD = "run.json"


@dataclass(frozen=True)
class Run:
    """A ``serve-app run`` that is running."""

    folder: Path
    """Its folder (:class:`serve_app.local.instance.Instance`), named by its port."""

    pid: int
    born: int
    """When its process started, in clock ticks since the boot: a pid alone may be used again."""

    host: str
    """The address that its endpoint is bound to."""

    ray_address: str | None
    """The Ray that it was told to use (RAY_ADDRESS); None where it has one of its own."""

    config: Path | None
    """The file that it was started with; None where there was none (``serve-app run MODEL``)."""

    working_folder: Path
    """Where it was started: the config's relative paths are relative to it."""

    logs: bool
    """Whether Ray's and vLLM's output goes to ``serve.log``; with ``--verbose`` it does not."""

    port_given: bool = False
    """Whether ``--port`` took the place of the config's own port."""

    key: str = field(default="", repr=False)
    """The API key of its operator, where its gateway asks for one."""

    @property
    def port(self) -> int:
        return int(self.folder.name)

    @property
    def log(self) -> Path:
        return self.folder / "serve.log"

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.host, self.port, self.key)

    @property
    def gcs(self) -> str | None:
        """The address of its Ray's GCS; None before that has started."""
        if self.ray_address:
            return self.ray_address
        for file in (self.folder / "ray" / "session_latest").glob("gcs_server_port_*"):
            if port := file.read_text().strip():
                return f"127.0.0.1:{port}"
        return None

    def environment(self) -> dict[str, str]:
        """The variables that it was started with, which its gateway has too."""
        try:
            entries = Path(f"/proc/{self.pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            return {}
        pairs = (os.fsdecode(entry).partition("=") for entry in entries if entry)
        return {name: value for name, _, value in pairs}

    def lives(self) -> bool:
        return self.born == birth(self.pid)


def record(run: Run) -> None:
    """Let other processes of this user find a run."""
    fields = asdict(run) | {"folder": str(run.folder), "working_folder": str(run.working_folder)}
    fields["config"] = str(run.config) if run.config else None
    beside = run.folder / f"{_RECORD}.new"
    beside.write_text(json.dumps(fields))
    beside.replace(run.folder / _RECORD)


def forget(folder: Path) -> None:
    (folder / _RECORD).unlink(missing_ok=True)


def running(bases: Iterable[Path]) -> list[Run]:
    """The runs under these folders whose process lives, by port."""
    found = {}
    for base in bases:
        for file in base.glob(f"*/{_RECORD}"):
            try:
                fields = json.loads(file.read_bytes())
                config = fields.pop("config")
                run = Run(
                    **fields
                    | {
                        "folder": file.parent,
                        "working_folder": Path(fields["working_folder"]),
                        "config": Path(config) if config else None,
                    }
                )
            except (OSError, ValueError, TypeError, KeyError):
                continue  # gone meanwhile, or of another version
            if run.lives():
                found[run.folder] = run
    return sorted(found.values(), key=lambda run: run.port)


def birth(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])

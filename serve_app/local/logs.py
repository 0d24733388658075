"""``serve-app logs`` of a ``serve-app run`` on this machine."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

import yaml

from serve_app.errors import UserError, did_you_mean
from serve_app.local.runs import Run

_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_POLL_S = 0.3


def lines(run: Run, model: str | None, *, tail: int, follow: bool) -> Iterator[str]:
    """The last ``tail`` lines of the run's log, or those of one application; then, with
    ``follow``, each new one until the run ends.

    Raises:
        UserError: there is no such application, or no log.
    """
    if not run.logs:
        raise UserError("it was started with --verbose: its log is in that terminal")
    if model is not None and model not in (names := applications(run)):
        hint = did_you_mean(model, names) or f" (there are: {', '.join(names)})"
        raise UserError(f"there is no model '{model}'{hint}")
    return read(run.log, model, tail=tail, goes_on=run.lives if follow else lambda: False)


def newest(bases: Iterable[Path]) -> Path | None:
    """The log that was written last, of runs that have ended."""
    found = [log for base in bases for log in base.glob("*/serve.log")]
    return max(found, key=lambda log: log.stat().st_mtime, default=None)


def applications(run: Run) -> list[str]:
    """The names in the config that the run was started with."""
    try:
        document = yaml.safe_load((run.folder / "config.yaml").read_text())
    except OSError:
        return []
    return [str(application["name"]) for application in document["applications"]]


def read(
    log: Path, model: str | None, *, tail: int, goes_on: Callable[[], bool] = lambda: False
) -> Iterator[str]:
    """The last lines of a log, without colors; then new ones while ``goes_on`` says so."""
    # Ray writes before each line from which process it is: (ServeReplica:name:deployment pid=…).
    mark = f"(ServeReplica:{model}:" if model else ""
    try:
        file = log.open(errors="replace")
    except OSError as error:
        raise UserError(f"{log} cannot be read ({error.strerror})") from None
    with file:
        yield from deque(_of(file, mark), maxlen=tail)
        alive = True
        while alive:
            alive = goes_on()  # asked first: what came before its end is read below
            yield from _of(file, mark)
            if alive:
                time.sleep(_POLL_S)


def _of(file: TextIO, mark: str) -> Iterator[str]:
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith("\n"):  # the end, or a line that is being written
            file.seek(start)
            return
        plain = _COLOR.sub("", line.rstrip("\n"))
        if plain.startswith(mark):
            yield plain

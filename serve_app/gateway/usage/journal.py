"""Lines on a disk, written as requests end: each process has files of its own in a shared folder.

A line is handed to the kernel at once, so a killed process loses none (a machine that loses its
power may lose the last seconds). A file is locked while its writer lives. So whoever gets the lock
of a file knows that nothing more is written to it, whether its writer has closed it or is dead.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SUFFIX = ".jsonl"

_NEW = ".new"
_MADE_S = 60.0
"""Seconds after which a file without a name is that of a process that was killed as it made it."""


class Journal:
    """Appends lines to a file, and to the next one once that is full or old. Any thread may."""

    def __init__(self, folder: Path, *, max_file_bytes: int, max_file_age_s: float) -> None:
        """Raises OSError where the folder cannot be made."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self._max_bytes = max_file_bytes
        self._max_age_s = max_file_age_s
        self._lock = threading.Lock()
        # Not only the process's number: a container that starts again has the same, and a name that
        # is taken would replace a file which nobody has read.
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._number = itertools.count()
        self._file: int | None = None
        self._size = 0
        self._opened = 0.0

    def append(self, line: bytes) -> None:
        """Write a line, which ends with a line break.

        Raises:
            OSError: it is not in the file; the disk may be full.
        """
        with self._lock:
            if self._file is None or self._is_over():
                self._close()
                self._file = self._open()
            try:
                written = os.write(self._file, line)
            except OSError:
                self._close()
                raise
            self._size += written
            if written < len(line):  # the rest of it cannot be read as a line, nor what follows
                self._close()
                raise OSError(f"{self.folder}: {written} of {len(line)} bytes were written")

    def close(self) -> None:
        """Close the file, if any. A further line goes to a new one."""
        with self._lock:
            self._close()

    def sync(self) -> None:
        """Wait until the file is on the disk itself."""
        with self._lock:
            file = None if self._file is None else os.dup(self._file)
        if file is not None:
            try:
                os.fdatasync(file)
            finally:
                os.close(file)

    def _is_over(self) -> bool:
        return self._size >= self._max_bytes or time.monotonic() - self._opened >= self._max_age_s

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        name = f"{stamp}-{self._name}-{next(self._number)}{SUFFIX}"
        # It gets its name when it is locked: nobody may take it for one of a dead process.
        made = self.folder / f".{name}{_NEW}"
        file = os.open(made, os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_WRONLY, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            made.rename(self.folder / name)
        except OSError:
            os.close(file)
            raise
        self._size, self._opened = 0, time.monotonic()
        return file


class Closed:
    """A file to which nothing more is written, locked for the one who reads it."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self._file = file

    def lines(self) -> list[bytes]:
        """Its lines. What follows the last line break was cut off as its writer was killed."""
        with open(self._file, "rb", closefd=False) as file:
            return file.read().split(b"\n")[:-1]

    def remove(self) -> None:
        self.path.unlink()

    def set_aside(self) -> Path:
        """Rename it, so that it is not found again; return the new name."""
        return self.path.rename(self.path.with_suffix(".unread"))


def closed(folder: Path) -> Iterator[Closed]:
    """Each file of the folder that has no writer and no other reader, the oldest first.

    Those that never got a name, and so nothing in them, are removed.
    """
    for path in folder.glob(f".*{SUFFIX}{_NEW}"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _MADE_S:
                path.unlink()
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            if _lock(file) and os.fstat(file).st_nlink:  # else another has read and removed it
                yield Closed(path, file)
        finally:
            os.close(file)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def size(folder: Path) -> int:
    """Bytes of all its files."""
    total = 0
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total

"""`serve-app fetch MODEL…`: models of the Hugging Face hub onto this disk, whole and checked.

The hub's own `snapshot_download` deletes a half file when it ends early. Weights come in files of
gigabytes, so each file here grows in `.downloads/<model>@<commit>/` and goes on where it ended,
also in another run.
"""

from __future__ import annotations

import hashlib
import queue
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.filesize import decimal

from serve_app.config.names import repo_of, short_name
from serve_app.errors import UserError
from serve_app.fetch.folders import exclusive, install, is_complete, progress_on, say, seal
from serve_app.fetch.sources import Meter, SourceError, first_line, quiet_hub, sha256_of

_AT_ONCE = 4
"""Files downloaded side by side."""

_HUB_S = 10.0
"""Seconds that the hub gets to list a model's files."""

_POLL_S = 0.2

# What an engine loads, and the folders and second copies that it does not. `*` also matches "/".
_WANTED = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.py", "tokenizer*")
_UNWANTED = ("onnx/*", "openvino/*", "runs/*", "original/*", "consolidated*", "*training_args*")
_WEIGHTS = ("*.safetensors", "*.bin")
"""In the order of preference: a model that has the first needs no other."""


@dataclass(frozen=True)
class _File:
    """A file of the hub. One of the two checksums is there: of large files the first."""

    name: str
    size: int
    sha256: str | None
    git_sha1: str | None

    def check(self, path: Path) -> str | None:
        """The file's sha256 if it was computed.

        Raises:
            SourceError: the contents are not what the hub states.
        """
        found = sha256_of(path) if self.sha256 else None
        wrong = found != self.sha256
        if not self.sha256 and self.git_sha1:
            contents = path.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(contents) + contents, usedforsecurity=False)
            wrong = git.hexdigest() != self.git_sha1
        if wrong:
            path.unlink()
            raise SourceError(
                f"{self.name} does not have the checksum that the hub states, and was deleted; run "
                "the command again"
            )
        return found


def fetch_models(repos: Sequence[str], root: Path, *, console: Console) -> list[Path]:
    """Make sure that models of the hub are complete under `root`, and return their folders.

    A model that is complete is not asked for again. HF_TOKEN and HF_ENDPOINT count as elsewhere.

    Args:
        repos: hub ids.
        root: the folder that holds the model folders; created if need be.
        console: gets a progress bar while there is work, and one line for each model.

    Raises:
        UserError: the hub does not have a model, cannot be reached, states another checksum, or
            `root` cannot be written or has no room. What came stays for the next run.
    """
    for repo in repos:
        if repo.count("/") > 1 or repo.startswith((".", "/", "~")):
            raise UserError(f"{repo} is no hub id (organisation/name)")
    folders = []
    for repo in repos:
        folder = _folder_for(repo, root)
        if is_complete(folder):
            say(console, f"{folder} is complete")
        else:
            try:
                with exclusive(root, console) as downloads:
                    if not is_complete(folder):  # another run may just have finished it
                        _fetch(repo, folder, downloads, console)
            except OSError as error:
                problem = error.strerror or error
                raise UserError(f"{folder} cannot be written: {problem}") from error
        folders.append(folder)
    return folders


def _folder_for(repo: str, root: Path) -> Path:
    """The model's folder: its short name, unless another model of the hub has that already."""
    taken: set[str] = set()
    while True:
        folder = root / short_name(repo, taken)
        if repo_of(folder) in (None, repo):
            return folder
        taken.add(folder.name)


def _fetch(repo: str, folder: Path, downloads: Path, console: Console) -> None:
    with quiet_hub(), progress_on(console) as progress:
        task = progress.add_task(f"{folder.name}: asking the hub", total=None)

        def meter(what: str, done: int, total: int) -> None:
            label = f"{folder.name}: {what}"
            progress.update(task, description=label, completed=done, total=total)

        commit, files = _listing(repo)
        build = downloads / f"{folder.name}@{commit[:12]}"
        for stale in downloads.glob(f"{escape(folder.name)}@*"):
            if stale != build:
                shutil.rmtree(stale)
        build.mkdir(exist_ok=True)
        _refuse_full_disk(build, files)
        try:
            known = _download(repo, commit, files, build, meter)
        except SourceError as error:
            raise UserError(f"{repo}: {error}") from None
        source = f"the Hugging Face hub, {repo} at {commit[:12]}"
        size = seal(build, source, repo, meter, known)
        work = downloads / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        install(build, folder, work, console)
        shutil.rmtree(work)
    say(console, f"{folder}: {decimal(size)} from {source}")


def _listing(repo: str) -> tuple[str, list[_File]]:
    """The model's newest commit, and its files that an engine loads.

    Raises:
        UserError: in one sentence, with what to do.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, files_metadata=True, timeout=_HUB_S)
    except Exception as error:  # the client raises errors of many libraries
        raise UserError(f"{repo}: {_why(error)}") from None
    found = [
        _File(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in info.siblings or []
        if not _matches(s.rfilename, _UNWANTED) and ".." not in PurePosixPath(s.rfilename).parts
    ]
    weights = next(
        (kind for kind in _WEIGHTS if any(fnmatch(file.name, kind) for file in found)), None
    )
    if weights is None:
        raise UserError(
            f"{repo}: the hub has no weights of it that an engine loads "
            f"({', '.join(_WEIGHTS)}); name a repository that has"
        )
    return info.sha or "main", [file for file in found if _matches(file.name, (weights, *_WANTED))]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _why(error: Exception) -> str:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return "it is gated; accept its terms on the hub and set HF_TOKEN"
    if kind in ("RepositoryNotFoundError", "HFValidationError"):
        return "the hub has no such model, or a private one (then set HF_TOKEN); correct it"
    if kind == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set; unset it"
    return (
        f"the hub cannot be reached ({first_line(error)}); set HF_ENDPOINT to one that can, or "
        "copy the model's folder from a machine that has it"
    )


def _refuse_full_disk(build: Path, files: list[_File]) -> None:
    have = sum(path.stat().st_size for path in build.rglob("*") if path.is_file())
    missing = sum(file.size for file in files) - have
    free = shutil.disk_usage(build).free
    if missing > free:
        raise UserError(
            f"{decimal(missing)} are still to come, but {build.parent} has room for "
            f"{decimal(free)}; free some, or choose another disk with --into"
        )


def _download(
    repo: str, commit: str, files: list[_File], build: Path, meter: Meter
) -> dict[str, str]:
    """Have every file in `build`, whole; return the sha256 of those that were hashed.

    Raises:
        SourceError: the connection broke for good, or a checksum is wrong.
    """
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()  # they would be many; the meter has one
    total = sum(file.size for file in files)
    jobs: queue.SimpleQueue[_File] = queue.SimpleQueue()
    for file in files:
        jobs.put(file)
    known: dict[str, str] = {}
    errors: list[Exception] = []

    def work() -> None:
        with suppress(queue.Empty):
            while not errors:
                file = jobs.get_nowait()
                try:
                    if sha256 := _download_one(repo, commit, file, build / file.name):
                        known[file.name] = sha256
                except Exception as error:
                    errors.append(error)

    # Daemons, because Ctrl-C shall not wait for them; what came by then stays.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(_AT_ONCE)]
    for thread in threads:
        thread.start()
    while not errors and (alive := [thread for thread in threads if thread.is_alive()]):
        alive[0].join(_POLL_S)
        meter("downloading", _bytes_in(build), total)
    if errors:
        raise errors[0]
    return known


def _bytes_in(build: Path) -> int:
    total = 0
    for path in build.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # just renamed
            continue
    return total


def _download_one(repo: str, commit: str, file: _File, path: Path) -> str | None:
    """Have one file at `path`; return its sha256 if it was computed."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if path.is_file():  # of an earlier run
        return file.check(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("ab") as out:
            if out.tell() > file.size:
                out.truncate(0)
            # Unpacked text would not have the positions at which a download goes on.
            headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
            http_get(
                hf_hub_url(repo, file.name, revision=commit),
                out,
                resume_size=out.tell(),
                headers=headers,
                expected_size=file.size,
            )
    except Exception as error:  # the client raises errors of many libraries
        raise SourceError(
            f"{file.name} did not come whole ({first_line(error)}); run the command again, it goes "
            "on where this ended"
        ) from error
    sha256 = file.check(part)
    part.rename(path)
    return sha256

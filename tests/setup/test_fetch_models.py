"""`serve-app fetch MODEL…` from a real HTTP server that speaks the hub's API, and breaks off."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from serve_app import lifeline
from serve_app.config.names import MANIFEST, repo_of
from serve_app.fetch.folders import is_complete

SHA = "c0ffee" + "0" * 34
CHUNK = 10 << 20
"""Bytes that the hub's client hands on at a time."""

WEIGHTS = random.Random(0).randbytes(2 * CHUNK + 5_000_000)
CONFIG = b'{"model_type": "llama"}'
REPO = "Org/Tiny"


class Hub:
    """A hub with one model under any name, and what was asked of it."""

    def __init__(self) -> None:
        self.files = {
            "config.json": CONFIG,
            "model.safetensors": WEIGHTS,
            "1_Pooling/config.json": b"{}",
            "tokenizer.model": b"\0\1",
            "README.md": b"not wanted",
            "pytorch_model.bin": b"not wanted",
            "onnx/config.json": b"not wanted",
            "../outside.json": b"not wanted",
        }
        self.stated: dict[str, bytes] = {}
        """Contents that the listing states where they are others than those that come."""
        self.sha = SHA
        self.status = 200
        self.cut_after: int | None = None
        """Bytes of the weights after which the connection breaks."""
        self.cuts = 0
        self.stuck = False
        self.gone = threading.Event()
        self.asked: list[tuple[str, str | None]] = []
        """Paths of files, with the range that was asked for."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if hub.status != 200:
                    self.reply(hub.status, b"{}")
                elif path.startswith("/api/models/"):
                    siblings = [hub.entry(name) for name in hub.files]
                    listing = {"id": "x/y", "sha": hub.sha, "siblings": siblings}
                    self.reply(200, json.dumps(listing).encode())
                else:
                    name = path.partition(f"/resolve/{hub.sha}/")[2]
                    hub.asked.append((name, self.headers.get("Range")))
                    self.send_file(name, hub.files[name])

            def send_file(self, name: str, data: bytes) -> None:
                first = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
                rest = data[first:]
                self.send_response(206 if first else 200)
                self.send_header("Content-Length", str(len(rest)))
                if first:
                    self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
                self.end_headers()
                if name == "model.safetensors" and hub.stuck:
                    self.wfile.write(rest[: CHUNK + 1000])
                    hub.gone.wait()
                elif name == "model.safetensors" and hub.cuts:
                    hub.cuts -= 1
                    self.wfile.write(rest[: hub.cut_after])
                    self.wfile.flush()
                    self.connection.close()
                else:
                    self.wfile.write(rest)

            def reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:  # a client that was killed, or a connection that was cut
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]

    def entry(self, name: str) -> dict[str, Any]:
        data = self.stated.get(name, self.files[name])
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"rfilename": name, "size": len(data), "blobId": git}
        if name.endswith(("safetensors", ".bin")):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 9}
        return entry


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.http.serve_forever)
    thread.start()
    yield hub
    hub.gone.set()
    hub.http.shutdown()
    thread.join()
    hub.http.server_close()


def start(hub: Hub, root: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from serve_app.cli import main; main()", "fetch"]
    ours = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.http.server_port}",
        "HF_HOME": str(root / "hf"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "COLUMNS": "200",
        **env,
    }
    return subprocess.Popen(
        [*command, *arguments, "--into", str(root / "models")],
        env=os.environ | ours,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lifeline.interrupt_with_parent,
    )


def fetch(hub: Hub, root: Path, *arguments: str, **env: str) -> tuple[int, str, str]:
    process = start(hub, root, *arguments, **env)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def ranges(hub: Hub) -> list[str | None]:
    return [asked for name, asked in hub.asked if name == "model.safetensors"]


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_model_lies_whole_in_a_folder_with_its_manifest(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "models/tiny"
    assert fetch(hub, tmp_path, REPO) == (
        0,
        f"{folder}: 26.0 MB from the Hugging Face hub, {REPO} at c0ffee000000\n",
        "",
    )
    wanted = {"config.json", "model.safetensors", "1_Pooling/config.json", "tokenizer.model"}
    assert names_in(folder) == {MANIFEST, *wanted}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert is_complete(folder)
    assert repo_of(folder) == REPO
    stated = json.loads((folder / MANIFEST).read_text())["files"]["model.safetensors"]
    assert stated["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert names_in(tmp_path / "models/.downloads") == {".lock"}

    # A second time nothing is asked for, also where there is no hub.
    hub.asked.clear()
    assert fetch(hub, tmp_path, REPO, HF_HUB_OFFLINE="1") == (0, f"{folder} is complete\n", "")
    assert hub.asked == []


def test_several_models_with_the_same_last_part_have_folders_of_their_own(
    hub: Hub, tmp_path: Path
) -> None:
    status, _, err = fetch(hub, tmp_path, REPO, "Other/tiny")
    assert (status, err) == (0, "")
    assert repo_of(tmp_path / "models/tiny") == REPO
    assert repo_of(tmp_path / "models/other-tiny") == "Other/tiny"


def test_a_connection_that_breaks_goes_on_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after, hub.cuts = CHUNK + 1000, 1
    status, _, err = fetch(hub, tmp_path, REPO)
    assert (status, err) == (0, "")
    first, second = ranges(hub)
    assert first is None
    assert second == f"bytes={CHUNK}-"
    assert (tmp_path / "models/tiny/model.safetensors").read_bytes() == WEIGHTS


def part_of(root: Path) -> Path:
    return root / "models/.downloads/tiny@c0ffee000000/model.safetensors.part"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_next_run_goes_on_where_one_was_ended(
    hub: Hub, tmp_path: Path, how: signal.Signals
) -> None:
    hub.stuck = True
    process = start(hub, tmp_path, REPO)
    part = part_of(tmp_path)
    deadline = time.monotonic() + 100
    while not (part.exists() and part.stat().st_size == CHUNK):  # a write can take several steps
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    assert (came := part.stat().st_size) == CHUNK
    assert not (tmp_path / "models/tiny").exists()

    hub.stuck = False
    hub.asked.clear()
    assert fetch(hub, tmp_path, REPO)[0] == 0
    assert ranges(hub) == [f"bytes={came}-"]
    assert is_complete(tmp_path / "models/tiny")


def test_what_came_of_an_older_commit_is_not_mixed_in(hub: Hub, tmp_path: Path) -> None:
    old = part_of(tmp_path).parent.with_name("tiny@0ld")
    old.mkdir(parents=True)
    (old / "model.safetensors.part").write_bytes(b"old")
    assert fetch(hub, tmp_path, REPO)[0] == 0
    assert ranges(hub) == [None]
    assert not old.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_wrong_byte_is_found_and_the_file_comes_again(
    hub: Hub, tmp_path: Path, name: str
) -> None:
    hub.stated[name] = b"x" + hub.files[name][1:]
    status, out, err = fetch(hub, tmp_path, REPO)
    assert (status, out) == (2, "")
    assert err == (
        f"serve-app: {REPO}: {name} does not have the checksum that the hub states, and was "
        "deleted; run the command again\n"
    )
    assert not (tmp_path / "models/tiny").exists()
    hub.files[name] = hub.stated[name]
    assert fetch(hub, tmp_path, REPO)[0] == 0
    assert (tmp_path / "models/tiny" / name).read_bytes() == hub.stated[name]


def test_a_connection_that_is_always_cut_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after, hub.cuts = 0, 1000
    status, out, err = fetch(hub, tmp_path, REPO)
    assert (status, out) == (2, "")
    [line] = err.splitlines()
    assert line.startswith(f"serve-app: {REPO}: model.safetensors did not come whole (")
    assert line.endswith("run the command again, it goes on where this ended")


@pytest.mark.parametrize(
    ("status", "repo", "told"),
    [
        (404, REPO, "the hub has no such model, or a private one (then set HF_TOKEN); correct it"),
        (500, REPO, "the hub cannot be reached (Server error '500"),
        (200, "./models/x", "./models/x is no hub id (organisation/name)"),
        (200, "a/b/c", "a/b/c is no hub id (organisation/name)"),
        (200, "a b/c", "the hub has no such model"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(
    hub: Hub, tmp_path: Path, status: int, repo: str, told: str
) -> None:
    hub.status = status
    code, out, err = fetch(hub, tmp_path, repo)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert told in line


def test_a_repository_without_weights_is_refused(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"], hub.files["pytorch_model.bin"]
    _, _, err = fetch(hub, tmp_path, REPO)
    assert "the hub has no weights of it that an engine loads" in err


def test_weights_of_an_older_kind_are_taken_where_there_are_no_others(
    hub: Hub, tmp_path: Path
) -> None:
    del hub.files["model.safetensors"]
    assert fetch(hub, tmp_path, REPO)[0] == 0
    assert (tmp_path / "models/tiny/pytorch_model.bin").exists()

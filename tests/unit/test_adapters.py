"""Where an adapter comes from: a folder, the hub, or S3."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from s3fs import S3FileSystem

from serve_app.errors import UserError
from serve_app.replica import adapters

OBJECTS = {
    "team/poet/adapter_config.json": b'{"r": 4}',
    "team/poet/adapter_model.safetensors": b"weights" * 1000,
    "team/poet-2/adapter_config.json": b"another one, whose name begins alike",
}
"""What the bucket ``adapters`` holds."""


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as reading a folder takes: list, head and get."""

    asked: list[str]
    allowed = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        _, bucket, key = (*url.path.split("/", 2), "")[:3]
        type(self).asked.append(f"{self.command} {key}")
        if not self.allowed:
            self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif bucket != "adapters":
            self.answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        elif "list-type" in query:
            self.answer(200, listing(query.get("prefix", [""])[0], query.get("delimiter", [""])[0]))
        elif key in OBJECTS:
            time.sleep(0.1)  # so that two downloads overlap
            self.answer(200, OBJECTS[key])
        else:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", f'"{hashlib.md5(body).hexdigest()}"')
        self.send_header("last-modified", "Tue, 24 Nov 2026 08:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


def listing(prefix: str, delimiter: str) -> bytes:
    found, folders = "", set()
    for key, body in OBJECTS.items():
        rest = key.removeprefix(prefix)
        if not key.startswith(prefix):
            continue
        if delimiter and delimiter in rest:
            folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
        else:
            found += (
                f"<Contents><Key>{key}</Key><Size>{len(body)}</Size>"
                f"<ETag>{hashlib.md5(body).hexdigest()}</ETag>"
                "<LastModified>2026-11-24T08:00:00.000Z</LastModified></Contents>"
            )
    found += "".join(f"<CommonPrefixes><Prefix>{f}</Prefix></CommonPrefixes>" for f in folders)
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """An S3 of our own, as the environment names it; what it was asked for."""
    Bucket.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    S3FileSystem.clear_instance_cache()  # they keep the address of the server
    yield Bucket.asked
    server.shutdown()
    server.server_close()


def test_a_folder_and_a_hub_id_are_left_to_vllm() -> None:
    assert adapters.fetch("/mnt/poet") == "/mnt/poet"
    assert adapters.fetch("team/poet") == "team/poet"


@pytest.mark.parametrize("address", ["s3://adapters/team/poet", "s3://adapters/team/poet/"])
def test_a_folder_on_s3_is_downloaded_once(asked: list[str], address: str) -> None:
    folder = Path(adapters.fetch(address))
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {
        key.rpartition("/")[2]: body for key, body in OBJECTS.items() if "/poet/" in key
    }
    downloads = asked.count("GET team/poet/adapter_model.safetensors")
    assert adapters.fetch(address) == str(folder)
    assert asked.count("GET team/poet/adapter_model.safetensors") == downloads == 1


def test_what_has_changed_on_s3_is_downloaded_again(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path(adapters.fetch("s3://adapters/team/poet"))
    monkeypatch.setitem(OBJECTS, "team/poet/adapter_config.json", b'{"r": 8}')  # as long as before
    now = Path(adapters.fetch("s3://adapters/team/poet"))
    assert (now / "adapter_config.json").read_bytes() == b'{"r": 8}'
    assert (before / "adapter_config.json").read_bytes() == b'{"r": 4}'  # an engine may read it


def test_downloads_of_one_adapter_at_a_time_do_not_meet(asked: list[str], tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        [folder] = set(threads.map(adapters.fetch, ["s3://adapters/team/poet"] * 4))
    assert sorted(f.name for f in Path(folder).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not list(tmp_path.rglob("partial-*"))


def test_the_last_download_will_do_while_s3_does_not_answer(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, adapters.logger.name)  # vLLM, once imported, quiets it
    folder = adapters.fetch("s3://adapters/team/poet")
    (Path(folder).parent / "adapter_config.json").touch()  # 0.1 kept an adapter itself there
    monkeypatch.setattr(Bucket, "allowed", False)
    assert adapters.fetch("s3://adapters/team/poet") == folder
    assert "s3://adapters/team/poet cannot be read (" in caplog.text
    with pytest.raises(UserError):
        adapters.fetch("s3://adapters/team/poet-2")


@pytest.mark.parametrize("address", ["s3://adapters/team/novelist", "s3://other/team/poet"])
def test_what_is_not_there_is_refused_by_its_address(asked: list[str], address: str) -> None:
    with pytest.raises(UserError, match=f"^{address} cannot be read: "):
        adapters.fetch(address)


def test_what_comes_later_is_found_by_the_next_try(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError):
        adapters.fetch("s3://adapters/team/novelist")
    monkeypatch.setitem(OBJECTS, "team/novelist/adapter_config.json", b"{}")
    folder = Path(adapters.fetch("s3://adapters/team/novelist"))
    assert [f.name for f in folder.iterdir()] == ["adapter_config.json"]

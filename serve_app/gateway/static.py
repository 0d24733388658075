"""The page's files: read and compressed once, answered from memory.

They have no data, so nobody needs a key for them. What the page shows comes from the public routes,
with the key that its user types.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).with_name("page")

UNDER = "/-/page/"
"""Where the files are; a path below it asks for no key."""

INDEX = "index.html"
"""The page itself, at ``/``. Its links are relative, so that it works below any prefix."""

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
"""By suffix. A file with another one, such as a licence, is not answered."""

_HEADERS = {
    # The browser asks each time, and gets a 304: after an update nobody has half of the old page.
    "cache-control": "no-cache",
    # Scripts and data come from here alone; nothing of what a model writes is ever run.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class _Form:
    """A file's bytes, plain or compressed."""

    body: bytes
    encoding: str = ""
    etag: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.body).hexdigest()[:32]
        object.__setattr__(self, "etag", f'"{digest}"')


@dataclass(frozen=True)
class File:
    """A file of the page."""

    type: str
    plain: _Form
    packed: _Form

    def answer(self, request: Request, vary: Iterable[str] = ()) -> Response:
        """The file, or 304 for who has it. ``vary``: further headers that decided on this file."""
        form = self.packed if takes_gzip(request) else self.plain
        headers = {**_HEADERS, "etag": form.etag, "vary": ", ".join([*vary, "accept-encoding"])}
        if form.encoding:
            headers["content-encoding"] = form.encoding
        if has(request, form.etag):
            return Response(status_code=304, headers=headers)
        return Response(form.body, headers=headers, media_type=self.type)


def has(request: Request, etag: str) -> bool:
    """Whether the client has said that it has what this ETag names; also among others, and weakly,
    as what is between may have made it."""
    return etag in request.headers.get("if-none-match", "")


_PREFIX = re.compile(r"(?:/[\w.~-]+)+", re.ASCII)


def below(file: File, prefix: str) -> File:
    """The page for who opens it below a prefix that a proxy has cut off (``X-Forwarded-Prefix``):
    without a slash at the address's end, relative links would lead out of it."""
    if not _PREFIX.fullmatch(prefix):
        return file
    link = f'="{prefix}{UNDER}'.encode()
    return _file(file.type, file.plain.body.replace(f'="{UNDER[1:]}'.encode(), link))


@functools.cache
def read() -> Mapping[str, File]:
    """All files by their path below :data:`FOLDER`."""
    return {
        path.relative_to(FOLDER).as_posix(): _file(_TYPES[path.suffix], path.read_bytes())
        for path in sorted(FOLDER.rglob("*"))
        if path.suffix in _TYPES
    }


def _file(type: str, body: bytes) -> File:
    packed = _Form(gzip.compress(body, mtime=0), "gzip")  # without the time: ETags stay the same
    return File(type, _Form(body), packed)


_GZIP = re.compile(
    r"(?:^|,)\s*gzip\s*(?:;\s*q=(?!0(?:\.0*)?\s*(?:,|$))[^,]*)?(?:,|$)", re.IGNORECASE
)


def takes_gzip(request: Request) -> bool:
    """Whether ``Accept-Encoding`` names gzip, and not to refuse it."""
    return bool(_GZIP.search(request.headers.get("accept-encoding", "")))

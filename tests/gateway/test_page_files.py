"""``GET /`` and the page's files: who gets what, and that they tell nothing of the fleet."""

from __future__ import annotations

import gzip
import re
from typing import Any

import httpx
import pytest
from harness.scripted import GatewayProcess

from serve_app.config import keys
from serve_app.gateway import static

KEY, HASH = keys.new()
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
EVERY_FILE = sorted(static.read())


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The gateway's args where it has keys."""
    monkeypatch.setenv("KEYS", f"[{{name: one, hash: '{HASH}'}}]")
    return {"keys": {"secret_env": "KEYS"}}


async def test_a_browser_gets_the_page_and_others_get_links() -> None:
    async with GatewayProcess() as gateway:
        page = await gateway.client.get("/", headers=BROWSER)
        assert page.headers["content-type"].startswith("text/html")
        assert page.content == static.read()[static.INDEX].plain.body
        links = await gateway.client.get("/", headers={"accept": "*/*"})
        assert links.json()["service"] == "serve_app"
        for answer in (page, links):
            assert "accept" in answer.headers["vary"]
        for path in links.json()["links"].values():
            if path != "/v1/usage":  # there is no database here
                assert (await gateway.client.get(path)).status_code in (200, 503), path


async def test_without_the_page_all_get_links() -> None:
    async with GatewayProcess(page=False) as gateway:
        answer = await gateway.client.get("/", headers=BROWSER)
        assert answer.json()["service"] == "serve_app"
        for name in EVERY_FILE:
            assert (await gateway.client.get(static.UNDER + name)).status_code == 404


@pytest.mark.parametrize("name", EVERY_FILE)
async def test_every_file_has_the_headers_that_keep_it_harmless(name: str) -> None:
    async with GatewayProcess() as gateway:
        path = "/" if name == static.INDEX else static.UNDER + name
        answer = await gateway.client.get(path, headers=BROWSER)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"


async def test_who_has_a_file_gets_304_and_gzip_has_a_tag_of_its_own() -> None:
    async with GatewayProcess() as gateway:
        plain = await gateway.client.get("/", headers=BROWSER)
        raw = gateway.client.stream("GET", "/", headers={**BROWSER, "accept-encoding": "br, gzip"})
        async with raw as packed:
            sent = b"".join([part async for part in packed.aiter_raw()])
        assert packed.headers["content-encoding"] == "gzip"
        assert gzip.decompress(sent) == plain.content
        tags = plain.headers["etag"], packed.headers["etag"]
        assert tags[0] != tags[1]
        for given in (tags[0], f'"x", W/{tags[0]}'):
            again = await gateway.client.get("/", headers={**BROWSER, "if-none-match": given})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == tags[0]
        other = await gateway.client.get("/", headers={**BROWSER, "if-none-match": tags[1]})
        assert other.status_code == 200


@pytest.mark.parametrize(
    "coding", ["gzip;q=0", "gzip; q=0.000", "br, gzip;q=0 , x", "identity", "xgzip", "gzipx", ""]
)
async def test_gzip_goes_only_to_those_who_take_it(coding: str) -> None:
    async with GatewayProcess() as gateway:
        answer = await gateway.client.get("/", headers={**BROWSER, "accept-encoding": coding})
        assert "content-encoding" not in answer.headers


@pytest.mark.parametrize(
    "coding", ["gzip", "GZIP", "br , gzip;q=0.5,x", "gzip; q=1", "gzip;q=0.01"]
)
async def test_gzip_goes_to_whoever_takes_it(coding: str) -> None:
    async with GatewayProcess() as gateway:
        answer = await gateway.client.get("/", headers={**BROWSER, "accept-encoding": coding})
        assert answer.headers["content-encoding"] == "gzip"


async def test_head_has_the_headers_of_get() -> None:
    async with GatewayProcess() as gateway:
        got = await gateway.client.get("/", headers=BROWSER)
        head = await gateway.client.head("/", headers=BROWSER)
        assert (head.status_code, head.content) == (200, b"")
        for name in ("content-length", "etag", "content-type", "content-security-policy"):
            assert head.headers[name] == got.headers[name]


async def test_other_methods_are_refused() -> None:
    async with GatewayProcess() as gateway:
        for path in ("/", static.UNDER + static.INDEX):
            answer = await gateway.client.post(path, headers=BROWSER)
            assert answer.status_code == 405
            assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path",
    [
        "..%2f__init__.py",
        "%2e%2e/__init__.py",
        "..%5c__init__.py",
        "%2fetc%2fpasswd",
        "/etc/passwd",
        "index.html",  # its links are relative to "/"
        "index.html%00.js",
        "",
        ".",
    ],
)
async def test_no_path_leads_to_another_file(path: str) -> None:
    async with GatewayProcess(front=True) as gateway:
        # As a URL of its own, so that httpx does not tidy it.
        request = httpx.Request("GET", gateway.base_url, headers=BROWSER)
        request.url = httpx.URL(gateway.base_url).copy_with(raw_path=(static.UNDER + path).encode())
        answer = await gateway.client.send(request)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"


async def test_page_and_files_need_no_key_and_everything_else_does(keyed: dict[str, Any]) -> None:
    async with GatewayProcess(**keyed) as gateway:
        for headers in ({}, {"authorization": "Bearer sk-wrong"}):
            answer = await gateway.client.get("/", headers={**BROWSER, **headers})
            assert answer.status_code == 200
            links = await gateway.client.get("/", headers=headers)
            assert links.json().keys() == {"service", "links"}  # and no version
            for name in EVERY_FILE:
                if name != static.INDEX:
                    answer = await gateway.client.get(static.UNDER + name, headers=headers)
                    assert answer.status_code == 200
            for path in ("/v1/models", "/metrics", "/-/", "/-/page", "/-/routes", "/index.html"):
                answer = await gateway.client.get(path, headers={**BROWSER, **headers})
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "authentication_error"
        known = await gateway.client.get("/", headers={"x-api-key": KEY})
        assert known.json()["version"]


async def test_the_page_works_below_a_prefix() -> None:
    """Its links are relative, and those of the JSON have the prefix."""
    page = static.read()[static.INDEX].plain.body.decode()
    assert not re.findall(r"""(?:src|href)=["']?(?:/|https?:)""", page)
    async with GatewayProcess(root_path="/llm") as gateway:
        assert (await gateway.client.get("/", headers=BROWSER)).status_code == 200
        for name in EVERY_FILE:
            answer = await gateway.client.get(static.UNDER + name)
            assert answer.status_code == (404 if name == static.INDEX else 200)
        links = (await gateway.client.get("/")).json()["links"]
        assert links["models"] == "/llm/v1/models"


async def test_a_huge_accept_header_is_refused_before_it_is_read() -> None:
    async with GatewayProcess(front=True) as gateway:
        big = {"accept": "text/plain," * 5_000}
        assert (await gateway.client.get("/", headers=big)).status_code == 200
        bigger = {"accept": "text/plain," * 6_000}
        assert (await gateway.client.get("/", headers=bigger)).status_code == 431


async def test_no_other_page_may_read_it_unless_its_origin_is_allowed() -> None:
    origin = {"origin": "https://elsewhere.example"}
    async with GatewayProcess() as gateway:
        answer = await gateway.client.get("/", headers=origin)
        assert "access-control-allow-origin" not in answer.headers
    async with GatewayProcess(cors_allow_origins=[origin["origin"]]) as gateway:
        answer = await gateway.client.get("/", headers={**BROWSER, **origin})
        assert answer.headers["access-control-allow-origin"] == origin["origin"]
        assert "accept" in answer.headers["vary"]

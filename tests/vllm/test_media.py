"""What vLLM's own client fetches for a request, once private addresses are refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from harness.scripted import Exchange, Upstream

from serve_app.replica import media

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
async def connection(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    from vllm.connections import global_http_connection

    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(global_http_connection, "_async_client", None)
    yield global_http_connection
    if client := global_http_connection._async_client:
        await client.close()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0x7f.1", "0.0.0.0", "[::ffff:127.0.0.1]"]
)
async def test_nothing_is_fetched_from_a_private_address(connection: Any, host: str) -> None:
    media.refuse_private_addresses(None)
    async with Upstream() as upstream:
        with pytest.raises(Exception, match=r"private address.*allowed_media_domains"):
            await connection.async_get_bytes(f"http://{host}:{upstream.port}/", timeout=5)
        assert upstream.connections == 0


async def test_nor_by_a_redirect(connection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def redirect(exchange: Exchange) -> None:
        await exchange.answer(b"", f"location: http://127.0.0.2:{inner.port}/", status="302 Found")

    monkeypatch.setattr(media, "_is_public", lambda host: host == "127.0.0.1")
    media.refuse_private_addresses(None)
    async with Upstream(host="127.0.0.2") as inner, Upstream(redirect) as outer:
        with pytest.raises(Exception, match="private address"):
            await connection.async_get_bytes(f"http://127.0.0.1:{outer.port}/", timeout=5)
        assert (len(outer.exchanges), inner.connections) == (1, 0)


async def test_the_operators_domains_may_be_private(connection: Any) -> None:
    media.refuse_private_addresses(["127.0.0.1"])
    async with Upstream() as upstream:
        fetched = await connection.async_get_bytes(f"http://127.0.0.1:{upstream.port}/", timeout=5)
        assert fetched == b'{"ok": true}'


async def test_a_proxy_makes_the_connections(
    connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Upstream() as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        media.refuse_private_addresses(None)
        await connection.async_get_bytes("http://pictures.example/a.png", timeout=5)
        assert [it.target for it in proxy.exchanges] == ["http://pictures.example/a.png"]


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("1.1.1.1", True),
        ("2606:4700::1111", True),
        ("169.254.169.254", False),
        ("fd00:ec2::254", False),
        ("fe80::1%eth0", False),
        ("::ffff:10.0.0.1", False),
        ("100.64.0.1", False),
        ("::1", False),
    ],
)
def test_what_is_public(host: str, public: bool) -> None:
    assert media._is_public(host) is public

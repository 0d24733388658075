"""What vLLM's own client fetches for a request, once private addresses are refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
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
    monkeypatch.setattr(global_http_connection, "_sync_client", None)
    yield global_http_connection
    if client := global_http_connection._async_client:
        await client.close()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0x7f.1", "0.0.0.0", "[::ffff:127.0.0.1]"]
)
async def test_nothing_is_fetched_from_a_private_address(connection: Any, host: str) -> None:
    media.refuse_private_addresses(None)
    async with Upstream() as upstream:
        url = f"http://{host}:{upstream.port}/"
        for fetch in ways(connection):
            with pytest.raises(Exception, match=r"private address.*allowed_media_domains"):
                await fetch(url)
        assert upstream.exchanges == []


def ways(connection: Any) -> list[Callable[[str], Awaitable[bytes]]]:
    """vLLM's two: most routes fetch in the event loop, those for embeddings and scores do not."""
    return [
        lambda url: connection.async_get_bytes(url, timeout=5),
        lambda url: asyncio.to_thread(connection.get_bytes, url, timeout=5),
    ]


@pytest.mark.parametrize("way", [0, 1])
async def test_nor_by_a_redirect(
    connection: Any, monkeypatch: pytest.MonkeyPatch, way: int
) -> None:
    async def redirect(exchange: Exchange) -> None:
        await exchange.answer(b"", f"location: http://127.0.0.2:{inner.port}/", status="302 Found")

    monkeypatch.setattr(media, "_is_public", lambda host: host == "127.0.0.1")
    media.refuse_private_addresses(None)
    async with Upstream(host="127.0.0.2") as inner, Upstream(redirect) as outer:
        with pytest.raises(Exception, match="private address"):
            await ways(connection)[way](f"http://127.0.0.1:{outer.port}/")
        assert (len(outer.exchanges), inner.exchanges) == (1, [])


async def test_the_operators_domains_may_be_private(connection: Any) -> None:
    media.refuse_private_addresses(["127.0.0.1"])
    async with Upstream() as upstream:
        for fetch in ways(connection):
            assert await fetch(f"http://127.0.0.1:{upstream.port}/") == b'{"ok": true}'


async def test_a_proxy_makes_the_connections(
    connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Upstream() as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        media.refuse_private_addresses(None)
        for fetch in ways(connection):
            await fetch("http://pictures.example/a.png")
        assert [it.target for it in proxy.exchanges] == ["http://pictures.example/a.png"] * 2


async def test_beside_a_proxy_what_does_not_go_through_it_is_looked_at(
    connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Upstream() as proxy, Upstream() as inner:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "localhost")
        media.refuse_private_addresses(None)
        for fetch in ways(connection):
            with pytest.raises(Exception, match="private address"):
                await fetch(f"http://localhost:{inner.port}/")
        assert inner.exchanges == proxy.exchanges == []


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
        ("::169.254.169.254", False),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b::1.1.1.1", True),
        ("64:ff9b:1::1", False),
        ("2002:a9fe:a9fe::", False),
        ("fec0::1", False),
        ("192.0.0.8", False),
        ("168.63.129.16", False),
        ("224.0.0.1", False),
    ],
)
def test_what_is_public(host: str, public: bool) -> None:
    assert media._is_public(host) is public

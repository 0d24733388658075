"""Requests that ask to change the protocol, of which the gateway's HTTP server knows none."""

from __future__ import annotations

import asyncio
import json

from harness.scripted import GatewayProcess, Upstream

BODY = b'{"model": "m"}'


async def test_the_body_that_the_server_drops_is_named_as_lost() -> None:
    """As `curl --http2` sends it; uvicorn hands on an empty body, which has no model."""
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n"
            b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAM\r\n\r\n%b"
            % (len(BODY), BODY)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        body = json.loads(await reader.readuntil(b"}}"))
        writer.close()
        assert b" 400 " in head
        assert body["error"]["code"] == "body_lost"
        assert "without --http2" in body["error"]["message"]
        assert upstream.exchanges == []

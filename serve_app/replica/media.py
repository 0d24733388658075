"""From where a model fetches the pictures, sounds and videos that requests name by their URLs.

vLLM fetches from any address unless the model's engine has ``allowed_media_domains``. A client
could have it ask what only the cluster can reach: a cloud's metadata service, Ray's dashboard,
other pods. The look at each address is at its connection, so a name that resolves to a private
address and a redirect to one are refused as well.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.request
from typing import Any


def refuse_private_addresses(allowed_domains: list[str] | None) -> None:
    """Have this process's vLLM fetch media from public addresses alone.

    Not where the operator has named the domains. Nor behind a proxy, which makes the connections:
    it has to refuse then. To be called in the loop that serves.
    """
    import aiohttp
    from vllm.connections import global_http_connection

    if allowed_domains or urllib.request.getproxies().keys() & {"http", "https", "all"}:
        return
    connector = aiohttp.TCPConnector(socket_factory=_to_public)
    global_http_connection._async_client = aiohttp.ClientSession(connector=connector)


def _to_public(address: tuple[Any, ...]) -> socket.socket:
    """A socket for what ``getaddrinfo`` has found."""
    from vllm.exceptions import VLLMValidationError

    family, kind, protocol, _, place = address
    if not _is_public(place[0]):
        raise VLLMValidationError(
            "The URL leads to a private address, from where this model fetches nothing; send the "
            "data itself (data:…;base64,…), or have the operator name the host in the model's "
            "engine.allowed_media_domains."
        )
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    return made


def _is_public(host: str) -> bool:
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_global)

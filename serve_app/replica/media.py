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
from urllib.parse import urlsplit


def refuse_private_addresses(allowed_domains: list[str] | None) -> None:
    """Have this process's vLLM fetch media from public addresses alone.

    Not where the operator has named the domains. What goes through an HTTP proxy is connected by
    that: it has to refuse then. To be called in the loop that serves.
    """
    from vllm.connections import global_http_connection

    if not allowed_domains:
        global_http_connection._async_client = _async_client()  # most routes
        global_http_connection._sync_client = _sync_client()  # embeddings and scores


def _async_client() -> Any:
    import aiohttp

    proxies = _proxies()

    def connect(address: tuple[Any, ...]) -> socket.socket:
        """A socket for what ``getaddrinfo`` has found."""
        family, kind, protocol, _, place = address
        if place[:2] not in proxies:
            _require_public(place[0])
        made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        return made

    connector = aiohttp.TCPConnector(socket_factory=connect)
    return aiohttp.ClientSession(connector=connector, trust_env=True)


def _proxies() -> set[tuple[str, int]]:
    """Addresses and ports of the proxies that the environment names."""
    found = set()
    for url in urllib.request.getproxies().values():
        split = urlsplit(url)
        try:
            port = split.port or (443 if split.scheme == "https" else 80)
            known = socket.getaddrinfo(split.hostname, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError):  # no_proxy is among them, too
            continue
        found |= {(str(place[0]), int(place[1])) for *_, place in known}
    return found


def _sync_client() -> Any:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import connection, connectionpool

    class Plain(connection.HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return _checked(super()._new_conn())

    class Secure(connection.HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return _checked(super()._new_conn())

    class PlainPool(connectionpool.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(connectionpool.HTTPSConnectionPool):
        ConnectionCls = Secure

    adapter = HTTPAdapter()
    # Not those of proxies, for which requests has managers of their own.
    adapter.poolmanager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}
    session = requests.Session()
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _checked(connected: socket.socket) -> socket.socket:
    """The same socket, through which nothing has been sent yet."""
    try:
        _require_public(connected.getpeername()[0])
    except Exception:
        connected.close()
        raise
    return connected


def _require_public(host: str) -> None:
    from vllm.exceptions import VLLMValidationError

    if not _is_public(host):
        raise VLLMValidationError(
            "The URL leads to a private address, from where this model fetches nothing; send the "
            "data itself (data:…;base64,…), or have the operator name the host in the model's "
            "engine.allowed_media_domains."
        )


_TRANSLATED = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
"""Networks of IPv6 whose last 32 bits are the address of IPv4 that is meant (RFC 6052, 4291)."""

_NOT_PUBLIC = (
    ipaddress.ip_network("192.0.0.0/24"),
    ipaddress.ip_network("168.63.129.16/32"),  # Azure's own services for a machine
    ipaddress.ip_network("64:ff9b:1::/48"),
    ipaddress.ip_network("fec0::/10"),
)
"""What :mod:`ipaddress` calls global in some versions of Python."""


def _is_public(host: str) -> bool:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        meant = address.ipv4_mapped or address.sixtofour
        if any(address in network for network in _TRANSLATED):
            meant = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        address = meant or address
    refused = address.is_multicast or any(address in network for network in _NOT_PUBLIC)
    return address.is_global and not refused

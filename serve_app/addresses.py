"""Addresses of both families: an IPv6 one has colons of its own, and sockets of its own kind.

Ray has the same in a private module (``ray._common.network_utils``); this is small, and the
planner and the renderer, which use it too, do without Ray.
"""

from __future__ import annotations

import ipaddress
import socket

ANY_IPV6 = "::0"
"""Every address of both families, as ``http_options.host``. For ``::`` Serve's HAProxy writes
``*`` (ray/serve/_private/haproxy.py), which is IPv4's alone; this spelling it leaves as it is."""


V6_IS_V4 = f"::, of which Serve's HAProxy makes IPv4 alone; set {ANY_IPV6}"


def is_ipv6(host: str) -> bool:
    """Whether a host is an IPv6 address; a name is none."""
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def family(host: str) -> socket.AddressFamily:
    """The kind of socket that can be bound to an address."""
    return socket.AF_INET6 if is_ipv6(host) else socket.AF_INET


def join(host: str, port: int) -> str:
    """``host:port``, as URLs have it: an IPv6 address goes in brackets."""
    return f"[{host}]:{port}" if is_ipv6(host) else f"{host}:{port}"


def split(address: str) -> tuple[str, int] | None:
    """Host and port of ``host:port``; None where it is not that, as an IPv6 address is alone."""
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    return (host, int(port)) if host and port.isdecimal() else None

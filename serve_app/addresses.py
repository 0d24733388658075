"""IPv4 and IPv6 addresses: brackets in URLs, and the right kind of socket.

Ray has such functions in a private module (``ray._common.network_utils``). The planner and the
renderer need them without Ray.
"""

from __future__ import annotations

import ipaddress
import socket

ANY_IPV6 = "::0"
"""``http_options.host`` for every address of both families. For ``::`` Serve writes ``*`` into
HAProxy's file (ray/serve/_private/haproxy.py), which is IPv4 alone; ``::0`` it leaves as it is."""


V6_IS_V4 = f"::, of which Serve's HAProxy makes IPv4 alone; set {ANY_IPV6}"


def is_ipv6(host: str) -> bool:
    """Whether a host is an IPv6 address. A name is not."""
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def family(host: str) -> socket.AddressFamily:
    """The kind of socket that can be bound to an address."""
    return socket.AF_INET6 if is_ipv6(host) else socket.AF_INET


def is_here(host: str) -> bool:
    """Whether an address is this machine's."""
    try:
        with socket.socket(family(host)) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def join(host: str, port: int) -> str:
    """``host:port`` as in URLs: an IPv6 address is in brackets."""
    return f"[{host}]:{port}" if is_ipv6(host) else f"{host}:{port}"


def split(address: str) -> tuple[str, int] | None:
    """Host and port of ``host:port``; None for anything else, such as a bare IPv6 address."""
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    return (host, int(port)) if host and port.isdecimal() else None

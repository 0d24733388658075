"""Ray's usual dashboard port, open to this user alone: ``serve status`` works beside a run.

``serve status`` and ``serve deploy`` ask http://localhost:8265, without a token unless
RAY_AUTH_MODE says that there is one. The Ray of ``serve-app run`` asks for one, because without it
everybody on the machine could run code as this user. So the run listens on that port before its Ray
does, which then takes the next one, and passes each request of this user's processes on to Ray with
the token.
"""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from pathlib import Path

PORT = 8265
"""Ray's default (``ray_constants.DEFAULT_DASHBOARD_PORT``), which ``serve`` asks."""

_HEAD_BYTES = 65536
_HEAD_S = 30.0


def _refusal(status: str, why: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(why)}"
    return f"{head}\r\n\r\n{why}".encode()


_ELSEWHERE = _refusal("403 Forbidden", "Requests of other sites' pages are refused.")
_NOT_YET = _refusal("503 Service Unavailable", "Ray has not started yet.")


class Door(socketserver.ThreadingTCPServer):
    """Listens on 127.0.0.1:8265. ``dashboard`` gives the real one's host, port and token.

    Raises:
        OSError: another process has the port.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, dashboard: Callable[[], tuple[str, int, str]], port: int = PORT) -> None:
        super().__init__(("127.0.0.1", port), _Visitor)
        self.dashboard = dashboard
        threading.Thread(target=self.serve_forever, name="door", daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A visitor that leaves early is no news."""


class _Visitor(socketserver.BaseRequestHandler):
    server: Door

    def handle(self) -> None:
        client: socket.socket = self.request
        if _owner(client) != os.getuid():
            return
        client.settimeout(_HEAD_S)
        head = b""
        while b"\r\n\r\n" not in head:
            data = client.recv(65536)
            if not data or len(head) > _HEAD_BYTES:
                return
            head += data
        head, _, body = head.partition(b"\r\n\r\n")
        try:
            host, port, token = self.server.dashboard()
        except Exception:
            client.sendall(_NOT_YET)
            return
        changed = _with_token(head, token)
        if changed is None:
            client.sendall(_ELSEWHERE)
            return
        with socket.create_connection((host, port), timeout=_HEAD_S) as dashboard:
            client.settimeout(None)
            dashboard.settimeout(None)
            dashboard.sendall(changed + body)
            threading.Thread(target=_pour, args=(client, dashboard), daemon=True).start()
            _pour(dashboard, client)


def _with_token(head: bytes, token: str) -> bytes | None:
    """A request's head with the token, for one request; None for one of a web page elsewhere.

    A page of any site could send requests to this port from this user's browser.
    """
    start, *lines = head.split(b"\r\n")
    fields = [(line.partition(b":")[0].strip().lower(), line) for line in lines]
    values = {name: line.partition(b":")[2].strip().lower() for name, line in fields}
    host = values.get(b"host", b"").rpartition(b":")[0]
    if host not in (b"localhost", b"127.0.0.1"):  # a name of theirs that leads here
        return None
    if values.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
        return None
    if b"origin" in values and values[b"origin"] != b"http://" + values[b"host"]:
        return None
    # The next request on the connection would come without the token.
    dropped = (b"connection", b"authorization")
    kept = [line for name, line in fields if name not in dropped]
    ours = [b"Authorization: Bearer " + token.encode(), b"Connection: close"]
    return b"\r\n".join([start, *kept, *ours, b"", b""])


def _pour(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _owner(connection: socket.socket) -> int | None:
    """The user id of the process at the other end of a connection on this machine."""
    theirs, ours = connection.getpeername(), connection.getsockname()
    wanted = [f"{_hex(host)}:{port:04X}" for host, port in (theirs, ours)]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == wanted:
            return int(fields[7])
    return None


def _hex(host: str) -> str:
    """An IPv4 address as the kernel writes it: one number in the machine's byte order."""
    return f"{struct.unpack('=I', socket.inet_aton(host))[0]:08X}"

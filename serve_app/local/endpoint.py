"""The address at which the server on this machine answers, and requests to it."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import re
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from serve_app import addresses
from serve_app.config.document import API_KEY, Fleet
from serve_app.errors import UserError

_RUNNING = "serve_app_gateway_inflight_requests"

# Requests to this machine never use a proxy, whatever HTTP_PROXY says.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@dataclass(frozen=True)
class Endpoint:
    """Where Serve's proxy listens (``bound``) and where it is asked (``host``)."""

    bound: str
    port: int
    key: str = field(default="", repr=False)
    """The API key to send, where the gateway asks for one; else that of SERVE_APP_API_KEY."""

    @classmethod
    def of(cls, fleet: Fleet) -> Endpoint:
        """The endpoint of a config's ``http_options``, as Serve reads them."""
        return cls(fleet.host, fleet.port)

    @property
    def host(self) -> str:
        """An address of this machine; never a wildcard."""
        try:
            bound = ipaddress.ip_address(self.bound)
        except ValueError:
            return self.bound  # a name
        if not bound.is_unspecified:
            return self.bound
        return "::1" if bound.version == 6 else "127.0.0.1"

    @property
    def url(self) -> str:
        """``http://host:port``, for either family."""
        return f"http://{addresses.join(self.host, self.port)}"

    def refuse_if_taken(self) -> None:
        """Raise UserError if the port is taken or the address is not this machine's."""
        try:
            with socket.socket(addresses.family(self.bound)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((self.bound, self.port))
        except OSError as error:
            raise UserError(self._why_not(error)) from None

    def _why_not(self, error: OSError) -> str:
        if error.errno == errno.EADDRINUSE:
            return (
                f"port {self.port} is taken; stop what uses it, or choose another with --port or "
                "http_options.port (left over from a killed run? serve-app clean-processes ends it)"
            )
        if error.errno == errno.EACCES:
            return f"port {self.port} is for root only; choose one above 1023 with --port"
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or isinstance(
            error, socket.gaierror
        ):
            return (
                f"http_options.host is {self.bound}, which is no address of this machine; "
                "use 127.0.0.1, or 0.0.0.0 for all"
            )
        return f"{self.url} cannot be listened on: {error.strerror}; set http_options.host"

    def ready(self, run: str | None = None) -> dict[str, Any] | None:
        """The report of ``GET /ready``; None while no gateway of this run answers.

        ``run`` is the id that this run gave its gateway
        (:data:`serve_app.config.document.RUN_ID`). The answer of any other server is ignored.
        """
        try:
            request = urllib.request.Request(f"{self.url}/ready", headers=authorization(self.key))
            with _open(request, timeout=5) as answer:
                body = json.load(answer)
        except urllib.error.HTTPError as error:
            try:
                body = json.load(error)
            except ValueError:
                return None  # Serve's own plain-text answer while there is no gateway yet
        except (OSError, ValueError):
            return None
        if not isinstance(body, dict) or not isinstance(body.get("models"), dict):
            return None
        return body if run is None or body.get("run") == run else None

    def running(self) -> int:
        """The requests that its gateways are answering now; 0 where they do not tell."""
        headers = authorization(self.key)
        try:
            request = urllib.request.Request(f"{self.url}/metrics", headers=headers)
            with _open(request, timeout=10) as answer:
                page = answer.read().decode()
        except (OSError, ValueError):
            return 0
        counts = re.findall(rf"^{_RUNNING}{{[^\n]*}} ([0-9.e+]+)$", page, re.MULTILINE)
        return int(sum(map(float, counts)))


def authorization(key: str = "") -> dict[str, str]:
    """The header with an API key, or with that of SERVE_APP_API_KEY; empty where there is none."""
    key = key or os.environ.get(API_KEY, "")
    return {"authorization": f"Bearer {key}"} if key else {}


def without_proxy(*hosts: str) -> dict[str, str]:
    """``no_proxy`` and ``NO_PROXY`` with this machine added; empty if no proxy is set."""
    given = ",".join(os.environ.get(variable, "") for variable in ("no_proxy", "NO_PROXY"))
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not urllib.request.getproxies_environment() or "*" in names:
        return {}
    names += [h for h in ("127.0.0.1", "localhost", "::1", *hosts) if h not in names]
    return {"no_proxy": ",".join(names), "NO_PROXY": ",".join(names)}


def goes_through_proxy(url: str) -> bool:
    """Whether this shell's curl and Python would send ``url`` to a proxy."""
    host = urllib.request.Request(url).host
    return "http" in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)

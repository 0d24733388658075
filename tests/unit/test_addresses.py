"""Addresses of both families, wherever one is built, read or listened on."""

from __future__ import annotations

import socket

import pytest

from serve_app import addresses
from serve_app.gateway.replicas import FrontEnd, Replica
from serve_app.replica import gang

HOSTS = ["10.0.0.7", "::1", "2600:1f18:1234:5600::a", "fe80::1%eth0", "head-svc.serve-app.svc"]


@pytest.mark.parametrize("host", HOSTS)
def test_an_address_is_read_as_it_was_written(host: str) -> None:
    assert addresses.split(addresses.join(host, 8000)) == (host, 8000)


@pytest.mark.parametrize(
    "text", ["", ":8000", "here", "here:", "here:http", "::1", "fd00::2:6379", "[::1]", "[]:1"]
)
def test_what_is_no_host_and_port_is_none(text: str) -> None:
    assert addresses.split(text) is None


def test_a_replicas_url_has_its_ipv6_address_in_brackets() -> None:
    assert FrontEnd("r", "fd00::2", 8000, Replica("r")).base_url == "http://[fd00::2]:8000"
    assert FrontEnd("r", "10.0.0.7", 8000, Replica("r")).base_url == "http://10.0.0.7:8000"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_socket_is_of_its_addresss_family(host: str) -> None:
    with socket.socket(addresses.family(host)) as listener:
        listener.bind((host, 0))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_gangs_port_is_free_at_the_address_that_the_others_are_told(host: str) -> None:
    with socket.create_server((host, gang._free_port(host)), family=addresses.family(host)):
        pass


def test_haproxy_listens_on_both_families_at_the_host_that_is_for_both() -> None:
    """Serve writes ``*`` for ``::``, and HAProxy listens on IPv4 alone then."""
    from ray.serve._private.haproxy import HAProxyConfig
    from ray.serve.config import HTTPOptions

    def written(host: str) -> str:
        return HAProxyConfig(http_options=HTTPOptions(host=host)).frontend_host

    assert written("::") == "*"
    assert written(addresses.ANY_IPV6) == addresses.ANY_IPV6
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind((addresses.ANY_IPV6, 0))
        listener.listen()
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, listener.getsockname()[1]), timeout=5).close()

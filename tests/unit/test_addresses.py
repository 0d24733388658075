"""Addresses of both families, wherever one is built, read or listened on."""

from __future__ import annotations

import pytest

from serve_app import addresses

HOSTS = ["10.0.0.7", "::1", "2600:1f18:1234:5600::a", "fe80::1%eth0", "head-svc.serve-app.svc"]


@pytest.mark.parametrize("host", HOSTS)
def test_an_address_is_read_as_it_was_written(host: str) -> None:
    assert addresses.split(addresses.join(host, 8000)) == (host, 8000)


@pytest.mark.parametrize(
    "text", ["", ":8000", "here", "here:", "here:http", "::1", "fd00::2:6379", "[::1]", "[]:1"]
)
def test_what_is_no_host_and_port_is_none(text: str) -> None:
    assert addresses.split(text) is None

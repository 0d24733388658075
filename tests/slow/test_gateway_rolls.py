"""Gateways that are replaced behind HAProxy while clients ask: no request fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import servers
from harness.load import Load
from harness.processes import eventually, free_port
from harness.servers import CHAT, Cluster

from serve_app.config.document import GATEWAY_DEPLOYMENT


@pytest.fixture(scope="module")
def two_gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    config = servers.document(free_port(), servers.chat_application(), gateways=2)
    cluster = Cluster.start(config, tmp_path_factory.mktemp("gateways"), "haproxy")
    try:
        cluster.wait_until_ready()
        assert eventually(lambda: len(gateways(cluster)) == 2, 60)
        yield cluster
    finally:
        left = cluster.interrupt()
    assert not left, f"Ctrl-C left {left}"


def gateways(cluster: Cluster, *states: str) -> set[str]:
    """The ids of the gateways that run, or of those in other states."""
    return set(cluster.replicas("gateway", *states, deployment=GATEWAY_DEPLOYMENT))


def test_an_update_of_the_gateways_under_load_fails_nothing(two_gateways: Cluster) -> None:
    before = gateways(two_gateways)
    config = two_gateways.deployed()
    config["applications"][-1]["args"]["max_body_mib"] += 1
    with Load(two_gateways.base_url, CHAT, streaming=4, whole=4) as load:
        assert eventually(lambda: load.streaming_now >= 2, 60)
        two_gateways.deploy(config)

        def updated() -> bool:
            now = gateways(two_gateways, "STARTING", "RUNNING", "STOPPING")
            return len(now) == 2 and not now & before

        assert eventually(updated, 900, 0.5)
    assert load.lost() == []

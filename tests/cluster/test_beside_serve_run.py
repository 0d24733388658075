"""Our commands in a fresh shell beside a plain `serve run`, which leaves no record for them."""

from __future__ import annotations

import re

from harness.command import typed
from harness.servers import CHAT, EMBED, Cluster


def test_they_find_it_among_the_processes(cluster: Cluster) -> None:
    said = typed("serve-app", "status")
    assert f"{cluster.base_url}/v1 (Ray at {cluster.gcs_address})" in said
    assert all(re.search(rf"{name} +ready +1", said) for name in (CHAT, EMBED)), said
    said = typed("serve-app", "admin", EMBED, "reset-prefix-cache")
    assert re.fullmatch(r"\S+: prefix cache reset\n", said), said
    assert "Ray cluster: 1 nodes" in typed("serve-app", "check", "--cluster", str(cluster.config))
    assert typed("serve-app", "reload", str(cluster.running)).endswith("nothing changed\n")


def test_what_only_a_run_of_ours_has_is_said(cluster: Cluster) -> None:
    assert "no serve-app run is here" in typed("serve-app", "stop", status=2)
    assert "is no serve-app run; its logs are under" in typed("serve-app", "logs", status=2)
    assert "was not started with a config file" in typed("serve-app", "reload", status=2)


def test_env_opens_ray_s_own_commands(cluster: Cluster) -> None:
    exports = typed("serve-app", "env")
    said = typed("bash", "-c", f"{exports}\nserve status")
    assert f"{CHAT}:" in said and "RUNNING" in said

"""A Ray node whose address is IPv6, as every pod of an IPv6 cluster on EKS is."""

from __future__ import annotations

import ipaddress
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from harness import processes, servers
from harness.processes import eventually, free_port

from serve_app import addresses
from serve_app.cluster import haproxy


def address() -> str | None:
    """An IPv6 address of this machine. Not ::1, of which Ray makes the machine's IPv4 address."""
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, _, _, scope, *_ = line.split()
        if scope == "00":  # neither loopback nor of one link
            return str(ipaddress.IPv6Address(bytes.fromhex(digits)))
    return None


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray node at that address, behind HAProxy; its dashboard's URL."""
    host = address()
    if host is None:
        pytest.skip("this machine has no IPv6 address but ::1")
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths must be short
    monkeypatch.setenv("TMPDIR", folder)  # where Ray writes down the cluster of this machine
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_urlsafe(32))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    dashboard = free_port()
    command = [
        *(str(servers.BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", host, "--port", str(free_port()), "--num-cpus", "4"),
        *("--dashboard-host", "::", "--dashboard-port", str(dashboard)),
    ]
    env = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # the harness keeps to the IPv4 loopback
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        **haproxy.environment(),
    }
    log = Path(folder) / "log"
    try:
        for _ in range(2):  # Ray gives a node 30 s, which a busy machine may not keep
            process = processes.start(command, log, **env)
            eventually(lambda p=process: p.poll() is not None or _has_started(log), 120)
            if _has_started(log):
                break
            processes.kill_session(process.pid)
        assert _has_started(log), log.read_text()
        yield f"http://{addresses.join(host, dashboard)}"
    finally:
        processes.kill_session(process.pid)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _has_started(log: Path) -> bool:
    return "Ray runtime started" in log.read_text()


def test_a_model_on_an_ipv6_node_answers_over_both_families(node: str, tmp_path: Path) -> None:
    """``::0`` is what docs/eks.md says to listen on there."""
    config = servers.document(free_port(), servers.embed_application())
    config["http_options"]["host"] = addresses.ANY_IPV6
    path = tmp_path / "config.yaml"
    path.write_text(servers.as_yaml(config))
    deploy = [servers.BIN / "serve", "deploy", str(path), "--address", node]
    assert subprocess.run(deploy, timeout=120, check=False).returncode == 0

    ask = {"model": servers.EMBED, "input": "over here"}
    for host in ("[::1]", "127.0.0.1"):
        base_url = f"http://{host}:{config['http_options']['port']}"
        assert eventually(lambda url=base_url: _is_ready(url), 300, 1), base_url
        answer = httpx.post(f"{base_url}/v1/embeddings", json=ask, timeout=60)
        assert answer.status_code == 200, answer.text

    said = subprocess.run(
        [servers.BIN / "serve-app", "check", str(path), "--cluster"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert "Ray cluster: 1 nodes" in said.stdout


def _is_ready(base_url: str) -> bool:
    try:
        return httpx.get(f"{base_url}/ready", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False

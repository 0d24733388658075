"""A cluster that is killed leaves no engine, and nothing that cannot be cleaned."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import processes, servers
from harness.processes import eventually, free_port, in_session, is_port_free
from harness.servers import EMBED, Cluster

from serve_app.local.orphans import orphans


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster with one small model, behind HAProxy: the proxy that outlives a killed Ray."""
    config = servers.document(free_port(), servers.embed_application())
    cluster = Cluster.start(config, tmp_path, "haproxy")
    try:
        cluster.wait_until_ready()
        yield cluster
    finally:
        processes.kill_session(cluster.process.pid)


def test_after_kill_9_of_serve_run_no_engine_is_left_and_the_rest_can_be_cleaned(
    small: Cluster,
) -> None:
    def engines() -> list[str]:
        return [t for t in in_session(small.process.pid).values() if "VLLM::" in t]

    assert len(engines()) == 1
    small.process.kill()
    small.process.wait()
    assert eventually(lambda: not engines(), within_s=30)

    # What Ray leaves: it gets a moment to go by itself, then the command ends the rest.
    eventually(lambda: not in_session(small.process.pid), within_s=15)
    left = in_session(small.process.pid)
    run = subprocess.run(
        [servers.BIN / "serve-app", "clean-processes"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    ended = {int(pid) for pid in re.findall(r"\(pid (\d+)\)", run.stdout)}
    assert left.keys() <= ended, left
    assert eventually(lambda: not in_session(small.process.pid))
    assert is_port_free(small.port)
    assert not [o for o in orphans() if o.pid in left]


def test_no_engine_outlives_its_replica_or_its_raylet(small: Cluster) -> None:
    """The way of a preemption (SIGTERM) and of an out-of-memory killer (SIGKILL)."""

    def pids(title: str) -> set[int]:
        return {pid for pid, t in in_session(small.process.pid).items() if title in t}

    def end(victim: str, number: signal.Signals) -> None:
        [pid], engines = pids(victim), pids("VLLM::")
        below = processes.descendants(pid) if number == signal.SIGTERM else engines
        assert engines <= below
        since = time.monotonic()
        os.kill(pid, number)
        gone = eventually(lambda: not any(map(processes.title, below)), 30, 0.05)
        seconds = time.monotonic() - since
        print(f"\nMEASURED {number.name} of {victim}: {seconds:.1f} s to the last process")
        assert gone, [processes.title(pid) for pid in below]

    end(f"ray::ServeReplica:{EMBED}:", signal.SIGTERM)
    assert eventually(lambda: pids("VLLM::") and small.ready()[0] == 200, within_s=180)
    end("/raylet/raylet", signal.SIGKILL)
    assert not pids("VLLM::")

"""Nothing is left of a cluster, however it ends; and nothing of anyone else's is touched."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import processes, servers
from harness.processes import eventually, free_port, in_session, is_port_free
from harness.servers import EMBED, Cluster
from openai import OpenAI

from serve_app.local.orphans import Orphan, end, orphans


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


# --- a cluster that is killed ------------------------------------------------------------------


@pytest.mark.slow  # a minute for a cluster of its own
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


@pytest.mark.slow
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


# --- serve-app run -----------------------------------------------------------------------------


@pytest.mark.slow
def test_serve_app_run_says_how_to_ask_and_leaves_nothing_after_ctrl_c(tmp_path: Path) -> None:
    config = servers.document(free_port(), servers.embed_application())
    path = tmp_path / "config.yaml"
    path.write_text(servers.as_yaml(config))
    port = config["http_options"]["port"]
    log = tmp_path / "out"
    command = [str(servers.BIN / "serve-app"), "run", str(path)]
    run = processes.start(command, log)
    try:
        assert eventually(lambda: "Ctrl-C ends it." in log.read_text(), within_s=300), (
            log.read_text()
        )
        said = log.read_text()
        assert re.search(rf"^{re.escape(EMBED)} is ready \(\d+ s\)$", said, re.MULTILINE)

        # The snippet is to be copied and run as it is.
        snippet = said[said.index("from openai import OpenAI") : said.index("\nCtrl-C ends it.")]
        asked = subprocess.run(
            [sys.executable, "-c", snippet], capture_output=True, text=True, timeout=60, check=True
        )
        assert asked.stdout == "384\n"
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-") as client:
            assert EMBED in [m.id for m in client.models.list()]

        # A second one finds the port taken and says so at once.
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 2
        assert second.stderr.startswith(f"serve-app: port {port} is taken")
        assert len(second.stderr.splitlines()) == 1

        [serve] = children(run.pid)
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=120) == 0
    finally:
        left = in_session(run.pid)
        processes.kill_session(run.pid)
    assert not left
    assert not in_session(serve)
    assert is_port_free(port)
    assert "Traceback" not in log.read_text()


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


# --- what is ours and what is not ----------------------------------------------------------------


def orphaned(title: str, **env: str) -> int:
    """A process of no parent that calls itself ``title``; its pid."""
    script = "bash -c 'exec -a \"$TITLE\" sleep 300' >/dev/null & echo $!"
    made = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": os.environ["PATH"], "TITLE": title, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=10,
        check=True,
    )
    return int(made.stdout)


RAY = f"{sys.prefix}/lib/python3.11/site-packages/ray"
OURS = {"VIRTUAL_ENV": sys.prefix}


@pytest.mark.parametrize(
    ("title", "env", "name"),
    [
        ("VLLM::EngineCore", OURS, "VLLM::EngineCore"),
        ("VLLM::Worker_TP1", OURS, "VLLM::Worker_TP1"),
        ("ray::ServeReplica:m:ModelServer", OURS, "ray::ServeReplica:m:ModelServer"),
        ("ray::IDLE", {"PATH_TO": f"{sys.prefix}/bin"}, "ray::IDLE"),
        (f"{RAY}_haproxy/bin/haproxy", {}, "haproxy"),
        # `ray start` leaves its daemons without a parent: they may be a cluster at work.
        (f"{RAY}/core/src/ray/raylet/raylet", {}, None),
        ("VLLM::EngineCore", {}, None),
        ("VLLM::EngineCore", {"VIRTUAL_ENV": f"{sys.prefix}-other"}, None),
        ("ray::IDLE", {"VIRTUAL_ENV": "/opt/other"}, None),
        ("/usr/sbin/haproxy", OURS, None),
        (f"{sys.prefix}-other/bin/haproxy", OURS, None),
        (f"{sys.prefix}/bin/python", OURS, None),
        ("sleep", OURS, None),
    ],
)
def test_an_orphan_is_ours_by_its_name_and_its_environment(
    title: str, env: dict[str, str], name: str | None
) -> None:
    pid = orphaned(title, **env)
    try:
        assert eventually(lambda: title in Path(f"/proc/{pid}/cmdline").read_text())
        assert [o.name for o in orphans() if o.pid == pid] == ([name] if name else [])
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_process_that_has_its_parent_is_no_orphan() -> None:
    script = "exec -a VLLM::EngineCore sleep 300"
    child = subprocess.Popen(["bash", "-c", script], env={"PATH": os.environ["PATH"], **OURS})
    try:
        assert eventually(lambda: "VLLM" in Path(f"/proc/{child.pid}/cmdline").read_text())
        assert child.pid not in [o.pid for o in orphans()]
    finally:
        child.kill()
        child.wait()


def test_an_orphan_that_does_not_listen_is_killed() -> None:
    stubborn = subprocess.Popen(
        [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); "
         "print(flush=True); time.sleep(300)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    polite = subprocess.Popen(["sleep", "300"])
    assert stubborn.stdout and stubborn.stdout.readline()
    left = end([Orphan(stubborn.pid, "a"), Orphan(10**9, "gone")], patience_s=0.5)
    assert [o.name for o in left] == ["a"]
    assert stubborn.wait(timeout=10) == -signal.SIGKILL
    end([Orphan(polite.pid, "b")], patience_s=0.5)
    assert polite.wait(timeout=10) == -signal.SIGTERM


def test_a_process_that_is_to_ends_with_its_parent() -> None:
    child = "from serve_app.lifeline import exit_with_parent as e; import time; e(); "
    child += "print('ready', flush=True); time.sleep(300)"
    script = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    script += "print(c.pid, flush=True); c.wait()"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    try:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        parent.wait()
        assert eventually(lambda: not processes.title(pid))
    finally:
        if processes.title(pid):
            os.kill(pid, signal.SIGKILL)


def test_with_nothing_left_behind_the_command_says_so() -> None:
    if orphans():
        pytest.skip("something else on this machine left orphans")
    run = subprocess.run(
        [servers.BIN / "serve-app", "clean-processes"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout == "nothing left behind\n"

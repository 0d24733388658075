"""Which processes a killed cluster left: ours are ended, and nobody else's are touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import processes, servers
from harness.processes import eventually

from serve_app.local.orphans import Orphan, end, orphans

# --- what is ours and what is not ----------------------------------------------------------------


def orphaned(title: str, **env: str) -> int:
    """A process of no parent that calls itself ``title``; its pid."""
    script = "bash -c 'exec -a \"$TITLE\" sleep 300' >/dev/null & echo $!"
    made = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": os.defpath, "TITLE": title, **env},
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

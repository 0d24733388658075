"""The rendered preStop hook, run as a pod runs it: in a process namespace of its own."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from harness.manifests import bundle

UNSHARE = ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]

REPLICA = "ray::ServeReplica:llama-3.3-70b:ModelServer"
"""How Ray calls a replica's process."""

POD = """\
export PATH="{folder}:$PATH"
cd "{folder}"
if [ -e replica ]; then
  bash -c 'exec -a "$(cat replica)" /bin/sleep 600' & replica=$!
  until tr '\\0' ' ' < /proc/$replica/cmdline | grep -q '^ray::'; do /bin/sleep 0.05; done
fi
bash -c "$(cat prestop)" & hook=$!
if [ -n "$replica" ]; then
  until [ -e end ]; do /bin/sleep 0.05; done
  kill $replica
fi
wait $hook
echo "$?" > ended
"""


@pytest.fixture(scope="module", autouse=True)
def namespace() -> None:
    try:
        tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare (util-linux)")
    if tried.returncode:
        pytest.skip(f"may not make a process namespace: {tried.stderr.strip()}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The hook, and the commands that it calls: `ray` is told apart, `sleep` is short."""
    (service,) = [d for d in bundle("llama70b") if d["kind"] == "RayService"]
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]
    hook = group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[:2] == ["bash", "-c"]
    (tmp_path / "prestop").write_text(hook[2])
    for name, does in {"ray": ":", "sleep": "/bin/sleep 0.05"}.items():
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n{does}\n')
        stub.chmod(0o755)
    (tmp_path / "pod").write_text(POD.format(folder=tmp_path))
    return tmp_path


def started(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*UNSHARE, "bash", str(folder / "pod")])


def called(folder: Path) -> list[str]:
    calls = folder / "called"
    return calls.read_text().splitlines() if calls.exists() else []


def test_a_pod_without_a_replica_ends_at_once(folder: Path) -> None:
    """It found itself, and kept its machine for its whole limit: 26 minutes."""
    pod = started(folder)
    try:
        pod.wait(30)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it waits though no replica is there: {len(called(folder))} calls")
    finally:
        pod.kill()
        pod.wait()
    drain, *waits = called(folder)
    assert drain.startswith("ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION")
    assert waits == ["sleep 15"]
    assert (folder / "ended").read_text() == "0\n"


def test_a_pod_waits_for_its_replica_and_ends_with_it(folder: Path) -> None:
    (folder / "replica").write_text(REPLICA)
    pod = started(folder)
    try:
        deadline = time.monotonic() + 30
        while called(folder).count("sleep 2") < 3:
            assert time.monotonic() < deadline, called(folder)
            assert pod.poll() is None, "it did not wait for the replica"
            time.sleep(0.05)
        assert "sleep 15" not in called(folder)
        (folder / "end").touch()
        pod.wait(30)
    finally:
        pod.kill()
        pod.wait()
    assert called(folder)[-1] == "sleep 15"
    assert (folder / "ended").read_text() == "0\n"

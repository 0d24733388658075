"""A running `serve-app run`, and a second terminal of the same user beside it.

The commands get the environment of a fresh shell: none of the variables by which the tests' harness
finds its clusters. In a pytest of its own (see the Makefile), because `serve status` asks port 8265
and no other Ray may have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from harness.command import typed
from harness.local_run import Run
from harness.processes import eventually
from harness.servers import EMBED


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    # Without RAY_AUTH_MODE, as a user has it: Ray makes a token then. (The harness sets it.)
    folder = tmp_path_factory.mktemp("run")
    run = Run(folder, RAY_AUTH_MODE="", options=("--watch",), with_keys=True)
    run.start()
    try:
        run.wait_until_ready()
        yield run
    finally:
        run.kill()


def test_serve_status_and_serve_deploy_reach_it(run: Run) -> None:
    report = yaml.safe_load(typed("serve", "status"))
    assert {a["status"] for a in report["applications"].values()} == {"RUNNING"}
    typed("serve", "deploy", str(run.config))
    assert run.embeds() == 384


def test_its_gateway_asks_for_a_key_and_its_commands_have_one(run: Run) -> None:
    url = f"http://127.0.0.1:{run.port}"
    assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401
    assert httpx.get(f"{url}/ready", trust_env=False).json()["models"] == {}
    assert run.models() == [EMBED]
    added = typed("serve-app", "keys", "new", "ann", "--file", str(run.folder / "keys.yaml"))
    headers = {"x-api-key": added.split()[0]}

    def lets_in() -> bool:
        return httpx.get(f"{url}/v1/models", headers=headers, trust_env=False).status_code == 200

    assert eventually(lets_in, 30, 0.2)
    typed("serve-app", "keys", "revoke", str(run.folder / "keys.yaml"), "ann")
    assert eventually(lambda: not lets_in(), 30, 0.2)


def test_env_is_for_every_other_command_of_ray(run: Run) -> None:
    exports = typed("serve-app", "env")
    said = typed("bash", "-c", f"{exports}\nserve status && ray status")
    assert f"{EMBED}:" in said and "Active:" in said
    assert typed("bash", "-c", f"{exports}\nserve-app reload") == "nothing changed\n"


def test_status_admin_and_check_reach_it(run: Run) -> None:
    said = typed("serve-app", "status")
    assert f"http://127.0.0.1:{run.port}/v1" in said
    assert re.search(rf"{EMBED} +ready +1", said)
    said = typed("serve-app", "admin", EMBED, "reset-prefix-cache")
    assert re.fullmatch(r"\S+: .*reset.*\n", said), said
    said = typed("serve-app", "check", "--cluster", str(run.config))
    assert "Ray cluster: 1 nodes, 0 GPUs" in " ".join(said.split())


def test_the_log_of_its_model(run: Run) -> None:
    said = typed("serve-app", "logs", EMBED, "--tail", "1000")
    assert "start: starting the engine" in said
    assert all(line.startswith(f"(ServeReplica:{EMBED}:") for line in said.splitlines())
    assert len(typed("serve-app", "logs", "--tail", "3").splitlines()) == 3
    assert "there is no model 'x'" in typed("serve-app", "logs", "x", status=2)


def test_reload_says_what_it_did(run: Run, tmp_path: Path) -> None:
    assert typed("serve-app", "reload") == "nothing changed\n"
    document = yaml.safe_load(run.config.read_text())
    [model, gateway] = document["applications"]
    model["deployments"] = [{"name": "ModelServer", "health_check_period_s": 7}]
    second = tmp_path / "second.yaml"
    second.write_text(yaml.safe_dump(document))
    said = typed("serve-app", "reload", str(second)).splitlines()
    assert f"{EMBED}: updated in place (same replicas)" in said
    assert f"{gateway['name']}: kept" in said
    assert run.embeds() == 384
    model["args"]["engine"]["max_model_length"] = 5
    second.write_text(yaml.safe_dump(document))
    [line] = typed("serve-app", "reload", str(second), status=2).splitlines()
    assert "engine.max_model_length is not an argument of vLLM" in line
    # What would take a working model down for one that cannot come up.
    del model["args"]["engine"]["max_model_length"]
    for wrong, told in (
        ({"engine": {"max_model_len": 100_000_000}}, "is above the model's 256; set it to 256"),
        ({"resources": {"device": "cpu", "num_cpus": 5000}}, "num_cpus is 5000, and this machine"),
        ({"resources": {"device": "gpu"}}, "this machine has none; set resources.device: cpu"),
    ):
        changed = {**model, "args": {**model["args"], **wrong}}
        second.write_text(yaml.safe_dump({**document, "applications": [changed, gateway]}))
        [line] = typed("serve-app", "reload", str(second), status=2).splitlines()
        assert told in line
    (tmp_path / "broken.yaml").write_text("- {name: a, hsah: x}")
    for wrong, told in (
        ({"usage_dir": "/etc/passwd"}, "usage_dir: /etc/passwd cannot be written"),
        ({"keys": {"file": str(tmp_path / "broken.yaml")}}, "did you mean 'hash'?"),
    ):
        changed = {**gateway, "args": {**gateway["args"], **wrong}}
        second.write_text(yaml.safe_dump({**document, "applications": [model, changed]}))
        [line] = typed("serve-app", "reload", str(second), status=2).splitlines()
        assert told in line
    assert run.embeds() == 384


def test_a_changed_file_is_applied_by_itself(run: Run) -> None:
    document = yaml.safe_load(run.config.read_text())
    [model, _] = document["applications"]
    model["args"]["engine"]["max_model_length"] = 5
    good = run.config.read_text()
    run.config.write_text(yaml.safe_dump(document))
    said = lambda: run.out.read_text()  # noqa: E731
    assert eventually(lambda: "nothing was changed: " in said(), 60, 0.5), said()
    del model["args"]["engine"]["max_model_length"]
    model["deployments"] = [{"name": "ModelServer", "health_check_period_s": 8}]
    run.config.write_text(yaml.safe_dump(document))
    told = f"{EMBED}: updated in place (same replicas)"
    assert eventually(lambda: told in said(), 120, 0.5), said()
    assert run.embeds() == 384
    run.config.write_text(good)


def test_stop_ends_it(run: Run) -> None:
    stopped = f"stopped the server of port {run.port}"

    def stop() -> None:
        assert stopped in typed("serve-app", "stop").splitlines()

    left = run.left_by(stop)
    assert left == {}
    assert "nothing is served here" in typed("serve-app", "status", status=2)

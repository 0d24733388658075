"""`serve-app run` from its start to Ctrl-C, on the machines that people have."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import processes, servers
from harness.local_run import Run
from harness.processes import children, eventually, free_port, in_session, is_port_free
from harness.servers import EMBED
from openai import OpenAI

from serve_app.local import logs


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


# ------------------------------------------------------------------- strange machines


def _few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))


@pytest.mark.parametrize(
    ("env", "before", "number"),
    [
        ({"TMPDIR": "long"}, None, signal.SIGTERM),
        ({"HOME": ""}, _few_files, signal.SIGHUP),
    ],
    ids=["a long TMPDIR, SIGTERM", "no HOME, 1024 files, SIGHUP"],
)
def test_a_strange_machine_serves_too(
    env: dict[str, str], before: Callable[[], Any] | None, number: signal.Signals, tmp_path: Path
) -> None:
    folder = tmp_path / "/".join(["a path of 150 characters and more"] * 5)
    folder.mkdir(parents=True)
    if env.get("TMPDIR") == "long":
        env = {"TMPDIR": str(folder)}
    run = Run(folder, **env)
    run.before = before
    run.start()
    try:
        run.wait_until_ready()
        assert run.embeds() == 384
        assert run.end(number) == {}
    finally:
        run.kill()


def test_two_at_once_each_with_its_own(tmp_path: Path) -> None:
    """Behind HAProxy, whose files and ports Ray keeps at fixed places."""
    runs = []
    try:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            run = Run(tmp_path / name, name=name, RAY_SERVE_ENABLE_HA_PROXY="1")
            run.start()
            runs.append(run)
        for run in runs:
            run.wait_until_ready()
        for run in runs:
            assert run.models() == [run.name]
            assert run.embeds() == 384
        first, second = runs
        assert first.end() == {}
        assert second.models() == ["two"]
        assert second.embeds() == 384
        assert second.end() == {}
    finally:
        for run in runs:
            run.kill()


def test_output_that_nobody_reads_any_more_ends_nothing(tmp_path: Path) -> None:
    """`serve-app run … | head`: the reader goes, the server stays."""
    run = Run(tmp_path)
    reader, writer = os.pipe()
    run.before = lambda: (os.dup2(writer, 1), None)[1]
    run.start()
    os.close(writer)
    os.close(reader)
    try:

        def ready() -> bool:
            assert run.process.poll() is None, run.out.read_text()
            try:
                url = f"http://127.0.0.1:{run.port}/ready"
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        assert eventually(ready, 300, 0.5), run.out.read_text()
        assert run.embeds() == 384
        assert run.end(signal.SIGTERM) == {}
    finally:
        run.kill()


# ------------------------------------------------------------------- how it ends


def test_a_gateway_that_cannot_start_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    run = Run(tmp_path, options=("--no-check",))  # without it nothing would start
    document = yaml.safe_load(run.config.read_text())
    document["applications"][-1]["args"]["usage_dir"] = "/etc/passwd"
    run.config.write_text(yaml.safe_dump(document))
    run.start()
    try:
        assert run.process.wait(timeout=300) == 2
        said = run.out.read_text()
        why = "usage_dir: /etc/passwd cannot be written"
        assert f"serve-app: the gateway failed: {why}" in said
        assert "Traceback" not in said
        log = Path(re.findall(r"full log: (\S+)", said)[0])
        told = list(logs.read(log, "gateway", tail=10))
        assert any(f"the gateway cannot start: {why}" in line for line in told)
    finally:
        run.kill()


def test_a_running_answer_ends_before_its_server(tmp_path: Path) -> None:
    run = Run(tmp_path, name="chat")
    document = yaml.safe_load(run.config.read_text())
    args = servers.demo_args("smollm2-135m") | {"served_as": []}
    args["model"] = str(processes.REPO / args["model"])
    document["applications"][0]["args"] = args
    run.config.write_text(yaml.safe_dump(document))
    run.start()
    try:
        run.wait_until_ready()
        with OpenAI(base_url=f"http://127.0.0.1:{run.port}/v1", api_key="-") as client:
            stream = client.chat.completions.create(
                model="chat",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=100,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            next(stream)
            run.process.send_signal(signal.SIGINT)
            last = [chunk.choices[0] for chunk in stream if chunk.choices][-1]
        assert last.finish_reason == "length"
        assert run.process.wait(timeout=120) == 0
        assert "1 request is running and may take 30 s to end" in run.out.read_text()
    finally:
        run.kill()

"""What the README and ``serve-app run`` tell a newcomer to type, typed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from harness.processes import REPO
from harness.servers import BIN, CHAT, EMBED, Cluster

from serve_app.config.document import load
from serve_app.local.endpoint import Endpoint
from serve_app.local.first_request import how_to_ask

README = (REPO / "README.md").read_text()
DEMO = load(REPO / "configs/demo.yaml")
PRINTED = how_to_ask(DEMO, Endpoint.of(DEMO))


def here(text: str, cluster: Cluster) -> str:
    """The same words for the models and the port of this cluster."""
    for word, ours in (
        ("smollm2-135m", CHAT),
        ("all-minilm-l6-v2", EMBED),
        (":8000", f":{cluster.port}"),
    ):
        assert word in text
        text = text.replace(word, ours)
    return text


@pytest.mark.parametrize(
    "snippet",
    [
        re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0],
        re.findall(r"^from openai .*?(?=^Ctrl-C)", PRINTED, re.DOTALL | re.MULTILINE)[0],
    ],
    ids=["README", "serve-app run"],
)
def test_the_snippet_answers(snippet: str, cluster: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, "-c", here(snippet, cluster)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "The capital of France is Paris.\n384\n", done.stderr


def test_the_terminal_s_chat_finds_the_chat_model_and_answers(cluster: Cluster) -> None:
    done = subprocess.run(
        [BIN / "serve-app", "chat", "--port", str(cluster.port)],
        input="What is the capital of France?",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout


def test_the_curl_command_answers(cluster: Cluster) -> None:
    command = re.findall(r"^curl .*?(?=^$)", PRINTED, re.DOTALL | re.MULTILINE)[0]
    command = command.replace("smollm2-135m", CHAT).replace(":8000", f":{cluster.port}")
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert "The capital of France is Paris." in done.stdout, done.stderr

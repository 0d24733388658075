"""docs/recipes with the real clients, each from its page: ``make test-recipes`` installs them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from harness import processes, recipes
from harness.processes import REPO
from harness.recipes import said
from harness.servers import Cluster

CLIENTS = REPO / ".cache/recipes"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def command(name: str, environment: str) -> Path:
    """A command of one of the environments that `make test-recipes` makes."""
    found = CLIENTS / environment / name
    if not found.exists():
        pytest.skip(f"{found.relative_to(REPO)} is not there; make test-recipes installs it")
    return found


@contextmanager
def served(config: str, folder: Path) -> Iterator[str]:
    """``host:port`` of a server with a config of configs/."""
    document = yaml.safe_load((REPO / "configs" / config).read_text())
    document["http_options"]["port"] = processes.free_port()
    cluster = Cluster.start(document, folder, "haproxy")
    try:
        cluster.wait_until_ready()
        yield f"127.0.0.1:{cluster.port}"
    finally:
        cluster.interrupt()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served("demo.yaml", tmp_path_factory.mktemp("demo")) as address:
        yield address


@contextmanager
def started(page: str, cwd: Path, words: dict[str, str], **env: str) -> Iterator[None]:
    """The server that a page's first sh block ends with, with the exports of all its sh blocks."""
    blocks = recipes.blocks(page, "sh")
    lines = recipes.replaced("".join([*blocks[1:], blocks[0]]), words).splitlines()
    exports = [line for line in lines if line.startswith("export ")]
    start = lines[-1]
    log = cwd / "log"
    script = "\n".join([f"cd {shlex.quote(str(cwd))}", *exports, f"exec {start}"])
    process = processes.start(["bash", "-ec", script], log, **env)
    try:
        yield
    except Exception as error:
        error.add_note(log.read_text(errors="replace")[-4000:])
        raise
    finally:
        processes.kill_session(process.pid)
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_langchain(demo: str) -> None:
    python = command("python", "recipes/bin")
    [program] = recipes.blocks("langchain.md", "python")
    printed = recipes.output(recipes.replaced(program, {"127.0.0.1:8000": demo}), python)
    assert said(printed, "answer")[0]
    assert int(said(printed, "pieces")[0]) > 1
    assert said(printed, "vectors") == ["2 of 384"]
    [call] = said(printed, "call")
    assert call.startswith("get_weather {'city': '") and "sunny in" in call
    assert said(printed, "place")[0].startswith("city='")


def test_litellm_in_front(demo: str, tmp_path: Path) -> None:
    python = command("python", "recipes/bin")
    [config] = recipes.blocks("litellm.md", "yaml")
    (tmp_path / "litellm.yaml").write_text(recipes.replaced(config, {"127.0.0.1:8000": demo}))
    port = str(processes.free_port())
    key = "sk-a-key-of-this-test-that-nobody-else-has"
    path = f"{python.parent}:{os.environ['PATH']}"
    made_up = "sk-$(openssl rand -hex 32)"
    words = {"4000": port, made_up: key}
    with started("litellm.md", tmp_path, words, PATH=path, LITELLM_LOCAL_MODEL_COST_MAP="True"):
        url = f"http://127.0.0.1:{port}"
        assert processes.eventually(lambda: answers(f"{url}/health/liveliness"), 240, 0.5)
        [program] = recipes.blocks("litellm.md", "python")
        program = recipes.replaced(program, {"4000": port})
        printed = recipes.output(program, python, LITELLM_MASTER_KEY=key)
        refused = httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer sk-other"})
    assert said(printed, "models") == ["['all-minilm-l6-v2', 'smollm2-135m']"]
    assert said(printed, "answer") == ["The capital of France is Paris."]
    assert int(said(printed, "pieces")[0]) > 1
    assert said(printed, "vector") == ["384"]
    assert said(printed, "best") == ["1"]
    assert refused.status_code >= 400


def test_claude_code(demo: str, tmp_path: Path) -> None:
    claude = command("claude", "claude-code/node_modules/.bin")
    *before, line = recipes.replaced(
        recipes.blocks("anthropic.md", "sh")[0], {"127.0.0.1:8000": demo}
    ).splitlines()
    exports = [export for export in before if export.startswith("export ")]
    env = {"PATH": f"{claude.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}

    def run(*lines: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-ec", "\n".join(lines)],
            cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=240,
        )  # fmt: skip

    asked = run(*exports, line)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert asked.stdout.strip()
    # As it comes, it asks for more than the demo's context, and shows what it was told.
    usual = run(*exports, "unset CLAUDE_CODE_MAX_OUTPUT_TOKENS", 'claude -p "Say hi"')
    assert usual.returncode == 1
    assert "API Error: 400 max_completion_tokens=32000" in usual.stdout


def test_open_webui(demo: str, tmp_path: Path) -> None:
    bin = command("open-webui", "open-webui/bin").parent
    port = str(processes.free_port())
    env = {"PATH": f"{bin}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OFFLINE_MODE": "True"}
    words = {"127.0.0.1:8000": demo, "8080": port, "MODEL=reranker": "MODEL=all-minilm-l6-v2"}
    with started("open-webui.md", tmp_path, words, **env):
        url = f"http://127.0.0.1:{port}"
        assert processes.eventually(lambda: answers(f"{url}/health"), 240, 0.5)
        with httpx.Client(base_url=url, timeout=240) as browser:
            _chat_with_a_document(browser)
    assert "ExternalReranker:predict:model all-minilm-l6-v2" in (tmp_path / "log").read_text()


def _chat_with_a_document(browser: httpx.Client) -> None:
    """What the page in the browser asks of Open WebUI."""
    signed_in = browser.post("/api/v1/auths/signin", json={"email": "", "password": ""}).json()
    browser.headers["authorization"] = f"Bearer {signed_in['token']}"
    models = browser.get("/api/models").json()["data"]
    assert [model["id"] for model in models] == ["smollm2-135m"]

    chat: dict[str, Any] = {"model": "smollm2-135m", "messages": QUESTION, "stream": True}
    stream = browser.post("/api/chat/completions", json=chat | {"temperature": 0}).text
    events = [json.loads(e[6:]) for e in stream.split("\n\n") if e.startswith("data: {")]
    deltas = [e["choices"][0]["delta"].get("content") for e in events if e.get("choices")]
    assert "".join(filter(None, deltas)) == "The capital of France is Paris."

    text = "The library is closed on Sundays."
    uploaded = browser.post("/api/v1/files/", files={"file": ("library.txt", text, "text/plain")})
    file = uploaded.json()["id"]

    def embedded() -> bool:
        data = browser.get(f"/api/v1/files/{file}").json()["data"]
        assert data.get("status") != "failed", data
        return data.get("status") == "completed"

    assert processes.eventually(embedded, 60, 0.5)
    with_document = chat | {"files": [{"type": "file", "id": file}], "max_tokens": 20}
    answer = browser.post("/api/chat/completions", json=with_document).text
    sources = json.loads(answer.split("data: ", 1)[1].splitlines()[0])["sources"]
    assert text in sources[0]["document"]


def test_rag(tmp_path: Path) -> None:
    python = command("python", "recipes/bin")
    [program] = recipes.blocks("rag.md", "python")
    assert len(program.splitlines()) <= 60
    with served("rag.yaml", tmp_path) as address:
        words = {"127.0.0.1:8000": address}
        printed = recipes.output(recipes.replaced(program, words), python, cwd=tmp_path)
    best, second, *_ = printed.splitlines()
    assert "Mill Lane" in best
    assert float(best.split()[0]) > float(second.split()[0])
    assert said(printed, "answer")[0]
    assert (tmp_path / "rag.db").exists()

"""Shared servers. Each starts once, when the first test asks for it, and is expensive:
about a minute on two cores. Tests that take ``cluster`` run behind HAProxy; those of
``_WIRE``, with ``--both-proxies`` all, behind Serve's Python proxy too.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
from harness import processes, servers
from harness.servers import BareVllm, Cluster, ModelPort

from serve_app import lifeline

_ENGINES = {"cluster", "bare_chat", "bare_embed", "other", "demo_server"}
"""Fixtures of tests/cluster and tests/docs that start Ray or real engines."""

_WIRE = {
    "test_beside_serve_run", "test_conformance_http", "test_fleet", "test_page_live", "test_wire",
}  # fmt: skip
"""Modules that a proxy can break: streams, heads, what is cut, what comes at once."""

_SLOW = {
    Path(__file__).parent / "slow": 1800,  # several engines start, 30 to 190 s each
    Path(__file__).parent / "image": 7200,  # an image is built
    Path(__file__).parent / "recipes": 900,  # a server of its own starts
}
"""Folders of slow tests, and the seconds that one may take."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--left-out", type=Path, help="add what was skipped, and why, to this file")
    parser.addoption("--both-proxies", action="store_true", help="not only what a proxy can break")
    parser.addoption("--screenshots", type=Path, help="write the page's pictures into this folder")
    parser.addoption("--kube-context", help="run the day-two tests on this kubeconfig context")
    parser.addoption("--kube-image", default="", help="the image of target cpu for them")


def pytest_configure(config: pytest.Config) -> None:
    # Else each `serve-app run` of the tests writes into the usage of whoever runs them.
    state = tempfile.TemporaryDirectory()
    os.environ["XDG_STATE_HOME"] = state.name
    config.add_cleanup(state.cleanup)


def pytest_sessionstart(session: pytest.Session) -> None:
    """A Ctrl-C, and the end of the process that started this one, end what fixtures have started:
    also in the background of `make test`, where it would not be heard."""
    lifeline.interrupt_with_parent()

    def end(number: int, frame: object) -> None:
        if not session.shouldstop:  # a second one would end fixtures within their own end
            session.shouldstop = "interrupted"  # where what is tested catches the exception
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, end)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--both-proxies"):
        once = [it for it in items if _proxy(it) == "python" and it.path.stem not in _WIRE]
        items[:] = [it for it in items if it not in once]
        config.hook.pytest_deselected(items=once)
    for item in items:
        for folder in _SLOW.keys() & set(item.path.parents):
            item.add_marker("slow")
            item.add_marker(pytest.mark.timeout(_SLOW[folder]))
        if _ENGINES & set(getattr(item, "fixturenames", ())):
            item.add_marker("engine")


def _proxy(item: pytest.Item) -> str | None:
    return item.callspec.params.get("cluster") if hasattr(item, "callspec") else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    file = terminalreporter.config.getoption("--left-out")
    skipped = terminalreporter.stats.get("skipped", [])
    if file and skipped:
        why = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
        with file.open("a") as out:
            out.writelines(f"{count} tests: {reason}\n" for reason, count in why.items())


@pytest.fixture(scope="session", params=["python", "haproxy"])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """The demo's two models behind the gateway; with HAProxy, behind two gateways."""
    proxy = request.param
    config = servers.document(
        processes.free_port(),
        servers.chat_application(),
        servers.embed_application(),
        gateways=2 if proxy == "haproxy" else 1,
    )
    with servers.running(config, tmp_path_factory.mktemp(proxy), proxy) as cluster:
        yield cluster
    assert "Controller failed to shut down" not in cluster.tail()  # Serve gave up, after 30 s
    assert processes.is_port_free(cluster.port)


@pytest.fixture(scope="session")
def chat_port(cluster: Cluster) -> ModelPort:
    return servers.model_port(servers.CHAT)


@pytest.fixture(scope="session")
def embed_port(cluster: Cluster) -> ModelPort:
    return servers.model_port(servers.EMBED)


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[BareVllm, BareVllm]]:
    """Both models without us. They start at once: each keeps one core busy for half a minute."""
    applications = servers.chat_application(), servers.embed_application()
    chat, embed = (BareVllm.start(it, tmp_path_factory.mktemp("bare")) for it in applications)
    try:
        chat.wait_until_ready()
        embed.wait_until_ready()
        yield chat, embed
    finally:
        chat.stop()
        embed.stop()


@pytest.fixture(scope="session")
def bare_chat(bare: tuple[BareVllm, BareVllm]) -> BareVllm:
    return bare[0]


@pytest.fixture(scope="session")
def bare_embed(bare: tuple[BareVllm, BareVllm]) -> BareVllm:
    return bare[1]


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{cluster.base_url}/v1", api_key="-", max_retries=0, timeout=180
    ) as client:
        yield client


@pytest.fixture
def claude(cluster: Cluster) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=cluster.base_url, api_key="-", max_retries=0, timeout=180
    ) as client:
        yield client


@pytest.fixture
def http(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.base_url, timeout=180) as client:
        yield client

"""What the documentation tells to type beside a running server, typed beside one.

The server is `serve-app run configs/demo.yaml` in a fresh checkout, as README has it; only its
port is another. Commands are run by bash in that folder, as a second terminal would.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import ways
from harness import documented, shell
from harness.documented import Block, Command
from harness.local_run import Demo
from harness.servers import BIN
from reader import checkout
from ways import NoWay, Way

from serve_app.config.document import load

ELSEWHERE = {
    r"serve-app stop\b": "it ends the server: tests/cluster/test_local_run.py",
    r"serve-app admin \S+ (sleep|wake)\b": "needs engine.enable_sleep_mode, and so a GPU",
}
"""Commands that are not for this server, with the reason."""

TYPED = {"serve-app chat": "What is the capital of France?\n"}
"""What a reader types into a command."""


class Server(Demo):
    """With what a reader does beside it."""

    def __init__(self, tmp: pytest.TempPathFactory) -> None:
        super().__init__(checkout(tmp.mktemp("server") / "serve_app"))
        self.served = set(load(self.config).models)

    def here(self, text: str) -> str:
        """The same words for this server: its port, and its models for all others."""

        def model(match: re.Match[str]) -> str:
            known = match[2] in self.served or "/" in match[2]
            return match[0] if known else f"{match[1]}smollm2-135m{match[3]}"

        text = ways.LOCAL.sub(lambda m: m[0].replace("8000", str(self.port)), text)
        # A server has one config; one that is not there stays what it is, a mistake.
        for config in (self.folder / "configs").glob("*.yaml"):
            text = text.replace(f"configs/{config.name}", "configs/demo.yaml")
        return re.sub(r"""(["']?model["']?\s*[:=]\s*["'])([^"']+)(["'])""", model, text)

    def types(self, command: str) -> str:
        """What a command prints in a second terminal.

        Raises:
            NoWay: it fails, or prints an error of the API.
        """
        text = re.sub(r" (--follow|-f)\b", "", command) if "logs" in command else command
        if re.match(r"(serve|ray) ", text):
            text = f'eval "$(serve-app env)"; {text}'
        typed = next((said for start, said in TYPED.items() if command.startswith(start)), "")
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.folder, input=typed, capture_output=True, text=True,
            timeout=180, env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}, check=False,
        )  # fmt: skip
        if done.returncode:
            raise NoWay(f"exit status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        if is_an_error(done.stdout):
            raise NoWay(f"it prints an error: {done.stdout[:1500]}")
        return done.stdout

    def runs(self, code: str) -> list[str]:
        """The lines that a Python snippet prints."""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, capture_output=True, text=True,
            timeout=180, check=False,
        )  # fmt: skip
        assert not done.returncode, done.stderr[-2000:]
        return done.stdout.splitlines()


def is_an_error(output: str) -> bool:
    try:
        answer = json.loads(output)
    except ValueError:
        return False
    return isinstance(answer, dict) and bool(answer.get("error"))


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory)
    server.start()
    try:
        server.wait_until_ready()
        yield server
        left = server.end()
    finally:
        server.kill()
    assert not left


def at_a_server(command: Command) -> bool:
    """Whether a line of a page has a command that needs the server."""
    text = ways.filled_in(command)
    if "…" in text or any(re.search(pattern, text) for pattern in ELSEWHERE):
        return False
    for one in shell.simple_commands(text, ways.ANSWERS):
        words = [word.removeprefix(".venv/bin/") for word in one.words]
        try:
            if words and ways.way_of(words, whole=True) is Way.SERVER:
                return True
        except NoWay:
            pass  # incomplete, in a sentence, or wrong: test_commands.py tells
    return False


def test_every_command_beside_a_server_works(demo_server: Server) -> None:
    found: dict[str, Command] = {}
    for page in documented.PAGES:
        for command in documented.commands(page):
            if at_a_server(command):
                found.setdefault(demo_server.here(ways.filled_in(command)), command)
    assert found
    problems = []
    for text, command in found.items():
        try:
            demo_server.types(text)
        except (NoWay, subprocess.TimeoutExpired) as error:
            problems.append(f"{command.where}: {command.text}\n    {error}")
    assert not problems, "\n".join(["", *problems])


def asks_the_server(block: Block) -> bool:
    """Whether a snippet asks this machine's server, with packages that are installed here."""
    if block.language != "python" or not ways.LOCAL.search(block.text):
        return False
    imported = re.findall(r"^\s*(?:from|import) (\w+)", block.text, re.MULTILINE)
    return all(find_spec(name) for name in imported)


SNIPPETS = [
    pytest.param(block, id=block.where)
    for page in documented.PAGES
    for block in documented.blocks(page)
    if asks_the_server(block)
]


@pytest.mark.parametrize("block", SNIPPETS)
def test_a_snippet_prints_what_its_comments_say(block: Block, demo_server: Server) -> None:
    """Where each `print` has a comment behind it."""
    printed = demo_server.runs(demo_server.here(block.text))
    prints = re.findall(r"^print\(.*\)(?:  # (.*))?$", block.text, re.MULTILINE)
    if prints and all(prints) and not any("…" in line for line in prints):
        assert printed == prints


def test_what_the_server_says_to_type_works(demo_server: Server) -> None:
    said = demo_server.out.read_text()
    [curl] = re.findall(r"^curl .*?(?=^$)", said, re.DOTALL | re.MULTILINE)
    assert "The capital of France is Paris." in demo_server.types(curl)
    [code] = re.findall(r"^from openai .*?(?=^Ctrl-C)", said, re.DOTALL | re.MULTILINE)
    ast.parse(code)
    assert demo_server.runs(code) == ["The capital of France is Paris.", "384"]

"""What the documentation holds that a test can try: commands, blocks of code, names, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from harness import shell
from harness.processes import REPO

PAGES = tuple(
    str(path.relative_to(REPO))
    for path in [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted(REPO.glob("docs/**/*.md"))]
    if path.exists()
)
"""Every page, by its path in the repository."""

COMMENTED = tuple(
    str(path.relative_to(REPO))
    for pattern in ("configs/*.yaml", "kuberay/*.yaml", "kuberay/*/profile.yaml",
                    "kuberay/cluster/*.yaml", "kuberay/monitoring/*.yaml")
    for path in sorted(REPO.glob(pattern))
)  # fmt: skip
"""Files written by hand whose comments are read as pages are."""

SHELLS = {"sh", "bash", "shell", "console"}

PROGRAMS = {
    "serve-app", "serve", "ray", "vllm", "make", "python", "python3", "pip", "uv", "curl",
    "kubectl", "helm", "eksctl", "aws", "docker", "podman", "apt-get", "git", "promtool",
}  # fmt: skip
"""A span of code that begins with one of these, and goes on, is a command."""


@dataclass(frozen=True)
class Found:
    """Something on a page; ``line`` counts from 1."""

    text: str
    page: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Block(Found):
    """A fenced or indented block of code; without a language ``language`` is empty."""

    language: str


@dataclass(frozen=True)
class Command(Found):
    """A command line as a reader would type it.

    ``comment`` is what stands behind it. A ``span`` stands in a sentence, and may name a command
    without all of its arguments.
    """

    comment: str = ""
    span: bool = False


@dataclass(frozen=True)
class Shown(Found):
    """A block that a page gives a name of a file: the sentence before ends with "`file`:"."""

    file: str


@dataclass(frozen=True)
class Link(Found):
    """``text`` is where it leads to."""


@cache
def _tokens(page: str) -> list[Token]:
    text = (REPO / page).read_text()
    if not page.endswith(".md"):
        # The comments alone, each on its own line.
        comments = [re.search(r"(?:^|\s)#+ ?(.*)", line) for line in text.splitlines()]
        text = "\n".join(comment[1].strip() if comment else "" for comment in comments)
    return MarkdownIt("commonmark").enable("table").parse(text)


@cache
def blocks(page: str) -> list[Block]:
    """Every block of code, in order."""
    found = []
    for token in _tokens(page):
        if token.type in ("fence", "code_block") and token.map:
            line = token.map[0] + 1 + (token.type == "fence")
            language, *_ = token.info.split() or [""]
            found.append(Block(token.content, page, line, language))
    return found


def files(page: str) -> list[Shown]:
    """The files that a page shows and a reader writes."""
    found = []
    tokens = [token for token in _tokens(page) if token.type in ("inline", "fence")]
    for before, token in pairwise(tokens):
        named = re.search(r"`([\w.-]+\.(?:ya?ml|json|py|toml))`[^`]*:$", before.content)
        if token.type == "fence" and before.type == "inline" and named and token.map:
            found.append(Shown(token.content, page, token.map[0] + 1, named[1]))
    return found


def _inline(page: str) -> Iterator[tuple[Token, int]]:
    for token in _tokens(page):
        line = token.map[0] + 1 if token.map else 0
        for child in token.children or ():
            if child.type in ("softbreak", "hardbreak"):
                line += 1
            yield child, line


@cache
def spans(page: str) -> list[Found]:
    """Every `span of code` in a sentence or a table."""
    return [
        Found(token.content, page, line)
        for token, line in _inline(page)
        if token.type == "code_inline"
    ]


@cache
def prose(page: str) -> list[Found]:
    """The words between the spans."""
    return [Found(t.content, page, line) for t, line in _inline(page) if t.type == "text"]


@cache
def links(page: str) -> list[Link]:
    return [
        Link(str(token.attrs["src" if token.type == "image" else "href"]), page, line)
        for token, line in _inline(page)
        if token.type in ("link_open", "image")
    ]


@cache
def anchors(page: str) -> set[str]:
    """What a ``#…`` can lead to on a page, by GitHub's rule for headings."""
    found: set[str] = set()
    for opening, title in pairwise(_tokens(page)):
        if opening.type == "heading_open":
            text = "".join(c.content for c in title.children or () if not c.type.endswith("_open"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
            number = next(n for n in range(99) if (f"{slug}-{n}" if n else slug) not in found)
            found.add(f"{slug}-{number}" if number else slug)
    return found


def commands(page: str) -> list[Command]:
    """Every command of a page, in the order in which a reader meets them.

    Raises:
        ValueError: a block of commands does not end.
    """
    found: list[Command] = []
    for block in blocks(page):
        found += _commands_in(block)
    for span in spans(page):
        first, *more = span.text.removeprefix(".venv/bin/").split() or [""]
        if first in PROGRAMS and more:
            found.append(Command(span.text, page, span.line, span=True))
    return sorted(found, key=lambda command: command.line)


def _commands_in(block: Block) -> Iterator[Command]:
    text = block.text
    if block.language == "console":
        # What has no prompt is what was printed; `> ` goes on.
        kept = [re.match(r"\s*(?:\$|>) (.*)", line) for line in text.splitlines()]
        text = "\n".join(match[1] if match else "" for match in kept)
    elif not block.language:
        # An indented block, or one without a language, may hold anything.
        lines = text.splitlines()
        if not any(_begins_a_command(line) for line in lines):
            return
        kept_lines = [
            line if _begins_a_command(line) or (n and lines[n - 1].rstrip().endswith("\\")) else ""
            for n, line in enumerate(lines)
        ]
        text = "\n".join(kept_lines)
    elif block.language not in SHELLS:
        return
    try:
        lines_read = shell.lines_of(text)
    except ValueError as error:
        raise ValueError(f"{block.where}: a command {error}") from None
    for line in lines_read:
        yield Command(line.text, block.page, block.line + line.number, comment=line.comment)


def _begins_a_command(line: str) -> bool:
    words = line.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return len(words) > 1 and words[0].removeprefix(".venv/bin/") in PROGRAMS


def words_of(*roots: Path) -> set[str]:
    """Every identifier in the text files below these folders, or in these files."""
    found: set[str] = set()
    for root in roots:
        files = [root] if root.is_file() else [p for p in root.rglob("*") if p.is_file()]
        for file in files:
            if file.suffix in (".py", ".json", ".yaml", ".csv", ".toml", ".txt", ".sh", ""):
                found.update(re.findall(r"[A-Za-z_]\w*", file.read_text(errors="replace")))
    return found

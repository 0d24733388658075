"""What a shell would read in a block of commands: enough of it to test documentation.

Lines are joined where a shell asks for more (a backslash, an open quote, a pipe, a here-document),
and taken apart into simple commands. Loops and conditions are not looked into.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_BEFORE_COMMENT = re.compile(r"""(?:[^#'"\\]|\\.|'[^']*'|"(?:\\.|[^"\\])*"|(?<=\S)#)*""", re.DOTALL)
_HERE = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")
_SUBSTITUTION = re.compile(r"[$<]\(([^()]*)\)")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_OPERATORS = {"|", "||", "&&", ";", "&", "(", ")", "|&"}
_WORDS_OF_THE_SHELL = {"do", "then", "else", "while", "until", "if", "!", "time", "exec", "{", "}"}


@dataclass(frozen=True)
class Line:
    """One command line as it is typed, with its comments taken off; it may span several lines."""

    text: str
    comment: str
    number: int
    """Counted from 0 in the block."""


@dataclass(frozen=True)
class Simple:
    """One program with its arguments."""

    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    """What is set before the program's name; all of it where there is no program."""

    output: str | None = None
    """The file that its output goes to."""

    piped: bool = False
    """Whether it reads what the one before it prints."""


def lines_of(block: str) -> list[Line]:
    """The command lines of a block.

    Raises:
        ValueError: a quote, a here-document or the last line does not end.
    """
    found: list[Line] = []
    waiting, comments, start = "", "", 0
    here: str | None = None
    for number, raw in enumerate(block.splitlines()):
        if here is not None:
            waiting += raw + "\n"
            here = None if raw.strip() == here else here
            if here is None:
                found.append(Line(waiting.strip(), comments, start))
                waiting, comments = "", ""
            continue
        if not waiting:
            start = number
        # Within an open quote `#` is a character: the whole is looked at again.
        match = _BEFORE_COMMENT.match(waiting + raw)
        assert match is not None
        text, rest = match[0], (waiting + raw)[match.end() :]
        if rest == "\\":
            waiting = text + " "
            continue
        if rest and not rest.startswith("#"):
            waiting += raw + "\n"  # an open quote
            continue
        comments += rest.lstrip("# ")
        waiting = text.rstrip()
        if waiting.endswith(("|", "&&")):
            waiting += " "
        elif opened := _HERE.search(waiting):
            here, waiting = opened[2], waiting + "\n"
        elif waiting:
            found.append(Line(waiting.strip(), comments, start))
            waiting, comments = "", ""
        else:
            comments = ""
    if waiting or here:
        raise ValueError(f"does not end: {waiting or here}")
    return found


def expanded(text: str, value: Callable[[str], str]) -> str:
    """The text with each ``$NAME`` that is not in single quotes replaced."""

    def one(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        return value(name) if name else match[0]

    return re.sub(r"'[^']*'|\$([A-Za-z_]\w*)|\$\{([A-Za-z_]\w*)[^}]*\}", one, text)


def simple_commands(text: str, answers: Mapping[str, str]) -> list[Simple]:
    """The simple commands of a line, those in ``$(…)`` and ``<(…)`` first.

    ``answers`` has what a substituted command prints, and ``""`` what all others do.

    Raises:
        ValueError: a quote that does not end.
    """
    found: list[Simple] = []
    text = _HERE.sub("", text.partition("\n")[0]) if _HERE.search(text) else text
    while inner := _SUBSTITUTION.search(text):
        found += simple_commands(inner[1], answers)
        answer = answers.get(" ".join(inner[1].split()), answers[""])
        text = text[: inner.start()] + answer + text[inner.end() :]
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.commenters, lexer.whitespace_split = "", True
    words: list[str] = []
    piped = False
    for token in [*lexer, ";"]:
        if token not in _OPERATORS:
            words.append(token)
            continue
        if words:
            found.append(_simple(words, piped))
        words, piped = [], token in ("|", "|&")
    return [command for command in found if command.words or command.environment]


def _simple(words: list[str], piped: bool) -> Simple:
    output = None
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in (">", ">>", "<", "<<", ">&", "2>", "&>"):
            target = next(rest, "")
            if kept and kept[-1] in ("1", "2"):
                kept.pop()  # `2>file` comes as three words
            elif word in (">", ">>"):
                output = target
        else:
            kept.append(word)
    environment: list[tuple[str, str]] = []
    while kept and (kept[0] in _WORDS_OF_THE_SHELL or _ASSIGNMENT.fullmatch(kept[0])):
        if match := _ASSIGNMENT.fullmatch(kept.pop(0)):
            environment.append((match[1], match[2]))
    return Simple(tuple(kept), tuple(environment), output, piped)

"""Writes docs/demo.svg: what `make demo` prints, and the first answer (``make picture``)."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path("docs/demo.svg")


def record(make: list[str], port: int) -> Iterator[str]:
    """The lines of a real `make demo`, then of a real second terminal."""
    yield "$ make demo"
    demo = subprocess.Popen(
        [*make, "demo", f"PORT={port}"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert demo.stdout is not None
        said = []
        for line in demo.stdout:
            said.append(line.rstrip())
            yield said[-1]
            if line.startswith("Ctrl-C"):
                break
        else:
            sys.exit("make demo ended before it was ready")
        snippet = re.findall(r"^from openai .*?(?=^Ctrl-C)", "\n".join(said), re.M | re.S)[0]
        yield ""
        yield "$ .venv/bin/python ask.py        # the Python lines above, in a second terminal"
        answer = subprocess.run(
            [".venv/bin/python", "-c", snippet], capture_output=True, text=True, check=True,
            env=os.environ | {"no_proxy": "127.0.0.1"},
        )  # fmt: skip
        yield from answer.stdout.splitlines()
    finally:
        os.killpg(demo.pid, signal.SIGINT)  # what Ctrl-C does: make does not pass it on
        demo.wait()


def picture(lines: list[str]) -> str:
    """The terminal as an SVG. A pipe has no colours, so they are added here."""
    console = Console(record=True, width=max(map(len, lines)), file=io.StringIO())
    for line in lines:
        text = Text(line)
        text.highlight_regex(r"^\$ [^#]*", "bold")
        text.highlight_regex(r"^\S+ is ready", "green")
        text.highlight_regex(r" # .*", "dim")
        console.print(text)
    drawn = console.export_svg(title="serve_app", unique_id="demo")
    # rich names a font on a server; a picture loads nothing, and every machine has a monospace.
    drawn = re.sub(r"@font-face \{.*?\}\n", "", drawn, flags=re.S)
    return drawn.replace("font-family: Fira Code, monospace", "font-family: monospace")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--make", default="make", help="such as 'make -o .venv/.ready'")
    args = parser.parse_args()
    lines = []
    for line in record(shlex.split(args.make), args.port):
        print(line, flush=True)
        lines.append(line)
    PICTURE.write_text(picture(lines))


if __name__ == "__main__":
    main()

"""``python -m benchmarks.ngram_texts``: which share of n-gram proposals real weights accept.

The share depends on the text and the model, and not on the machine, so a CPU can measure it: the
demo's SmolLM2-135M, one client, temperature 0. How much faster a share makes a GPU is the step
``tune_ngram`` of ``benchmarks.h200``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import report
from benchmarks.h200 import tuning
from benchmarks.h200.server import MODEL, RAY, Server, application, serve_run
from serve_app.fetch.demo import fetch_demo

TOKENS = 96

_TEXTS = (
    "The lighthouse keeper counted the ships each evening. On Monday there were four ships, on "
    "Tuesday there were six ships, and on Wednesday the fog hid them all.",
    '{"name": "Ada", "city": "London", "tags": ["math", "engine"], "active": true, "visits": 12}',
    "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('negative'"
    ")\n    return width * height",
    "Order 1184: two lamps, one table, four chairs. Order 1185: one lamp, one sofa. Order 1186: "
    "four chairs, two tables.",
)
_THEMES = ("a fox and a hare at a river", "why the sky is blue", "a city under the sea",
           "how bread is made")  # fmt: skip

KINDS: dict[str, list[str]] = {
    "repeats its prompt": [f"Copy this text word for word:\n\n{text}" for text in _TEXTS],
    "about its prompt": [f"Explain this in a few sentences:\n\n{text}" for text in _TEXTS],
    "free": [f"Write a short text about {theme}." for theme in _THEMES],
}
"""Prompts, by how much an answer has in common with its prompt."""


def measure(folder: Path, port: int) -> Iterator[dict[str, Any]]:
    """For each prompt: tokens, proposals, and how many of them were accepted."""
    model = next(it for it in fetch_demo(Path("models"), console=Console()) if "smollm2" in it.name)
    engine = {"load_format": "auto", "max_model_len": 1024, "speculative_config": tuning.NGRAM,
              "enforce_eager": True}  # fmt: skip
    on_cpu = {"device": "cpu", "num_cpus": 0}
    block = application(MODEL, model.resolve(), engine, resources=on_cpu)
    server = Server(serve_run(folder, port, block), port, folder / "ngram.log", **RAY)
    try:
        server.wait(240)
        for kind, prompts in KINDS.items():
            for number, prompt in enumerate(prompts, 1):
                before = tuning.counters(port, MODEL)
                tokens = _ask(port, prompt)
                after = tuning.counters(port, MODEL)
                grown = {key: after[key] - before.get(key, 0.0) for key in after}
                yield {
                    "kind": kind,
                    "prompt": number,
                    "tokens": tokens,
                    "proposals": grown.get("spec_decode_num_drafts", 0.0),
                    "proposed": grown.get("spec_decode_num_draft_tokens", 0.0),
                    "accepted": grown.get("spec_decode_num_accepted_tokens", 0.0),
                }
    finally:
        server.stop()


def _ask(port: int, prompt: str) -> int:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
            "max_tokens": TOKENS, "ignore_eos": True}  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return int(json.load(answer)["usage"]["completion_tokens"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ngram_texts", description=__doc__)
    parser.add_argument("--port", type=int, default=8750)
    parser.add_argument("--results", type=Path, default=None)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ngram-"))
    records = []
    for record in measure(folder, options.port):
        print(json.dumps(record), flush=True)
        records.append(record)
    found = {
        "date": str(datetime.date.today()), "machine": report.machine(),
        "model": "SmolLM2-135M-Instruct", "speculative_config": tuning.NGRAM, "records": records,
    }  # fmt: skip
    results = Path(__file__).parent / "results"
    path = options.results or results / f"ngram-texts-{datetime.date.today()}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

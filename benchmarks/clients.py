"""Clients beside wrk: they tell percentiles, and take a core where wrk takes a hundredth.

``vllm bench serve`` runs in this process. AIPerf is in an environment of its own, where
``make bench-clients`` has installed it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks import load, vllm_bench
from serve_app.errors import UserError

CACHE = Path(__file__).parents[1] / ".cache" / "clients"
PROMPT = 128
"""Tokens of each prompt."""

TOKENS = 64
_WAVES = 3
_LONGEST_S = 240

_seeds = count(1)


@dataclass(frozen=True)
class Target:
    """Whom to ask, and how."""

    port: int
    model: Path
    """The folder with the tokenizer."""

    work: Path
    concurrency: int

    @property
    def requests(self) -> int:
        return _WAVES * self.concurrency


Client = Callable[[Target], dict[str, float]]


def vllm(at: Target) -> dict[str, float]:
    """``vllm bench serve``, chat completions of random prompts."""
    chat = {"backend": "openai-chat", "endpoint": load.PATH}
    return vllm_bench.run(
        at.port, load.MODEL, at.model, at.concurrency, at.requests,
        dataset=vllm_bench.random_prompts(PROMPT, TOKENS) | chat,
        log=at.work / "vllm-bench.log", seed=next(_seeds),
    )  # fmt: skip


def aiperf(at: Target) -> dict[str, float]:
    """NVIDIA's AIPerf."""
    into = at.work / f"aiperf-{next(_seeds)}"
    _say([
        CACHE / "aiperf" / "bin" / "aiperf", "profile", "--model", load.MODEL,
        "--url", f"http://127.0.0.1:{at.port}", "--endpoint-type", "chat", "--streaming",
        "--tokenizer", at.model.resolve(), "--concurrency", at.concurrency,
        "--request-count", at.requests, "--isl", PROMPT, "--osl", TOKENS,
        "--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0",
        "--workers-max", 1, "--ui-type", "none", "--output-artifact-dir", into,
    ], at.work / "aiperf.log")  # fmt: skip
    told = json.loads(next(into.rglob("profile_export_aiperf.json")).read_text())
    found = {
        "output_throughput": told["output_token_throughput"]["avg"],
        "request_throughput": told["request_throughput"]["avg"],
        "median_ttft_ms": told["time_to_first_token"]["p50"],
        "p99_ttft_ms": told["time_to_first_token"]["p99"],
        "median_itl_ms": told["inter_token_latency"]["p50"],
        "p99_itl_ms": told["inter_token_latency"]["p99"],
        "completed": told["request_count"]["avg"],
    }
    errors = told.get("error_request_count") or {"avg": 0}
    return {k: round(float(v), 3) for k, v in found.items()} | {"failed": float(errors["avg"])}


ALL: dict[str, Client] = {"vllm": vllm, "aiperf": aiperf}


def chosen(names: str) -> dict[str, Client]:
    """The clients of a list by commas; ``none`` is none.

    Raises:
        UserError: one is not known, or not installed.
    """
    wanted = [] if names == "none" else names.split(",")
    for name in wanted:
        if name not in ALL:
            raise UserError(f"there is no client '{name}' (clients: {', '.join(ALL)}, or none)")
    if "aiperf" in wanted and not (CACHE / "aiperf" / "bin" / "aiperf").is_file():
        raise UserError(f"AIPerf is not installed in {CACHE / 'aiperf'}; make bench installs it")
    return {name: ALL[name] for name in wanted}


def _say(command: list[Any], log: Path) -> None:
    words = [str(word) for word in command]
    with log.open("ab") as out:
        ended = subprocess.run(words, stdout=out, stderr=out, timeout=_LONGEST_S)
    if ended.returncode:
        lines = log.read_text(errors="replace").splitlines()[-5:]
        raise UserError(f"{Path(words[0]).name} failed; {log} ends with:\n" + "\n".join(lines))

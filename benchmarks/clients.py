"""Clients beside wrk: they tell percentiles, and take a core where wrk takes a hundredth.

``vllm bench serve`` runs in this process. AIPerf and inference-perf are in environments of their
own, where ``make bench-clients`` has installed them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml

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
        program("aiperf"), "profile", "--model", load.MODEL,
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


def inference_perf(at: Target) -> dict[str, float]:
    """The one of Kubernetes' serving working group. Its random prompts are completions only."""
    into = at.work / f"inference-perf-{next(_seeds)}"
    into.mkdir()
    config = {
        "api": {"type": "completion", "streaming": True},
        "server": {
            "type": "vllm", "model_name": load.MODEL, "base_url": f"http://127.0.0.1:{at.port}",
            "ignore_eos": True,
        },
        "tokenizer": {"pretrained_model_name_or_path": str(at.model.resolve())},
        "data": {
            "type": "random",
            "input_distribution": _always(PROMPT, at.requests),
            "output_distribution": _always(TOKENS, at.requests),
        },
        "load": {
            "type": "concurrent", "num_workers": 1,
            "stages": [{"num_requests": at.requests, "concurrency_level": at.concurrency}],
        },
        "storage": {"local_storage": {"path": str(into)}},
    }  # fmt: skip
    path = into / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    _say([program("inference-perf"), "--config_file", path], at.work / "inference-perf.log")
    told = json.loads(next(into.rglob("summary_lifecycle_metrics.json")).read_text())
    latency, rates = told["successes"]["latency"], told["successes"]["throughput"]
    found = {
        "output_throughput": rates["output_tokens_per_sec"],
        "request_throughput": rates["requests_per_sec"],
        "completed": told["successes"]["count"],
        "failed": told["failures"]["count"],
    }
    for short, name in (("ttft", "time_to_first_token"), ("itl", "inter_token_latency")):
        if latency[name]:
            found[f"median_{short}_ms"] = 1000 * latency[name]["median"]
            found[f"p99_{short}_ms"] = 1000 * latency[name]["p99"]
    return {k: round(float(v), 3) for k, v in found.items()}


def _always(tokens: int, requests: int) -> dict[str, Any]:
    return {"type": "fixed", "min": tokens, "max": tokens, "mean": tokens, "std_dev": 0,
            "total_count": requests}  # fmt: skip


ALL: dict[str, Client] = {"vllm": vllm, "aiperf": aiperf, "inference-perf": inference_perf}


def program(name: str) -> Path:
    """A client's command in its own environment."""
    return CACHE / name / "bin" / name


def chosen(names: str) -> dict[str, Client]:
    """The clients of a list by commas; ``none`` is none.

    Raises:
        UserError: one is not known, or not installed.
    """
    wanted = [] if names == "none" else names.split(",")
    for name in wanted:
        if name not in ALL:
            raise UserError(f"there is no client '{name}' (clients: {', '.join(ALL)}, or none)")
        if name != "vllm" and not program(name).is_file():
            raise UserError(f"{name} is not installed in {CACHE / name}; run: make bench-clients")
    return {name: ALL[name] for name in wanted}


def _say(command: list[Any], log: Path) -> None:
    words = [str(word) for word in command]
    # Its own environment's packages, whatever this one's are.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("ab") as out:
        ended = subprocess.run(words, stdout=out, stderr=out, timeout=_LONGEST_S, env=env)
    if ended.returncode:
        lines = log.read_text(errors="replace").splitlines()[-5:]
        raise UserError(f"{Path(words[0]).name} failed; {log} ends with:\n" + "\n".join(lines))

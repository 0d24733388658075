"""vLLM's own client, ``vllm bench serve``, in this process: its import takes longer than a load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

FIGURES = (
    "output_throughput", "request_throughput", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms",
    "mean_tpot_ms", "median_tpot_ms", "p99_tpot_ms", "median_itl_ms", "p99_itl_ms", "duration",
    "completed", "failed",
)  # fmt: skip


def run(
    port: int,
    model: str,
    tokenizer: Path,
    concurrency: int,
    prompts: int,
    *,
    dataset: Mapping[str, Any],
    log: Path,
    seed: int = 0,
    body: Mapping[str, Any] | None = None,
    temperature: float = 0.0,
) -> dict[str, float]:
    """Send completions and tell their rates (per second), times (ms) and how many failed.

    Args:
        dataset: its options, by name without ``--``: ``{"dataset-name": "random", …}``.
        log: what the client prints is added here.
        seed: of the prompts. A server that was asked with one seed has these prompts in its
            prefix cache, so another call wants another one.
        body: further fields of each request.
    """
    # Here only: the servers' logs are read.
    with mock.patch.dict(os.environ, {"VLLM_CONFIGURE_LOGGING": "0"}):
        from vllm.benchmarks.serve import add_cli_args, main_async
        from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = {
        "backend": "openai", "base-url": f"http://127.0.0.1:{port}", "model": model,
        "tokenizer": tokenizer, "num-prompts": prompts, "max-concurrency": concurrency,
        "percentile-metrics": "ttft,tpot,itl", "metric-percentiles": "50,99", "num-warmups": 0,
        "seed": seed, "temperature": temperature, **dataset,
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    if body:
        arguments += ["--extra-body", json.dumps(body)]
    parsed = parser.parse_args([*arguments, "--ignore-eos", "--disable-tqdm"])
    with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        raw = asyncio.run(main_async(parsed))
    return {name: round(raw[name], 3) for name in FIGURES if raw.get(name) is not None}


def random_prompts(tokens_in: int, tokens_out: int) -> dict[str, Any]:
    """Prompts that have nothing in common."""
    return {
        "dataset-name": "random",
        "random-input-len": tokens_in,
        "random-output-len": tokens_out,
    }


def shared_prompts(shared: int, own: int, tokens_out: int, prefixes: int) -> dict[str, Any]:
    """Prompts that begin with one of a few prefixes of ``shared`` tokens."""
    return {
        "dataset-name": "prefix_repetition",
        "prefix-repetition-prefix-len": shared,
        "prefix-repetition-suffix-len": own,
        "prefix-repetition-num-prefixes": prefixes,
        "prefix-repetition-output-len": tokens_out,
    }

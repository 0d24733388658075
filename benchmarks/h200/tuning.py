"""vLLM's usual optimizations with our own configs, on one GPU: the steps behind docs/tuning.md.

A step starts all its variants at once as models of one server, each with a part of the GPU's
memory, and measures them in turn through the gateway: an idle engine takes no time of the GPU.
Weights are dummies. Times and memory are those of the real shape; what the model says is noise, so
nothing here is about the quality of answers.
"""

from __future__ import annotations

import datetime
import json
import random
import re
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import report, vllm_bench
from benchmarks.h200.server import (
    HAPROXY,
    Server,
    application,
    completion,
    gpu_memory_mib,
    ready,
    serve_run,
    until,
)
from benchmarks.vllm_bench import random_prompts, shared_prompts

MOST_ROUNDS = 3
FRONT_ENDS = 2
"""Of each variant, whatever ``auto`` would make of its size: engines are to be what differs."""

START_S = 330.0
"""Where no kernel is compiled yet."""

COUNTERS = (
    "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total", "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_drafts_total",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One engine of a step: its part of the GPU in GiB, and what it has beside the others."""

    gib: float
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """One load of a step, by vLLM's own client."""

    concurrency: int
    prompts: int
    dataset: Mapping[str, Any]
    body: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 0.0


@dataclass(frozen=True)
class Experiment:
    """A step. Measuring ends after ``measure_s``, but for the first round, which is whole."""

    variants: Mapping[str, Variant]
    loads: Mapping[str, Load]
    measure_s: float
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that all variants have."""


def _letters(count: int) -> dict[str, Any]:
    """Only so many tokens may be said. Dummy weights find all tokens about equally likely, so that
    a proposed token is right once in ``count`` times.
    """
    return {"allowed_token_ids": list(range(1000, 1000 + count))}


def _said(concurrency: int, prompts: int, **how: Any) -> Load:
    return Load(concurrency, prompts, random_prompts(256, 128), **how)


NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 4,
}

EXPERIMENTS: dict[str, Experiment] = {
    # bf16, fp8, and CUDA graphs, on the same loads.
    "tune_precision": Experiment(
        {
            "bf16": Variant(21),
            "fp8": Variant(16, {"quantization": "fp8"}),
            "fp8-kv-fp8": Variant(16, {"quantization": "fp8", "kv_cache_dtype": "fp8"}),
            "bf16-eager": Variant(21, {"enforce_eager": True}),
        },
        {
            f"c{clients}": Load(clients, prompts, random_prompts(512, 128))
            for clients, prompts in ((1, 4), (8, 24), (48, 96))
        },
        190,
    ),
    # Requests that begin with one of four system prompts.
    "tune_prefix": Experiment(
        {
            "on": Variant(36),
            "off": Variant(36, {"enable_prefix_caching": False}),
        },
        {
            f"shared{shared}-own{own}-out{out}": Load(16, 32, shared_prompts(shared, own, out, 4))
            for shared, own, out in (
                (4000, 100, 16), (4000, 100, 128), (1000, 100, 16), (1000, 100, 128),
                (500, 500, 128),
            )
        } | {"nothing-shared": Load(16, 32, random_prompts(1000, 128))},
        160,
    ),
    # How much of the prompts a step computes beside the running answers.
    "tune_budget": Experiment(
        {f"tokens-{tokens}": Variant(24, {"max_num_batched_tokens": tokens})
         for tokens in (512, 2048, 8192)},
        {
            "in4096-out64-c8": Load(8, 24, random_prompts(4096, 64)),
            "in1024-out128-c32": Load(32, 64, random_prompts(1024, 128)),
        },
        145,
    ),
    # A proposed token is right once in 1, 2, 8 times; in varied text none is proposed.
    "tune_ngram": Experiment(
        {
            "off": Variant(24),
            "ngram": Variant(24, {"speculative_config": NGRAM}),
            # vLLM has no asynchronous scheduling with "ngram", and has it with this one.
            "ngram-gpu": Variant(24, {"speculative_config": NGRAM | {"method": "ngram_gpu"}}),
        },
        {
            f"{text}-c{clients}": _said(clients, prompts, **how)
            for clients, prompts in ((1, 4), (32, 64))
            for text, how in (
                ("1-letter", {"body": _letters(1)}),
                ("2-letters", {"body": _letters(2), "temperature": 1.0}),
                ("8-letters", {"body": _letters(8), "temperature": 1.0}),
                ("varied", {"temperature": 1.0}),
            )
        },
        165,
    ),
    # More requests at once than may run.
    "tune_seqs": Experiment(
        {f"seqs-{most}": Variant(24, {"max_num_seqs": most}) for most in (16, 64, 256)},
        {
            "c256": Load(256, 384, random_prompts(128, 64)),
            "c32": Load(32, 96, random_prompts(128, 64)),
        },
        105,
    ),
    # The part of the GPU that an engine has: what is left of it is KV cache.
    "tune_memory": Experiment(
        {f"gib-{gib}": Variant(gib) for gib in (19, 22, 34)},
        {"c128": Load(128, 160, random_prompts(512, 256))},
        130,
        {"max_model_len": 4096},
    ),
    # Prompts that come back after the KV cache has been filled with others; and some that do not.
    "tune_offload": Experiment(
        {"off": Variant(22), "on": Variant(22, {"kv_offloading_size": 24})},
        {
            "comes-back": Load(4, 96, shared_prompts(4000, 64, 16, 24)),
            "new": Load(4, 24, random_prompts(4000, 16)),
        },
        100,
    ),
}  # fmt: skip
"""In order of worth."""


def resources(gib: float, of_gib: float) -> dict[str, Any]:
    """What a variant asks for; apart, so that a run without a GPU can replace it."""
    return {"gpu_share": round(gib / of_gib, 4)}


def applications(
    experiment: Experiment, model: Path, cache: str, gpu_gib: float
) -> list[dict[str, Any]]:
    """The blocks of its config; ``gpu_gib`` is the memory of the GPU."""
    common = {"max_model_len": 8192, **experiment.engine}
    return [
        application(name, model, {**common, **one.engine}, cache_dir=cache, frontends=FRONT_ENDS,
                    resources=resources(one.gib, gpu_gib))
        for name, one in experiment.variants.items()
    ]  # fmt: skip


def measure(
    experiment: Experiment, model: Path, folder: Path, port: int, cache: str, deadline: float
) -> dict[str, Any]:
    """Run one; ``deadline`` is by ``time.monotonic``. A variant that does not start is left out,
    with what ``GET /ready`` says of it.
    """
    models = applications(experiment, model, cache, min(gpu_memory_mib("total")) / 1024)
    command = serve_run(folder, port, *models, gateways=2)
    log = folder / f"{'-'.join(experiment.variants)}.log"
    server = Server(command, port, log, **HAPROXY)
    began = time.monotonic()
    found: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "machine": report.machine(),
        "weights": "dummy",
        "engine": dict(experiment.engine),
        "variants": {name: asdict(one) for name, one in experiment.variants.items()},
        "loads": {name: asdict(one) for name, one in experiment.loads.items()},
    }
    try:
        failed = _started(server, list(experiment.variants), min(START_S, deadline - began))
        found["started_s"] = round(time.monotonic() - began, 1)
        for name, why in failed.items():
            found["variants"][name]["left_out"] = why
        for name, tokens in _kv_tokens(server.text()).items():
            found["variants"][name]["kv_tokens"] = tokens
        live = [name for name in experiment.variants if name not in failed]
        print(json.dumps({"started_s": found["started_s"], "left out": failed}), flush=True)
        if not live:
            return found | {"failed": server.text()[-6000:]}
        end = min(deadline, time.monotonic() + experiment.measure_s)
        found["rounds"] = list(_rounds(experiment, live, server, model, folder, end))
        return found
    finally:
        server.stop()


def _started(server: Server, names: list[str], limit_s: float) -> dict[str, str]:
    """Wait until each answers, or has failed once; why some do not.

    Serve tries a failed start twice more, which would take the time of the others' rounds.
    """
    waiting = set(names)

    def settled() -> bool:
        if server.process.poll() is not None:
            raise RuntimeError(f"no server: {server.text()[-6000:]}")
        states = ready(server.port).get("models", {})
        for name in sorted(waiting):
            if states.get(name, {}).get("status") == "RUNNING":
                completion(server.port, 1, model=name)
                waiting.discard(name)
        return waiting <= failures(server.text()).keys()

    until(settled, limit_s)
    said = dict.fromkeys(waiting, f"it did not answer in {limit_s:.0f} s")
    return said | {name: why for name, why in failures(server.text()).items() if name in waiting}


_FAILED = re.compile(
    r"ServeReplica:([^:]+):.*ERROR [\d-]+ [\d:]+ \[core\.py:\d+\] (\w*(?:Error|Exception): .*)"
)
"""A line of vLLM's when EngineCore ends for it."""


def failures(log: str) -> dict[str, str]:
    """The last error of each variant's engine."""
    return {name: why.strip() for name, why in _FAILED.findall(log)}


def _rounds(experiment: Experiment, live: list[str], server: Server, model: Path, folder: Path,
            end: float) -> list[dict[str, Any]]:  # fmt: skip
    def ask(name: str, load: Load, seed: int) -> dict[str, float]:
        return vllm_bench.run(
            server.port, name, model, load.concurrency, load.prompts, dataset=load.dataset,
            log=folder / "bench.log", seed=seed, body=load.body, temperature=load.temperature,
        )  # fmt: skip

    most = max(load.concurrency for load in experiment.loads.values())
    warm = Load(most, most, random_prompts(512, 32))
    for name in live:
        ask(name, warm, 0)  # kernels, connections
    rounds: list[dict[str, Any]] = []
    longest = 0.0
    while len(rounds) < MOST_ROUNDS and (not rounds or time.monotonic() + longest < end):
        began = time.monotonic()
        rounds.append({name: {} for name in live})
        for number, (at, load) in enumerate(experiment.loads.items(), 1):
            random.shuffle(live)
            for name in live:
                before = counters(server.port, name)
                figures = ask(name, load, 100 * len(rounds) + number)
                grown = {
                    counter: value - before.get(counter, 0.0)
                    for counter, value in counters(server.port, name).items()
                }
                rounds[-1][name][at] = figures | {k: v for k, v in grown.items() if v}
        print(json.dumps(rounds[-1]), flush=True)
        longest = time.monotonic() - began
    return rounds


_COUNTER = re.compile(r'^(vllm:\w+)\{[^}]*model_name="([^"]*)"[^}]*\} (\S+)$', re.M)


def counters(port: int, model: str) -> dict[str, float]:
    """:func:`counters_in` what the gateway at this port exports."""
    time.sleep(0.2)  # front ends tell their statistics every 50 ms
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return counters_in(answer.read().decode(), model)


def counters_in(exposition: str, model: str) -> dict[str, float]:
    """A model's :data:`COUNTERS`, summed over its front ends, without ``vllm:`` and ``_total``."""
    found: dict[str, float] = {}
    for counter, name, value in _COUNTER.findall(exposition):
        if name == model and counter in COUNTERS:
            short = counter.removeprefix("vllm:").removesuffix("_total")
            found[short] = found.get(short, 0.0) + float(value)
    return found


_TOKENS = re.compile(r"ServeReplica:([^:]+):.*KV cache size: ([\d,]+) tokens")


def _kv_tokens(log: str) -> dict[str, int]:
    return {name: int(tokens.replace(",", "")) for name, tokens in _TOKENS.findall(log)}

"""``python -m benchmarks.h200 MODEL``: absolute numbers on a machine with GPUs; dummy weights.

MODEL is a folder with a model's config and tokenizer (an 8B shape). Each step writes its part of
one JSON file. Run it where the GPUs are, with ``tests`` on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from benchmarks import overload, vllm_bench
from benchmarks.h200 import customers, failures, front_ends, routing, several, shares, tuning, zipf
from benchmarks.h200 import swaps as swap_groups
from benchmarks.h200.server import (
    HAPROXY,
    MODEL,
    RAY,
    Server,
    application,
    bare,
    completion,
    gpu_memory_mib,
    ready,
    serve_run,
    shaped,
    visible_gpus,
)

SHAPES = Path(__file__).parents[2] / "serve_app/data/models"
LARGE = SHAPES / "RedHatAI--Llama-3.3-70B-Instruct-FP8-dynamic/config.json"
LARGE_BF16 = SHAPES / "meta-llama--Llama-3.3-70B-Instruct/config.json"
MOE = SHAPES / "Qwen--Qwen3-30B-A3B/config.json"


@dataclass(frozen=True)
class Machine:
    """What a step works with: the 8B shape, a folder, the end of the time, and the first port."""

    model: Path
    folder: Path
    deadline: float
    port: int

    @property
    def cache(self) -> str:
        """A cache folder that later steps (and a later run) find filled."""
        return str(Path(tempfile.gettempdir()) / "h200-cache")

    def ours(self, name: str, model: Path, engine: dict[str, Any], **args: Any) -> Server:
        """Our server with one model, once it answers; its log is kept under ``name``."""
        command = serve_run(self.folder, self.port, application(MODEL, model, engine, **args))
        return Server(command, self.port, self.folder / f"{name}.log", **RAY).wait()


def bench(at: Machine, port: int, concurrency: int, prompts: int, seed: int) -> dict[str, float]:
    """``vllm bench serve``: 512 tokens in, 128 out."""
    prompts_of = vllm_bench.random_prompts(512, 128)
    return vllm_bench.run(
        port, MODEL, at.model, concurrency, prompts,
        dataset=prompts_of, log=at.folder / "bench.log", seed=seed,
    )  # fmt: skip


LOADS = {1: 12, 64: 256, 256: 768}
"""Requests at once, and requests in all."""


def compare(at: Machine) -> dict[str, Any]:
    """Bare ``vllm serve`` and ours behind HAProxy on one GPU, measured in turn."""
    # Its size is given, so that the engines can start at the same time: none measures the
    # memory that another one takes.
    return _in_turn(at, at.model, {
        "max_model_len": 8192,
        "gpu_memory_utilization": 0.3,  # what must be free at the start, with the size given or not
        "kv_cache_memory_bytes": (38 if min(gpu_memory_mib("total")) > 100_000 else 18) << 30,
    })  # fmt: skip


def compare_70b(at: Machine) -> dict[str, Any]:
    """The same with a 70B in fp8, one tensor-parallel group of all GPUs: four or more."""
    return _in_turn(at, shaped(at.model, LARGE, at.folder), {
        "max_model_len": 8192, "gpu_memory_utilization": 0.45, "kv_cache_memory_bytes": 14 << 30,
        "tensor_parallel_size": len(gpu_memory_mib()),
    })  # fmt: skip


def _in_turn(at: Machine, model: Path, engine: dict[str, Any]) -> dict[str, Any]:
    block = application(MODEL, model, engine)
    commands = {
        "bare": (bare(model, at.port, load_format="dummy", **engine), {}),
        "serve_app": (serve_run(at.folder, at.port + 1, block, gateways=2), HAPROXY),
    }
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        servers = {}
        for port, (name, (command, env)) in enumerate(commands.items(), at.port):
            servers[name] = Server(command, port, at.folder / f"compare-{name}.log", **env)
            stack.callback(servers[name].stop)
        until_s = at.deadline - time.monotonic()
        list(pool.map(lambda server: server.wait(until_s), servers.values()))
        for server in servers.values():
            bench(at, server.port, 64, 64, seed=0)  # warm
        rounds: list[dict[str, Any]] = []
        longest = 0.0
        while len(rounds) < 5 and time.monotonic() + longest < at.deadline:
            began = time.monotonic()
            rounds.append({})
            for concurrency, prompts in LOADS.items():
                seed = 1000 * len(rounds) + concurrency
                for name, server in servers.items():
                    measured = bench(at, server.port, concurrency, prompts, seed)
                    rounds[-1].setdefault(name, {})[f"c{concurrency}"] = measured
            print(json.dumps(rounds[-1]), flush=True)
            longest = time.monotonic() - began
        return {
            "engine": engine,
            "starts": {name: s.start_report() for name, s in servers.items()},
            "rounds": rounds,
            "serve_app_over_bare": _ratios(rounds),
        }


def _ratios(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours over bare in the same round: min, median, max."""
    found: dict[str, Any] = {}
    for load in (f"c{c}" for c in LOADS):
        for figure in ("output_throughput", "median_ttft_ms", "median_tpot_ms", "p99_itl_ms"):
            pairs = [r["serve_app"][load][figure] / r["bare"][load][figure] for r in rounds]
            spread = min(pairs), statistics.median(pairs), max(pairs)
            found.setdefault(load, {})[figure] = [round(ratio, 3) for ratio in spread]
    return found


ONE_B = {"hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True}
"""What makes Llama 3.1's shape of 8B that of Llama 3.2's 1B, but for its feed-forward layers."""


def _one_b(at: Machine, kv_cache_gib: int) -> tuple[Path, dict[str, Any]]:
    """A 1B shape, and its engine's arguments where several of them share a GPU."""
    model = shaped(at.model, at.model / "config.json", at.folder, **ONE_B, intermediate_size=8192)
    return model, {
        "max_model_len": 8192, "gpu_memory_utilization": 0.12,
        "kv_cache_memory_bytes": kv_cache_gib << 30,
    }  # fmt: skip


def front_ends_1b(at: Machine) -> dict[str, Any]:
    """A 1B shape, where the front end limits: bare and ours, with one and with four."""
    model, engine = _one_b(at, 8)
    names = dict.fromkeys(("bare-1", "bare-4", "ours-1", "ours-4"), "0")
    return front_ends.measure(model, at.folder, at.port, engine, at.deadline, names)


def front_ends_8b(at: Machine) -> dict[str, Any]:
    """The 8B shape on a GPU of 80 GB, which two servers share; a second GPU has two more."""
    engine = {
        "max_model_len": 8192, "gpu_memory_utilization": 0.25,
        "kv_cache_memory_bytes": 20 << 30,
    }  # fmt: skip
    names = {"bare-1": "0", "ours-4": "0"}
    if len(gpu_memory_mib()) > 1:
        names |= {"bare-4": "1", "ours-2": "1"}
    return front_ends.measure(at.model, at.folder, at.port, engine, at.deadline, names)


def _contenders(at: Machine, model: Path, engine: dict[str, Any], names: list[str],
                most: int = 256) -> dict[str, Any]:  # fmt: skip
    places = dict(zip(names, itertools.cycle(visible_gpus()), strict=False))
    return front_ends.measure(
        model, at.folder, at.port, engine, at.deadline, places, most, words=True
    )


def contenders_1b(at: Machine) -> dict[str, Any]:
    """``make bench-gpu``: the 1B shape, where what is in front of the engine limits; all at once on
    one GPU, or spread over as many as there are.
    """
    model, engine = _one_b(at, 6)
    names = ["bare-1", "bare-4", "bare-rust", "ours-4", "rayllm", "rayllm-direct", "vllm-router",
             "litellm"]  # fmt: skip
    return _contenders(at, model, engine, names)


def contenders_8b(at: Machine) -> dict[str, Any]:
    """The 8B shape: bare, ours, and Ray Serve LLM's path for one model."""
    large = min(gpu_memory_mib("total")) > 100_000 or len(gpu_memory_mib()) > 1
    engine = {
        "max_model_len": 8192, "gpu_memory_utilization": 0.25,
        "kv_cache_memory_bytes": (20 if large else 8) << 30,
    }  # fmt: skip
    names = ["bare-1", "ours-4", "rayllm-direct", "vllm-router", "litellm"]
    return _contenders(at, at.model, engine, names, 256 if large else 64)


def customers_1b(at: Machine) -> dict[str, Any]:
    """The 1B shape: keys, limits, usage, access log, traces and scrapes, all on against all off."""
    model, engine = _one_b(at, 16)
    return customers.measure(model, at.folder, at.port, engine, at.deadline)


def overload_8b(at: Machine) -> dict[str, Any]:
    """The 8B shape, which runs 64 at once: ten times as many requests, two lengths of queue."""
    found: dict[str, Any] = {}
    engine = {"max_model_len": 8192, "max_num_seqs": 64}
    for places in (8, 64):
        if found and time.monotonic() + 250 > at.deadline:
            break
        ours = application(MODEL, at.model, engine, cache_dir=at.cache)
        queue = {"max_requests": places}
        command = serve_run(at.folder, at.port, ours, queue=queue)
        server = Server(command, at.port, at.folder / f"overload-{places}.log", **HAPROXY).wait()
        try:
            url = f"http://127.0.0.1:{at.port}"
            asked = overload.Load(url, MODEL, 128, 64, 60.0, words=200)
            measured = overload.measure(asked, server.process.pid)
        finally:
            server.stop()
        print(places, json.dumps(measured), flush=True)
        found[f"queue of {places}"] = measured
    return found


def executor_8b(at: Machine) -> dict[str, Any]:
    """The 8B shape: what Ray's executor costs beside EngineCore that does the worker's part."""
    engine = {
        "max_model_len": 8192, "gpu_memory_utilization": 0.25,
        "kv_cache_memory_bytes": 6 << 30,
    }  # fmt: skip
    names = dict.fromkeys(("bare-1", "ours-4", "ours-4-uni"), "0")
    return front_ends.measure(at.model, at.folder, at.port, engine, at.deadline, names, most=64)


def front_ends_tp(at: Machine) -> dict[str, Any]:
    """The 8B shape as one tensor-parallel group of all GPUs."""
    gpus = len(gpu_memory_mib())
    engine = {
        "max_model_len": 8192, "gpu_memory_utilization": 0.2, "tensor_parallel_size": gpus,
        "kv_cache_memory_bytes": 12 << 30,
    }  # fmt: skip
    names = dict.fromkeys(("bare-1", "bare-4", "ours-4"), ",".join(visible_gpus()))
    return front_ends.measure(at.model, at.folder, at.port, engine, at.deadline, names)


def as_written_70b(at: Machine) -> dict[str, Any]:
    """``serve run configs/llama70b.yaml``, the README's first example: four GPUs."""
    model = several.with_token(shaped(at.model, LARGE_BF16, at.folder), "<|python_tag|>")
    return several.as_written("llama70b.yaml", model, at.folder, at.port)


def one_gpu_yaml(at: Machine) -> dict[str, Any]:
    """configs/one-gpu.yaml in parts as large as an L40S's, on this GPU."""
    shapes = {
        "chat": "meta-llama--Llama-3.1-8B-Instruct",
        "embeddings": "BAAI--bge-m3",
        "reranker": "BAAI--bge-reranker-v2-m3",
    }
    parts = {"chat": 35.5, "embeddings": 4.4, "reranker": 4.4}
    models = {name: shaped(at.model, SHAPES / it / "config.json", at.folder)
              for name, it in shapes.items()}  # fmt: skip
    of = {name: {"gpu_memory_gib": gib} for name, gib in parts.items()}
    return several.all_of("one-gpu.yaml", models, at.folder, at.port, at.deadline, **of)


def swap_yaml(at: Machine) -> dict[str, Any]:
    """configs/swap.yaml as it is written, for one H100."""
    shapes = {
        "llama-8b": "meta-llama--Llama-3.1-8B-Instruct",
        "qwen3-32b": "Qwen--Qwen3-32B-FP8",
        "qwen2.5-7b": "Qwen--Qwen2.5-7B-Instruct-GPTQ-Int4",
    }
    models = {name: shaped(at.model, SHAPES / it / "config.json", at.folder)
              for name, it in shapes.items()}  # fmt: skip
    several.with_token(models["qwen3-32b"], "<think>", "</think>")
    return several.all_of("swap.yaml", models, at.folder, at.port, at.deadline)


def groups(at: Machine) -> dict[str, Any]:
    """A 70B as TP × PP, two replicas of a group, data-parallel experts: on all GPUs."""
    large, experts = (shaped(at.model, it, at.folder) for it in (LARGE, MOE))
    gpus = len(gpu_memory_mib())
    return several.groups(large, at.model, experts, at.folder, at.port, gpus, at.deadline)


def scaling(at: Machine) -> dict[str, Any]:
    """1 → 2 replicas of a group and back, tensor-parallel experts: on all GPUs."""
    experts = shaped(at.model, MOE, at.folder)
    gpus = len(gpu_memory_mib())
    return several.scaling(at.model, experts, at.folder, at.port, gpus, at.deadline)


def start(at: Machine) -> dict[str, Any]:
    """A cold and a warm start by phase, with one ``cache_dir``; then ``serve run`` is killed."""
    found: dict[str, Any] = {}
    cache = str(at.folder / "cache")
    for name in ("cold", "warm"):
        server = at.ours(name, at.model, {"max_model_len": 8192}, cache_dir=cache)
        found[name] = server.start_report()
        print(name, json.dumps(found[name]), flush=True)
        if name == "warm":
            found["kill -9 of serve run"] = failures.gone(
                server, signal.SIGKILL, ("ray.serve.scripts",)
            )
        server.stop()
    return found


def sleep(at: Machine) -> dict[str, Any]:
    """``serve-app admin``: asleep the GPU is free, awake the model says the same as before."""
    engine = {"max_model_len": 8192, "enable_sleep_mode": True}
    server = at.ours("sleep", at.model, engine, cache_dir=at.cache)
    gcs = next(
        word.removeprefix("--gcs-address=")
        for process in server.processes("/raylet/raylet")
        for word in process.cmdline()
        if word.startswith("--gcs-address=")
    )

    def admin(*action: str) -> dict[str, Any]:
        began = time.monotonic()
        command = [sys.executable, "-c", "from serve_app.cli import main; main()", "admin", MODEL]
        run = subprocess.run([*command, *action, "--address", gcs], capture_output=True, text=True)
        return {
            "said": (run.stdout or run.stderr).strip().splitlines()[-1:],
            "seconds": round(time.monotonic() - began, 1),
            "gpu_mib": max(gpu_memory_mib()),
        }

    try:
        found: dict[str, Any] = {"gpu_mib_before": max(gpu_memory_mib())}
        before = completion(server.port)["choices"][0]["text"]
        found["sleep"] = admin("sleep")
        try:
            completion(server.port)
        except urllib.error.HTTPError as refused:
            found["a_request_meanwhile"] = f"{refused.code} {refused.read().decode()}"
        found["wake"] = admin("wake")
        after = completion(server.port)["choices"][0]["text"]
        found["says_the_same_awake"] = after == before
        found["reset-prefix-cache"] = admin("reset-prefix-cache")
        return found
    finally:
        server.stop()


def swaps(at: Machine) -> dict[str, Any]:
    """Three 8B shapes in a swap group, without CUDA graphs: swaps by part; under 300 s in all."""
    deadline = min(at.deadline, time.monotonic() + 280)
    return swap_groups.measure(at.model, at.folder, at.port, deadline)


def swaps_graphs(at: Machine) -> dict[str, Any]:
    """The same with compiled code and CUDA graphs, which stay on the GPU while a model sleeps."""
    deadline = min(at.deadline, time.monotonic() + 480)
    return swap_groups.measure(at.model, at.folder, at.port, deadline, eager=False)


def swaps_large(at: Machine) -> dict[str, Any]:
    """The three and a mixture of experts of 30B in fp8, without CUDA graphs."""
    deadline = min(at.deadline, time.monotonic() + 480)
    large = shaped(at.model, MOE, at.folder)
    return swap_groups.measure(at.model, at.folder, at.port, deadline, large=large)


def _zipf(at: Machine, way: str) -> dict[str, Any]:
    """Ten 1B shapes of which a few are asked for often."""
    model, engine = _one_b(at, 4)
    return zipf.measure(way, model, at.folder, at.port, engine, at.deadline)


def zipf_swap(at: Machine) -> dict[str, Any]:
    """Ten models of 1B in a swap group, one awake."""
    return _zipf(at, "swap")


def zipf_zero(at: Machine) -> dict[str, Any]:
    """The same, each with the whole GPU and scaled to zero when it is idle."""
    return _zipf(at, "zero")


def zipf_shares(at: Machine) -> dict[str, Any]:
    """The same, each all the time on a tenth of the GPU."""
    return _zipf(at, "shares")


def _describe(at: Machine, server: Server, *, gpus: int) -> dict[str, Any]:
    """What a model on several GPUs is and does; then its replica is killed."""
    began = time.monotonic()
    answer = completion(server.port, tokens=64)
    return {
        "start": server.start_report(),
        "gpu_mib_in_use": gpu_memory_mib(),
        "workers": [" ".join(p.cmdline())[:60] for p in server.processes(*failures.WORKER)],
        "one_request": {
            "tokens": answer["usage"]["completion_tokens"],
            "seconds": round(time.monotonic() - began, 2),
        },
        "c64": bench(at, server.port, 64, 128, seed=0),
        f"kill -9 of the replica ({gpus} GPUs)": failures.gone(
            server, signal.SIGKILL, failures.REPLICA
        ),
    }


def _split(at: Machine, name: str, model: Path, gpus: int, **engine: Any) -> dict[str, Any]:
    server = at.ours(name, model, {"max_model_len": 8192, **engine}, cache_dir=at.cache)
    try:
        return _describe(at, server, gpus=gpus)
    finally:
        server.stop()


def large(at: Machine) -> dict[str, Any]:
    """A 70B shape in fp8 on one GPU, through the Ray executor."""
    return _split(at, "large", shaped(at.model, LARGE, at.folder), 1, enforce_eager=True)


def tp2(at: Machine) -> dict[str, Any]:
    """The 70B shape on two GPUs of a node, as one tensor-parallel group."""
    model = shaped(at.model, LARGE, at.folder)
    return _split(at, "tp2", model, 2, tensor_parallel_size=2, enforce_eager=True)


def pp2(at: Machine) -> dict[str, Any]:
    """The 70B shape on two GPUs as two pipeline stages, each a bundle of its own."""
    model = shaped(at.model, LARGE, at.folder)
    return _split(at, "pp2", model, 2, pipeline_parallel_size=2, enforce_eager=True)


def dp2(at: Machine) -> dict[str, Any]:
    """A mixture of experts: two data-parallel ranks, experts spread over both."""
    model = shaped(at.model, MOE, at.folder)
    engine = {"data_parallel_size": 2, "enable_expert_parallel": True, "enforce_eager": True}
    return _split(at, "dp2", model, 2, **engine)


def pair(at: Machine) -> dict[str, Any]:
    """Two replicas under load, of which one loses a process; at the end the node's raylet."""
    engine = {"max_model_len": 8192, "enforce_eager": True}
    server = at.ours(
        "pair", at.model, engine, replicas=2, cache_dir=at.cache, hang_timeout_s=20
    )  # fmt: skip
    found: dict[str, Any] = {}
    try:
        for name, number, titles in (
            ("kill -9 of a worker", signal.SIGKILL, failures.WORKER),
            ("kill -9 of a replica", signal.SIGKILL, failures.REPLICA),
            ("SIGSTOP of a worker (hang_timeout_s: 20)", signal.SIGSTOP, failures.WORKER),
            ("kill -9 of an engine", signal.SIGKILL, failures.ENGINE),
        ):
            if time.monotonic() + 90 > at.deadline:
                break
            found[name] = failures.hit(server, number, titles)
            print(name, json.dumps(found[name]), flush=True)
        found["kill -9 of the raylet"] = failures.gone(server, signal.SIGKILL, failures.RAYLET)
        return found
    finally:
        server.stop()


def refusals(at: Machine) -> dict[str, Any]:
    """Models that cannot start, side by side: the sentence that ``GET /ready`` has for each."""
    big = shaped(at.model, LARGE_BF16, at.folder)
    tight = {"gpu_memory_utilization": 0.2, "max_model_len": 131072, "enforce_eager": True}
    models = [
        application("too-large", big, {"max_model_len": 8192, "enforce_eager": True}),
        application("no-kv-cache", at.model, tight),
    ]
    command = serve_run(at.folder, at.port, *models)
    server = Server(command, at.port, at.folder / "refusals.log", **RAY)
    began = time.monotonic()
    found: dict[str, Any] = {}
    try:
        while len(found) < len(models) and time.monotonic() - began < 240:
            for name, model in ready(at.port).get("models", {}).items():
                if model["status"] == "DEPLOY_FAILED" and name not in found:
                    seconds = round(time.monotonic() - began, 1)
                    found[name] = {"after_s": seconds, "message": model["message"]}
            time.sleep(1)
        return found
    finally:
        server.stop()


def shares_1gpu(at: Machine) -> dict[str, Any]:
    """Three models with parts of one GPU: memory as planned and as taken, deaths, a full GPU."""
    small, _ = _one_b(at, 1)
    return shares.measure(at.model, small, at.folder, at.port, at.deadline)


def routing_4(at: Machine) -> dict[str, Any]:
    """Four 1B shapes on parts of a GPU, by each policy and behind vllm-router: two traces."""
    model, _ = _one_b(at, 1)
    return routing.measure(routing.GPU, model, at.folder, at.port, at.deadline)


STEPS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    step.__name__: step
    for step in (
        front_ends_1b, front_ends_8b, contenders_1b, contenders_8b, executor_8b, front_ends_tp,
        compare, customers_1b,
        overload_8b, start, sleep, swaps, swaps_graphs, swaps_large, zipf_swap, zipf_zero,
        zipf_shares, large, tp2, pp2, dp2, pair, refusals, as_written_70b, groups, scaling,
        compare_70b, shares_1gpu, one_gpu_yaml, swap_yaml, routing_4,
    )
}  # fmt: skip


def _tuning(experiment: tuning.Experiment) -> Callable[[Machine], dict[str, Any]]:
    def step(at: Machine) -> dict[str, Any]:
        return tuning.measure(experiment, at.model, at.folder, at.port, at.cache, at.deadline)

    return step


STEPS |= {name: _tuning(experiment) for name, experiment in tuning.EXPERIMENTS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", default=",".join(STEPS), help="steps, by commas")
    parser.add_argument("--budget-s", type=float, default=1500)
    parser.add_argument("--port", type=int, default=8000, help="the first port to use")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/h200.json"))
    options = parser.parse_args()
    if not entry_points(group="vllm.general_plugins", name="serve_app"):
        parser.error(
            "serve_app is not installed here, so vLLM's processes would not load its plugin; "
            "install it, or put a folder with its .egg-info on PYTHONPATH"
        )
    options.results.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="h200-"))
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    report: dict[str, Any] = {}
    if options.results.is_file():
        report = json.loads(options.results.read_text())
    at = Machine(options.model, folder, time.monotonic() + options.budget_s, options.port)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("out of time"))
    try:
        for name in options.only.split(","):
            began = time.monotonic()
            try:
                report[name] = STEPS[name](at)
            except (SystemExit, Exception) as failure:
                report[name] = {"failed": f"{type(failure).__name__}: {failure}"}
            report[name] |= {"gpus": gpus, "step_s": round(time.monotonic() - began, 1)}
            print(name, json.dumps(report[name])[:6000], flush=True)
            options.results.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        for log in folder.glob("*.log"):
            shutil.copy(log, options.results.parent / f"h200-{log.name}")


if __name__ == "__main__":
    main()

"""``python -m benchmarks.h200``: absolute numbers on a GPU machine; dummy weights of an 8B shape.

Bare ``vllm serve`` and our gateway in turn, under ``vllm bench serve`` (512 tokens in, 128 out).
With two GPUs also: what clients see when an engine is killed, and a TP 2 engine on Ray.
Writes one JSON file; run it where the GPU is, with the model's folder as the argument.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

ENGINE = {"load_format": "dummy", "max_model_len": 8192}
PORT = 8000
QUESTION = {"model": "m", "prompt": "x " * 200, "max_tokens": 64, "ignore_eos": True}


def post(body: dict[str, Any], timeout: float = 60) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return dict(json.load(answer))


@contextlib.contextmanager
def running(command: list[str], ready: str, log: Path) -> Iterator[float]:
    """Run a server until its ``ready`` path answers 200; yields the seconds that took."""
    env = os.environ | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_worker_niceness": "0",
    }
    started = time.monotonic()
    with log.open("ab") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        while True:
            if server.poll() is not None or time.monotonic() - started > 400:
                raise SystemExit(f"no server: {log.read_text(errors='replace')[-3000:]}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}{ready}", timeout=5)
                break
            time.sleep(0.5)
        yield time.monotonic() - started
    finally:
        server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == server.pid:
                    process.kill()
        time.sleep(3)


def bare(model: Path) -> list[str]:
    flags = [x for k, v in ENGINE.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model),
        "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(PORT), *flags,
    ]  # fmt: skip


def ours(
    model: Path, folder: Path, replicas: int = 1, gateways: int = 1, **engine: Any
) -> list[str]:
    config = {
        "http_options": {"host": "127.0.0.1", "port": PORT},
        "applications": [
            {
                "name": "m",
                "route_prefix": None,
                "import_path": "serve_app.model:app",
                "args": {"model": str(model), "replicas": replicas, "engine": ENGINE | engine},
            },
            {
                "name": "gateway",
                "route_prefix": "/",
                "import_path": "serve_app.gateway:app",
                "args": {"replicas": gateways},
            },
        ],
    }
    path = folder / f"ours-{replicas}-{gateways}-{len(engine)}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return [sys.executable, "-m", "ray.serve.scripts", "run", str(path)]


def bench(model: Path, folder: Path, concurrency: int, prompts: int) -> dict[str, float]:
    result = folder / "bench.json"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "vllm",
        "--base-url", f"http://127.0.0.1:{PORT}", "--model", "m", "--tokenizer", str(model),
        "--dataset-name", "random", "--random-input-len", "512", "--random-output-len", "128",
        "--num-prompts", str(prompts), "--max-concurrency", str(concurrency), "--ignore-eos",
        "--save-result", "--result-dir", str(folder), "--result-filename", result.name,
        "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
    raw = json.loads(result.read_text())
    keys = ("output_throughput", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms",
            "mean_tpot_ms", "median_tpot_ms", "p99_itl_ms", "completed", "failed")  # fmt: skip
    return {key: raw[key] for key in keys if key in raw}


def compare(model: Path, folder: Path, rounds: int) -> list[dict[str, Any]]:
    found = []
    arms = {"bare": (bare(model), "/health"), "ours": (ours(model, folder, 1, 2), "/ready")}
    for turn in range(rounds):
        for name, (command, ready) in arms.items():
            with running(command, ready, folder / f"{name}.log") as seconds:
                post(QUESTION)
                bench(model, folder, 64, 64)  # warm
                record: dict[str, Any] = {"arm": name, "round": turn + 1, "start_s": seconds}
                record["c1"] = bench(model, folder, 1, 16)
                record["c256"] = bench(model, folder, 256, 1024)
                print(json.dumps(record), flush=True)
                found.append(record)
    return found


def kill_one_of_two(model: Path, folder: Path) -> dict[str, Any]:
    """Kill one of two engines under a constant load; every request's fate, with its times."""
    with running(ours(model, folder, replicas=2), "/ready", folder / "kill.log"):
        fates: list[tuple[float, float, str]] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                begun = time.monotonic()
                try:
                    post(QUESTION)
                    fate = "ok"
                except Exception as error:
                    fate = f"{type(error).__name__}: {error}"
                fates.append((begun, time.monotonic(), fate))

        threads = [threading.Thread(target=ask) for _ in range(32)]
        for thread in threads:
            thread.start()
        time.sleep(8)
        engine = next(p for p in psutil.process_iter() if "VLLM::EngineCore" in p.name() or
                      "VLLM::EngineCore" in " ".join(p.cmdline()))  # fmt: skip
        killed = time.monotonic()
        engine.kill()
        time.sleep(12)
        stop.set()
        for thread in threads:
            thread.join()
        lost = [f for f in fates if f[2] != "ok"]
        return {
            "requests": len(fates),
            "failed": len(lost),
            "failed_started_before_kill": sum(f[0] <= killed for f in lost),
            "failed_started_after_kill": sum(f[0] > killed for f in lost),
            "last_failure_after_kill_s": max((f[1] - killed for f in lost), default=0.0),
            "what": sorted({f[2][:120] for f in lost}),
        }


def tensor_parallel(model: Path, folder: Path) -> dict[str, Any]:
    command = ours(model, folder, tensor_parallel_size=2)
    with running(command, "/ready", folder / "tp2.log") as seconds:
        answer = post(QUESTION)
        used = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader"],
            capture_output=True, text=True,
        ).stdout.split("\n")  # fmt: skip
        return {
            "start_s": seconds,
            "tokens": answer["usage"]["completion_tokens"],
            "memory_used": used[:2],
            "c256": bench(model, folder, 256, 512),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="compare,kill,tp2")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/h200.json"))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="h200-"))
    gpus = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split("\n")[:-1]
    report: dict[str, Any] = {"gpus": gpus, "engine": ENGINE}
    steps = {"compare": lambda: compare(options.model, folder, options.rounds)}
    if len(gpus) > 1:
        steps["kill"] = lambda: kill_one_of_two(options.model, folder)  # type: ignore[assignment]
        steps["tp2"] = lambda: tensor_parallel(options.model, folder)  # type: ignore[assignment]
    for name in options.only.split(","):
        if name in steps:
            try:
                report[name] = steps[name]()
            except SystemExit as failure:
                report[name] = f"failed: {failure}"
            print(name, json.dumps(report[name])[:3000], flush=True)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""``python -m benchmarks.h200 MODEL``: absolute numbers on a machine with one GPU; dummy weights.

``compare``: bare ``vllm serve`` and our gateway, both up at once, measured in turn with
``vllm bench serve`` (512 tokens in, 128 out); at the end our engine, and then ``serve run``, is
killed. ``start``: a cold and a warm start by phase, then the same kills and that of a replica.
``large``: a 70B shape in fp8. Writes one JSON file; run it where the GPU is, with the model's
folder (config and tokenizer).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
LARGE = ROOT / "serve_app/data/models/RedHatAI--Llama-3.3-70B-Instruct-FP8-dynamic/config.json"
PORT = 8000
PHASES = re.compile(
    r"(Model loading took .*|torch\.compile took .*|torch\.compile and initial .*"
    r"|Initial profiling/warmup run took .*|Graph capturing finished .*|init engine .* took .*"
    r"|GPU KV cache size.*|Maximum concurrency.*|Directly load AOT .*|Applying persisted .*"
    r"|Saved startup plan.*)"
)


def post(port: int = PORT, tokens: int = 64, timeout: float = 120) -> dict[str, Any]:
    body = {"model": "m", "prompt": "x " * 200, "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return dict(json.load(answer))


def gpu_memory_mib() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def until(what: Callable[[], bool], limit_s: float) -> float | None:
    """Seconds until ``what`` holds; None when it does not within the limit."""
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        with contextlib.suppress(OSError, psutil.Error):
            if what():
                return round(time.monotonic() - began, 2)
        time.sleep(0.1)
    return None


class Server:
    """A started server; ``seconds`` until it answered its first request."""

    def __init__(self, command: list[str], port: int, log: Path, **env: str) -> None:
        self.port, self.log = port, log
        began = time.monotonic()
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, start_new_session=True, env=os.environ | env
            )
        try:
            while not self._answers():
                if self.process.poll() is not None or time.monotonic() - began > 300:
                    raise SystemExit(f"no server: {self.text()[-3000:]}")
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise
        self.seconds = round(time.monotonic() - began, 1)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(post(self.port, tokens=1))
        return False

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def phases(self) -> list[str]:
        return list(dict.fromkeys(PHASES.findall(self.text())))

    def processes(self, title: str = "") -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                mine = os.getsid(process.pid) == self.process.pid
                if mine and title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(2)


RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ADDRESS": "local",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
HAPROXY = RAY | {"RAY_SERVE_ENABLE_HA_PROXY": "1"}


def bare(model: Path, port: int, **engine: Any) -> list[str]:
    flags = [x for k, v in engine.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model),
        "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), *flags,
    ]  # fmt: skip


def serve_run(folder: Path, port: int, *applications: dict[str, Any]) -> list[str]:
    path = folder / f"serve-{port}-{len(list(folder.iterdir()))}.yaml"
    http = {"host": "127.0.0.1", "port": port}
    path.write_text(yaml.safe_dump({"http_options": http, "applications": list(applications)}))
    return [sys.executable, "-m", "ray.serve.scripts", "run", str(path)]


def ours(
    model: Path, folder: Path, port: int, gateways: int = 1, env: Any = None, **engine: Any
) -> list[str]:
    args = {"model": str(model), "engine": engine, "env": env or {}}
    args["graceful_shutdown_timeout_s"] = 5
    return serve_run(
        folder,
        port,
        {
            "name": "m",
            "route_prefix": None,
            "import_path": "serve_app.model:app",
            "args": args,
        },
        {
            "name": "gateway",
            "route_prefix": "/",
            "import_path": "serve_app.gateway:app",
            "args": {"replicas": gateways},
        },
    )


def bench(model: Path, folder: Path, port: int, concurrency: int, prompts: int) -> dict[str, float]:
    """``vllm bench serve`` in this process: its import takes longer than the measurement."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = parser.parse_args([
        "--backend", "openai", "--base-url", f"http://127.0.0.1:{port}", "--model", "m",
        "--tokenizer", str(model), "--dataset-name", "random", "--random-input-len", "512",
        "--random-output-len", "128", "--num-prompts", str(prompts),
        "--max-concurrency", str(concurrency), "--ignore-eos", "--disable-tqdm",
        "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99",
        "--num-warmups", "0",
    ])  # fmt: skip
    with (folder / "bench.log").open("a") as out, contextlib.redirect_stdout(out):
        raw = asyncio.run(main_async(arguments))
    keys = ("output_throughput", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms",
            "mean_tpot_ms", "median_tpot_ms", "p99_itl_ms", "completed", "failed")  # fmt: skip
    return {key: round(raw[key], 2) for key in keys if key in raw}


def compare(model: Path, folder: Path, deadline: float) -> dict[str, Any]:
    # Its size is given, so that the engines can start at the same time: none measures the
    # memory that another one takes.
    engine = {
        "load_format": "dummy",
        "max_model_len": 8192,
        "gpu_memory_utilization": 0.4,  # what must be free at the start, with 40 GiB given or not
        "kv_cache_memory_bytes": 40 << 30,
    }
    commands = {
        "bare": (bare(model, 8000, **engine), {}),
        "serve_app": (ours(model, folder, 8001, 2, **engine), HAPROXY),
    }
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        starting = {
            name: pool.submit(Server, command, port, folder / f"{port}.log", **env)
            for port, (name, (command, env)) in enumerate(commands.items(), 8000)
        }
        servers = {name: future.result() for name, future in starting.items()}
        for name, server in servers.items():
            stack.callback(server.stop)
            print(name, server.seconds, json.dumps(server.phases()), flush=True)
            bench(model, folder, server.port, 64, 64)  # warm
        rows: list[dict[str, Any]] = []
        longest = 0.0
        while len(rows) < 6 and time.monotonic() + longest < deadline:
            began = time.monotonic()
            for name, server in servers.items():
                row: dict[str, Any] = {"arm": name}
                for concurrency, prompts in ((1, 12), (64, 256), (256, 768)):
                    row[f"c{concurrency}"] = bench(model, folder, server.port, concurrency, prompts)
                rows.append(row)
                print(json.dumps(row), flush=True)
            longest = time.monotonic() - began
        starts = {name: [s.seconds, s.phases()] for name, s in servers.items()}
        killed = kill(servers["serve_app"], deadline + 100, ["VLLM::EngineCore"])
        return {"engine": engine, "starts": starts, "rows": rows, "kill": killed}


def start(model: Path, folder: Path, deadline: float) -> dict[str, Any]:
    env = {"VLLM_CACHE_ROOT": str(folder / "cache"), "VLLM_ENABLE_STARTUP_PLAN": "1"}
    found: dict[str, Any] = {}
    for name in ("cold", "warm"):
        command = ours(model, folder, PORT, env=env, load_format="dummy", max_model_len=8192)
        server = Server(command, PORT, folder / f"{name}.log", **HAPROXY)
        found[name] = {"first_answer_s": server.seconds, "phases": server.phases()}
        print(name, json.dumps(found[name]), flush=True)
        if name == "warm":
            found["kill"] = kill(server, deadline, _PARTS)
        server.stop()
    return found


_PARTS = ["VLLM::EngineCore", "RayWorkerProc", "ray::ServeReplica:m:"]
_SERVE_RUN = "ray.serve.scripts"


def kill(server: Server, deadline: float, parts: list[str]) -> dict[str, Any]:
    """Kill one part after the other in the middle of generations; ``serve run`` last."""
    found: dict[str, Any] = {}
    for title in (*parts, _SERVE_RUN):
        victims = server.processes(title)
        if not victims:
            found[title] = "no such process"
            continue
        fates: list[tuple[float, str]] = []
        clients = [threading.Thread(target=_ask, args=(server.port, fates)) for _ in range(16)]
        for client in clients:
            client.start()
        time.sleep(1.5)
        before = gpu_memory_mib()
        victims[0].kill()
        killed = time.monotonic()
        freed = until(lambda: gpu_memory_mib() < before - 10_000, 30)  # noqa: B023
        record: dict[str, Any] = {"gpu_mib_before": before, "gpu_free_after_s": freed}
        if title != _SERVE_RUN:
            left = max(deadline - time.monotonic(), 1)
            record["answers_again_after_s"] = until(server._answers, left)
        for client in clients:
            client.join()
        record |= {
            "requests": len(fates),
            "ok": sum(fate == "ok" for _, fate in fates),
            "failed": sorted({fate[:160] for _, fate in fates if fate != "ok"}),
            "first_and_last_answer_after_s": [
                round(at - killed, 2) for at in (min(fates)[0], max(fates)[0])
            ],
        }
        found[title] = record
        print(title, json.dumps(record), flush=True)
        if title != _SERVE_RUN and record["answers_again_after_s"] is None:
            break
    return found


def _ask(port: int, fates: list[tuple[float, str]]) -> None:
    fate = "ok"
    try:
        post(port, tokens=2000, timeout=60)
    except urllib.error.HTTPError as error:
        fate = f"{error.code} {error.read().decode(errors='replace')}"
    except Exception as error:
        fate = f"{type(error).__name__}: {error}"
    fates.append((time.monotonic(), fate))


def large(model: Path, folder: Path, deadline: float) -> dict[str, Any]:
    shape = folder / "70b"
    shutil.copytree(model, shape)
    shutil.copy(LARGE, shape / "config.json")
    command = ours(shape, folder, PORT, load_format="dummy", max_model_len=8192)
    server = Server(command, PORT, folder / "70b.log", **HAPROXY)
    try:
        return {
            "first_answer_s": server.seconds,
            "tokens": post(tokens=64)["usage"]["completion_tokens"],
            "gpu_mib_in_use": gpu_memory_mib(),
            "phases": server.phases(),
            "workers": [p.cmdline()[0] for p in server.processes("RayWorkerProc")],
            "c64": bench(model, folder, PORT, 64, 128),
        }
    finally:
        server.stop()


STEPS = {"compare": compare, "start": start, "large": large}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", default=",".join(STEPS))
    parser.add_argument("--budget-s", type=float, default=1500)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/h200.json"))
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget_s
    options.results.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="h200-"))
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    report: dict[str, Any] = {"gpu": gpu}
    if options.results.is_file():
        report = json.loads(options.results.read_text())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("out of time"))
    try:
        for name in options.only.split(","):
            try:
                report[name] = STEPS[name](options.model, folder, deadline)
            except SystemExit as failure:
                report[name] = f"failed: {failure}"
            print(name, json.dumps(report[name])[:3000], flush=True)
            options.results.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        for log in folder.glob("*.log"):
            shutil.copy(log, options.results.parent / f"h200-{log.name}")


if __name__ == "__main__":
    main()

"""Models over all GPUs of a machine: the README's first example as it is written, and groups.

Everything here takes the number of GPUs that the machine has. Dummy weights of the real shapes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from harness.load import Load

from benchmarks.h200 import failures
from benchmarks.h200.server import (
    MODEL,
    RAY,
    Server,
    application,
    completion,
    gpu_memory_mib,
    ready,
    serve_run,
    until,
)
from serve_app.local.instance import Instance

CONFIGS = Path(__file__).parents[2] / "configs"

NCCL_DEBUG = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,ENV,GRAPH"}
"""NCCL writes which variables it found, which rank has which GPU, and how they are linked."""

_NODES = re.compile(r"NCCL INFO .* nRanks \d+ nNodes (\d+)")
_BUS = re.compile(r"(\d+):\d+ .* rank (\d+) nranks (\d+) cudaDev (\d+) nvmlDev (\d+) busId (\w+) ")
_LINK = re.compile(r"Channel \d+/\d+ : (\d+)\[\d+\] -> (\d+)\[\d+\] via (\S+)")
_FOUND = re.compile(r"(\d+):\d+ .*NCCL INFO (NCCL_\w+) set by environment to (\S+)\.")


def as_written(config: str, model: Path, folder: Path, port: int) -> dict[str, Any]:
    """``serve run`` of a config with nothing changed but the model's folder and where it listens.

    An answer through OpenAI's SDK, what NCCL says in each rank, and Ctrl-C.
    """
    document: dict[str, Any] = yaml.safe_load((CONFIGS / config).read_text())
    document["http_options"] = {"host": "127.0.0.1", "port": port}
    block = document["applications"][0]
    block["args"]["model"] = str(model)
    block["args"]["engine"]["load_format"] = "dummy"
    path = folder / config
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    before = _listening()
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(path)]
    server = Server(command, port, folder / f"as-written-{path.stem}.log", **RAY, **NCCL_DEBUG)
    server.model = block["name"]
    try:
        server.wait()
        found = {
            "config": config,
            "start": server.start_report(),
            "sdk": _sdk(port, block["args"]["served_as"][0]),
            "gpu_mib_in_use": gpu_memory_mib(),
            "fleet": _get(port, "/fleet"),
            "nccl": nccl(server.text()),
            "workers": [" ".join(p.cmdline())[:60] for p in server.processes(*failures.WORKER)],
        }
        began = time.monotonic()
        os.killpg(server.process.pid, signal.SIGINT)  # as a terminal sends Ctrl-C
        ended = until(lambda: server.process.poll() is not None, 120)
        free = until(lambda: max(gpu_memory_mib()) < failures.IDLE_MIB, 30)
        found["ctrl_c"] = {
            "ended_after_s": ended,
            "gpu_memory_free_after_s": None if free is None else round(time.monotonic() - began, 2),
            "processes_left": [" ".join(p.cmdline())[:80] for p in server.processes()],
            "ports_left": sorted(_listening() - before),
        }
        return found
    finally:
        server.stop()


def with_token(model: Path, *tokens: str) -> Path:
    """Add tokens to the tokenizer of a model's folder, for a parser that looks for them."""
    path = model / "tokenizer.json"
    tokenizer: dict[str, Any] = json.loads(path.read_text())
    added: list[dict[str, Any]] = tokenizer["added_tokens"]
    last = max([*tokenizer["model"]["vocab"].values(), *(it["id"] for it in added)])
    for number, token in enumerate(tokens, last + 1):
        added.append(added[-1] | {"id": number, "content": token})
    path.write_text(json.dumps(tokenizer))
    return model


def all_of(
    config: str, models: dict[str, Path], folder: Path, port: int, deadline: float,
    **resources: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """A config of several models, each asked twice, one after the other.

    Args:
        models: each model's folder, by application, in the order in which they are asked.
        deadline: by ``time.monotonic``; what has not started then is told.
        resources: what an application's ``resources`` have otherwise than in the config.
    """
    document: dict[str, Any] = yaml.safe_load((CONFIGS / config).read_text())
    document["http_options"] = {"host": "127.0.0.1", "port": port}
    for block in document["applications"]:
        if block["name"] in models:
            args = block["args"]
            args["model"] = str(models[block["name"]])
            args["engine"]["load_format"] = "dummy"
            args["resources"] = resources.get(block["name"], args["resources"])
    path = folder / config
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(path)]
    server = Server(command, port, folder / f"{path.stem}.log", **RAY)
    began = time.monotonic()
    try:
        started = until(lambda: _all_run(port, list(models)), deadline - began - 20)
        found: dict[str, Any] = {"config": config, "all_have_started_s": started}
        if started is None:
            return found | {"fleet": _get(port, "/fleet"), "log": server.text()[-3000:]}
        found["answers"] = [_ask(port, name) for name in [*models, *models]]
        fleet = _get(port, "/fleet")["models"]
        return found | {
            "takes": {name: fleet[name]["takes"] for name in models},
            "memory": {name: fleet[name]["memory"] for name in models},
            "gpu_mib_in_use": gpu_memory_mib(),
        }
    finally:
        server.stop()


def _all_run(port: int, models: list[str]) -> bool:
    found = ready(port).get("models", {})
    return all(found.get(name, {}).get("status") == "RUNNING" for name in models)


def _ask(port: int, model: str) -> dict[str, Any]:
    """What a model that takes chats, texts or pairs answers; and after how many seconds."""
    bodies: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": [{"role": "user", "content": "The sea?"}],
                             "max_tokens": 16},
        "embeddings": {"input": ["the sea", "a stone"]},
        "rerank": {"query": "what is wet?", "documents": ["the sea", "a stone"]},
    }  # fmt: skip
    path = {"embeddings": "embeddings", "reranker": "rerank"}.get(model, "chat/completions")
    began = time.monotonic()
    url = f"http://127.0.0.1:{port}/v1/{path}"
    answer = httpx.post(url, json={"model": model, **bodies[path]}, timeout=200)
    seconds = round(time.monotonic() - began, 3)
    return {"model": model, "seconds": seconds, "status": answer.status_code,
            "answer": answer.text[:200]}  # fmt: skip


def _sdk(port: int, model: str) -> dict[str, Any]:
    """What OpenAI's own client gets: the models, one whole answer, one stream."""
    from openai import OpenAI

    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        messages: Any = [{"role": "user", "content": "Say something about the sea."}]
        whole = client.chat.completions.create(model=model, messages=messages, max_tokens=32)
        began, first, events = time.monotonic(), 0.0, 0
        for event in client.chat.completions.create(
            model=model, messages=messages, max_tokens=128, stream=True
        ):
            events += bool(event.choices and event.choices[0].delta.content)
            first = first or time.monotonic() - began
        return {
            "models": [it.id for it in client.models.list()],
            "usage": whole.usage and whole.usage.model_dump(exclude_none=True),
            "finish_reason": whole.choices[0].finish_reason,
            "stream": {
                "events": events,
                "ttft_s": round(first, 3),
                "seconds": round(time.monotonic() - began, 2),
            },
        }


def _get(port: int, path: str) -> Any:
    return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30).json()


def _listening() -> set[int]:
    """Ports on which anybody listens."""
    everything = psutil.net_connections("tcp")
    return {it.laddr.port for it in everything if it.status == psutil.CONN_LISTEN}


def nccl(log: str) -> dict[str, Any]:
    """What NCCL's lines say: variables by process, the GPU of each rank, links between ranks."""
    variables: dict[str, dict[str, str]] = {}
    for pid, name, value in _FOUND.findall(log):
        if name not in NCCL_DEBUG:
            variables.setdefault(pid, {})[name] = value
    ranks = {
        (int(size), int(rank)): {"pid": pid, "nvml_device": int(nvml), "bus": bus}
        for pid, rank, size, _, nvml, bus in _BUS.findall(log)
    }
    return {
        "asked_for": {k: v for k, v in os.environ.items() if k.startswith("NCCL_")},
        "found_by_process": variables,
        "ranks": [{"of": of, "rank": rank, **it} for (of, rank), it in sorted(ranks.items())],
        "nodes": sorted({int(nodes) for nodes in _NODES.findall(log)}),
        "links": sorted({f"{a}->{b} {via}" for a, b, via in _LINK.findall(log)}),
        "topology": subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True
        ).stdout,
    }


@contextlib.contextmanager
def together(
    folder: Path, port: int, models: dict[str, dict[str, Any]], deadline: float
) -> Iterator[dict[str, Server]]:
    """A server for each model's block, all started at the same time on the same GPUs.

    One that does not answer before the ``deadline`` of ``time.monotonic`` is left out.
    """
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        servers: dict[str, Server] = {}
        for number, (name, block) in enumerate(models.items(), port):
            instance = Instance(number)  # ports and folders that no other Ray of this machine has
            stack.callback(instance.close, keep=False)
            env = instance.environment() | RAY
            command = serve_run(folder, number, block)
            servers[name] = Server(command, number, folder / f"{name}.log", **env)
            stack.callback(servers[name].stop)
        limit_s = deadline - time.monotonic()
        for name, ended in [(n, pool.submit(s.wait, limit_s)) for n, s in servers.items()]:
            try:
                ended.result()
            except SystemExit as failure:  # the others go on
                print(name, failure, flush=True)
                servers.pop(name)
        yield servers


def described(server: Server) -> dict[str, Any]:
    """The start, the processes and one answer."""
    began = time.monotonic()
    answer = completion(server.port, tokens=64)
    return {
        "start": server.start_report(),
        "workers": [" ".join(p.cmdline())[:60] for p in server.processes(*failures.WORKER)],
        "one_request": {
            "tokens": answer["usage"]["completion_tokens"],
            "seconds": round(time.monotonic() - began, 2),
        },
    }


def grows_and_shrinks(server: Server) -> dict[str, Any]:
    """From one replica to two under load, and back without it."""
    found: dict[str, Any] = {"replicas_before": failures.replicas(server)}
    with Load(f"http://127.0.0.1:{server.port}", MODEL, max_tokens=256) as load:
        found["second_replica_after_s"] = until(lambda: failures.replicas(server) == 2, 240)
        time.sleep(3)
    with Load(
        f"http://127.0.0.1:{server.port}", MODEL, streaming=1, whole=0, max_tokens=256
    ) as little:
        found["one_replica_again_after_s"] = until(lambda: failures.replicas(server) == 1, 120)
    for name, one in (("much", load), ("little", little)):
        lost = one.lost()
        found[name] = {
            "requests": len(one.requests),
            "lost": len(lost),
            "endings": sorted({r.text[:160] for r in lost}),
        }
    return found


def _block(model: Path, share: float, kv_gib: int, engine: dict[str, Any], **args: Any) -> Any:
    # The size of the KV cache is given: none measures what another one takes.
    sized = {
        "max_model_len": 8192, "enforce_eager": True, "gpu_memory_utilization": share,
        "kv_cache_memory_bytes": kv_gib << 30,
    }  # fmt: skip
    return application(MODEL, model, sized | engine, **args)


SPREAD = {"enable_expert_parallel": True}


def groups(
    large: Path, small: Path, experts: Path, folder: Path, port: int, gpus: int, deadline: float
) -> dict[str, Any]:
    """Pipeline stages, two replicas of which one is killed under load, data-parallel experts.

    The servers share the GPUs: what is seen is that they work and what they do when a part dies,
    not how fast they are.

    Args:
        large: the folder of a 70B in fp8; ``small`` of an 8B; ``experts`` of a mixture of experts.
    """
    half = gpus // 2
    staged = {"tensor_parallel_size": half, "pipeline_parallel_size": 2}
    models = {
        f"tp{half}-pp2": _block(large, 0.7 if gpus < 4 else 0.32, 4, staged),
        f"two-tp{half}": _block(small, 0.2, 4, {"tensor_parallel_size": half}, replicas=2),
        f"dp{gpus}-ep": _block(experts, 0.3, 3, SPREAD | {"data_parallel_size": gpus}),
    }
    found: dict[str, Any] = {}
    with together(folder, port, models, deadline) as servers:
        for name, server in servers.items():
            found[name] = described(server)
            if name.startswith("two"):
                found[name]["kill -9 of a replica"] = failures.hit(
                    server, signal.SIGKILL, failures.REPLICA
                )
            print(name, json.dumps(found[name]), flush=True)
    return found


def scaling(
    small: Path, experts: Path, folder: Path, port: int, gpus: int, deadline: float
) -> dict[str, Any]:
    """From one replica of a group to two under load and back; and tensor-parallel experts."""
    half = gpus // 2
    follows = {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 2, "downscale_delay_s": 10}
    engine = {"tensor_parallel_size": half, "max_num_seqs": 12}
    models = {
        f"tp{gpus}-ep": _block(experts, 0.3, 3, SPREAD | {"tensor_parallel_size": gpus}),
        f"one-to-two-tp{half}": _block(small, 0.2, 4, engine, autoscaling=follows),
    }
    found: dict[str, Any] = {}
    with together(folder, port, models, deadline) as servers:
        for name, server in servers.items():
            found[name] = described(server)
            if name.startswith("one"):
                found[name]["scaling"] = grows_and_shrinks(server)
            print(name, json.dumps(found[name]), flush=True)
    return found

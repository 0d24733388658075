"""TTFT and TPOT of one client, request by request in turn: at each server and hop of ours."""

from __future__ import annotations

import http.client
import json
import os
import statistics
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, TypedDict

import psutil

from benchmarks.h200.server import MODEL, Server
from benchmarks.load import WORDS
from serve_app.cluster.connection import Connection
from serve_app.cluster.credential import CREDENTIAL_HEADER

TOKENS = 17
"""Of each answer: enough steps for a TPOT."""

REQUESTS = 40
"""To each target."""

WARM = 5
"""The first of them, which are not counted."""

PROMPT = 512

_CREDENTIAL = """
import sys
from serve_app.cluster.connection import Connection
from serve_app.cluster.credential import internal_credential
with Connection(sys.argv[1], "this benchmark").entered():
    print(internal_credential().decode())
"""

_CLIENT = f"""
import http.client, json, random, sys, time
targets, count, body, words = json.load(sys.stdin)
took = {{name: {{"ttft_ms": [], "tpot_ms": []}} for name in targets}}
clients = {{n: http.client.HTTPConnection(t["host"], t["port"]) for n, t in targets.items()}}
for _ in range(count):
    for name in random.sample(sorted(targets), len(targets)):
        if "failed" in took[name]:
            continue
        if words:
            body["prompt"] = " ".join(random.choices(words, k={PROMPT}))
        else:
            body["prompt"] = [random.randrange(1000, 30000) for _ in range({PROMPT})]
        sent = json.dumps(body)
        headers = {{"content-type": "application/json", **targets[name]["headers"]}}
        began = time.perf_counter()
        clients[name].request("POST", "/v1/completions", sent, headers)
        answer = clients[name].getresponse()
        answer.readline()
        first = time.perf_counter()
        rest = answer.read()
        if answer.status != 200:
            took[name] = {{"failed": f"{{answer.status}}: {{rest[:300].decode()}}"}}
            continue
        took[name]["ttft_ms"].append(1000 * (first - began))
        took[name]["tpot_ms"].append(1000 * (time.perf_counter() - first) / ({TOKENS} - 1))
print(json.dumps(took))
"""


class Target(TypedDict):
    """Where requests go, and with which headers."""

    host: str
    port: int
    headers: dict[str, str]


def measure(servers: dict[str, Server], folder: Path, words: bool = False) -> dict[str, Any]:
    """Min, median and max of each target, and of its difference to the first one's.

    Of a target that answered with an error there is only that: ``failed``.

    Args:
        words: prompts are text, not token ids.
    """
    targets: dict[str, Target] = {}
    for name, server in servers.items():
        targets[name] = {"host": "127.0.0.1", "port": server.port, "headers": {}}
        if name.startswith("ours"):
            targets |= {f"{name}: {hop}": target for hop, target in _hops(server).items()}
    body = {
        "model": MODEL,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    run = subprocess.run(
        [sys.executable, "-c", _CLIENT],
        input=json.dumps([targets, REQUESTS, body, WORDS if words else ()]),
        capture_output=True, text=True, check=True, cwd=folder,
    )  # fmt: skip
    took: dict[str, dict[str, list[float]]] = json.loads(run.stdout)
    first = next(iter(took.values()))
    found: dict[str, Any] = {}
    for name, figures in took.items():
        if "failed" in figures or "failed" in first:
            found[name] = {"failed": figures.get("failed", "the first target did")}
            continue
        for figure, ms in figures.items():
            over = [one - other for one, other in zip(ms, first[figure], strict=True)]
            spreads = {figure: _spread(ms[WARM:]), f"{figure} over": _spread(over[WARM:])}
            found.setdefault(name, {}).update(spreads)
    return found


def _spread(values: list[float]) -> list[float]:
    return [round(v, 2) for v in (min(values), statistics.median(values), max(values))]


def _hops(server: Server) -> dict[str, Target]:
    """A gateway without HAProxy, and a replica's first front end without a gateway."""
    gcs = next(
        word.removeprefix("--gcs-address=")
        for process in server.processes("/raylet/raylet")
        for word in process.cmdline()
        if word.startswith("--gcs-address=")
    )
    env = os.environ | server.env | Connection(gcs, "").environment()
    said = subprocess.run(
        [sys.executable, "-c", _CREDENTIAL, gcs],
        capture_output=True, text=True, check=True, env=env,
    )  # fmt: skip
    credential = {CREDENTIAL_HEADER.decode(): said.stdout.split()[-1]}
    found: dict[str, Target] = {}
    for hop, title, headers in (
        ("gateway", "ServeReplica:gateway", {}),
        ("front end", f"ServeReplica:{MODEL}", credential),
    ):
        for process in server.processes(title):
            for connection in process.net_connections("tcp"):
                address = connection.laddr
                if connection.status == psutil.CONN_LISTEN and _answers(
                    address.ip, address.port, headers
                ):
                    found[hop] = {"host": address.ip, "port": address.port, "headers": headers}
    return found


def _answers(host: str, port: int, headers: dict[str, str]) -> bool:
    request = urllib.request.Request(f"http://{host}:{port}/v1/models", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return MODEL in str(answer.read())
    except (OSError, http.client.HTTPException):  # Ray's own ports speak gRPC
        return False

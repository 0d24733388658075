"""The memory of the gateway with everything on, as requests pass."""

from __future__ import annotations

import contextlib
import datetime
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import processes, report
from benchmarks.gateway import arms

_PROMPT = "Tell a short story of a fox and a hare who meet at a river. "
_STREAM = {
    "model": "instant",
    "max_tokens": 16,
    "stream": True,
    "messages": [{"role": "user", "content": _PROMPT}],
}
_DOCUMENT = {**_STREAM, "stream": False}
_LEFT = {**_STREAM, "model": "slow", "max_tokens": 100}
_EVENTS = 18
"""Of a whole stream: its tokens, the role and ``[DONE]``."""

_STEP = 10_000
"""Requests between two looks at the memory: a half of them streams."""

_LEAVE = 64
"""Streams of each step whose client goes away."""

_REFUSED = 100
"""Requests of each step without a key."""


def run(
    work: Path, port: int, requests: int, running: contextlib.ExitStack
) -> tuple[str, dict[str, Any]]:
    """Let so many requests pass; the page, and the numbers."""
    client = processes.wire(work)
    contenders = arms.Contenders(work, port, running)
    contenders.upstream()
    gateway = contenders.on(port + 4)
    assert gateway.pid
    began, passed, errors = time.monotonic(), 0, 0
    samples: list[dict[str, float]] = []
    while passed < requests:
        secrets = contenders.secrets
        gateway.headers = arms.authorization(secrets[len(samples) % len(secrets)])
        for body, events in ((_DOCUMENT, 0), (_STREAM, _EVENTS)):
            with arms.load(client, gateway, 32, _STEP // 2, body, events) as asking:
                said, _ = asking.communicate()
            errors += not said.count('"errors": 0,')
        with arms.load(client, gateway, _LEAVE, _LEAVE, _LEFT, 0):
            time.sleep(0.3)
        gateway.headers = ""
        with arms.load(client, gateway, 1, _REFUSED, _DOCUMENT, 0) as asking:
            asking.communicate()
        passed += _STEP + _LEAVE + _REFUSED
        sample = {
            "requests": float(passed),
            "seconds": time.monotonic() - began,
            "pss_mib": processes.memory_mib(gateway.pid),
            "files": float(sum(one.num_fds() for one in processes.tree(gateway.pid))),
            "cpu_s": gateway.cpu_s(),
        }
        samples.append(sample)
        print(", ".join(f"{k} {v:.1f}" for k, v in sample.items()), flush=True)
    data = {"machine": report.machine(), "errors": errors, "samples": samples}
    return _markdown(data), data


def _markdown(data: dict[str, Any]) -> str:
    samples = data["samples"]
    half = samples[len(samples) // 2 :]
    slope = statistics.linear_regression(
        [s["requests"] / 1e5 for s in half], [s["pss_mib"] for s in half]
    ).slope
    shown = [samples[n] for n in sorted({round(n * (len(samples) - 1) / 10) for n in range(11)})]
    rows = [
        [f"{s['requests']:.0f}", f"{s['seconds']:.0f}", f"{s['pss_mib']:.1f}", f"{s['files']:.0f}",
         f"{s['cpu_s'] / s['requests'] * 1e6:.0f}"]
        for s in shown
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"# Soak of the gateway with everything on, {datetime.date.today()}",
            report.facts(data["machine"]),
            f"Whole answers and streams of 16 tokens in turn, by 100 keys with all limits; in "
            f"every {_STEP}, {_LEAVE} clients that leave and {_REFUSED} without a key. "
            f"{data['errors']} runs of the client had an error.",
            report.table(["requests", "s", "PSS, MiB", "open files", "CPU µs per request"], rows),
            f"In the second half the memory grew by {slope:.2f} MiB per 100,000 requests.",
        ]
    ) + "\n"  # fmt: skip

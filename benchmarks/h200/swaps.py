"""A swap group on one GPU: how long a swap takes, part by part, and what it does to answers."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from benchmarks.h200.server import (
    MODEL,
    RAY,
    Server,
    application,
    gpu_memory_mib,
    ready,
    serve_run,
    until,
)
from serve_app.config.settings import SwapGroup

NAMES = (MODEL, "m2", "m3")
"""Three models of one shape. The first has the name that :class:`Server` asks for."""

TERMS = SwapGroup(min_awake_s=1, max_wait_s=1, drain_s=1)

_FELL = re.compile(r"swap: asleep with (\d+) .* the drain took ([\d.]+) s, the sleep ([\d.]+) s")
_WOKE = re.compile(r"swap: awake; the slot took ([\d.]+) s, the wake ([\d.]+) s")
_ANSI = re.compile(r"\x1b\[[\d;]*m")


def ask(port: int, model: str, tokens: int, limit_s: float = 120) -> tuple[float, float, str]:
    """Stream a completion: seconds to its first token and to its end, and its text.

    Raises:
        TimeoutError: no end after ``limit_s``, also where the comments that a waiting stream gets
            keep its connection alive.
    """
    body = {"model": model, "prompt": "x " * 200, "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body | {"temperature": 0, "stream": True}).encode(),
        {"content-type": "application/json"},
    )
    began, first, text = time.monotonic(), 0.0, ""
    with urllib.request.urlopen(request, timeout=limit_s) as answer:
        for line in answer:
            if time.monotonic() - began > limit_s:
                raise TimeoutError(f"{model}: {limit_s:.0f} s")
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "choices" not in event:
                raise RuntimeError(f"{model}: {event}")
            first = first or time.monotonic() - began
            text += event["choices"][0]["text"] if event["choices"] else ""
    return round(first, 3), round(time.monotonic() - began, 3), text


class Log:
    """What the replicas log of each swap, in order."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def count(self) -> int:
        """Wakes so far."""
        return len(_WOKE.findall(self._text()))

    def last(self) -> dict[str, float]:
        """The parts of the last swap, in seconds."""
        text = self._text()
        fell, woke = _FELL.findall(text), _WOKE.findall(text)
        parts = {}
        if fell:
            parts = {"paused": int(fell[-1][0]), "drain": float(fell[-1][1])}
            parts["sleep"] = float(fell[-1][2])
        if woke:
            parts |= {"slot": float(woke[-1][0]), "wake": float(woke[-1][1])}
        return parts

    def _text(self) -> str:
        return _ANSI.sub("", self._server.text())


def up(port: int, count: int) -> bool:
    """Whether so many models have started."""
    found = ready(port).get("models", {})
    return len(found) == count and all(it["status"] == "RUNNING" for it in found.values())


def gpu_processes_mib() -> list[int]:
    """The GPU's memory by process, most first; empty where the driver does not tell."""
    query = ["nvidia-smi", "--query-compute-apps=used_memory", "--format=csv,noheader,nounits"]
    shown = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return sorted((int(it) for it in shown.split() if it.isdigit()), reverse=True)


def host() -> dict[str, float]:
    """The machine's memory in use, in GiB."""
    memory = psutil.virtual_memory()
    return {"used_gib": round((memory.total - memory.available) / 2**30, 1)}


def engines_gib(server: Server) -> list[float]:
    """The resident memory of each EngineCore, in GiB: the weights of those that sleep are in it."""
    found = []
    for process in server.processes("VLLM::EngineCore"):
        with contextlib.suppress(psutil.Error):
            found.append(round(process.memory_info().rss / 2**30, 1))
    return found


def measure(
    model: Path,
    folder: Path,
    port: int,
    deadline: float,
    *,
    eager: bool = True,
    large: Path | None = None,
) -> dict[str, Any]:
    """Three models of the shape in a group: their start, swaps by part, and a paused stream.

    Ends at the ``deadline`` of ``time.monotonic`` with what there is.

    Args:
        large: a further shape, whose weights become fp8.
    """
    engine = {"max_model_len": 8192, "gpu_memory_utilization": 0.8, "enforce_eager": eager}
    resources = {"swap_group": "big", "num_cpus": 1}
    models = [application(name, model, engine, resources=resources) for name in NAMES]
    names: tuple[str, ...] = NAMES
    if large:
        fp8 = engine | {"quantization": "fp8"}
        models.append(application("large", large, fp8, resources=resources))
        names = (*NAMES, "large")
    groups = {"big": TERMS.model_dump()}
    command = serve_run(folder, port, *models, swap_groups=groups)
    log = folder / f"swaps-{'eager' if eager else 'graphs'}{'-large' if large else ''}.log"
    before = host(), gpu_memory_mib()
    began = time.monotonic()
    server = Server(command, port, log, **RAY)
    found: dict[str, Any] = {"host_before": before[0], "gpu_mib_before": before[1]}
    try:
        server.wait(max(10.0, deadline - time.monotonic()))
        all_up = until(
            lambda: up(port, len(models)),
            max(1.0, deadline - time.monotonic()),
        )
        found |= {
            "first_answer_s": server.seconds,
            "all_have_started_s": all_up and round(time.monotonic() - began, 1),
            "started": [line for line in _ANSI.sub("", server.text()).splitlines()
                        if "start: " in line or "Sleep mode" in line or "sleep freed" in line],
        }  # fmt: skip
        found |= {"host_all_started": host(), "gpu_mib_all_started": gpu_memory_mib()}
        found["gpu_mib_by_process"] = gpu_processes_mib()
        found |= _swaps(server, names, deadline)
        if time.monotonic() + 60 < deadline:
            found["a stream that is paused"] = _paused(server)
        found["gpu_mib_by_process_after"] = gpu_processes_mib()
        found |= {"engines_gib": engines_gib(server), "host_after": host()}
        return found
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}"
        found["log"] = server.text()[-3000:]
        return found
    finally:
        server.stop()


def _swaps(server: Server, names: tuple[str, ...], deadline: float) -> dict[str, Any]:
    """Ask each model in turn, so that every request needs a swap."""
    log, rows, texts = Log(server), [], dict[str, set[str]]()
    awake_ttft = []
    for turn in range(4):
        for name in names:
            if time.monotonic() + 30 > deadline:
                break
            swaps = log.count()
            first, _, text = ask(server.port, name, 8)
            until(lambda swaps=swaps: log.count() > swaps, 3)  # type: ignore[misc]
            texts.setdefault(name, set()).add(text)
            row = {"turn": turn, "model": name, "ttft": first, **log.last()}
            row["gpu_mib"] = max(gpu_memory_mib())
            rows.append(row)
            print(json.dumps(row), flush=True)
            awake_ttft.append(ask(server.port, name, 8)[0])
    return {
        "swaps": rows,
        "first swaps": _spread(rows[: len(names)]),
        "later swaps": _spread(rows[len(names) :]),
        "ttft_awake_s": sorted(awake_ttft),
        "says_the_same_after_swaps": {name: len(said) == 1 for name, said in texts.items()},
    }


def _spread(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Min, median and max of each part."""
    found = {}
    for part in ("drain", "sleep", "slot", "wake", "ttft"):
        values = [row[part] for row in rows if part in row]
        if values:
            found[part] = [min(values), statistics.median(values), max(values)]
    return found


def _paused(server: Server) -> dict[str, Any]:
    """A long stream of the first model; another one is asked for meanwhile."""
    port, long = server.port, 1000
    _, alone_s, alone = ask(port, NAMES[0], long)
    said: list[tuple[float, float, str]] = []
    stream = threading.Thread(target=lambda: said.append(ask(port, NAMES[0], long)))
    stream.start()
    time.sleep(2)
    other_ttft, _, _ = ask(port, NAMES[1], 8)
    stream.join(60)
    if not said:
        return {"failed": "the stream did not end"}
    return {
        "alone_s": alone_s,
        "paused_s": said[0][1],
        "the_other_ttft": other_ttft,
        "characters": [len(alone), len(said[0][2])],
        "same_text": said[0][2] == alone,
        "last_swap": Log(server).last(),
    }

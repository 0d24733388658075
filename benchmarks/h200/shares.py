"""Several models on one GPU: planned against taken memory, deaths while others start, a full GPU.

Three engines start at once, a fourth whose part is too small is refused. Then two replicas are
killed, the second while the first starts again; then one finds its place on the GPU taken.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.h200.server import MODEL, RAY, Server, application, ready, serve_run, until
from serve_app.config.document import load
from serve_app.errors import UserError
from serve_app.planner import check_model, choose, together
from serve_app.planner.check_machine import Limits
from serve_app.planner.hardware import GIB
from serve_app.planner.loading import load_model
from serve_app.replica.start import gpu

ENGINE = {"max_model_len": 8192, "enforce_eager": True}
PARTS = {MODEL: 0.5, "small-a": 0.2, "small-b": 0.2}
TOO_SMALL = "too-small"

_TOKENS = r"ServeReplica:{name}:.*GPU KV cache size: ([\d,]+) tokens"
_HOG = "import sys, torch; held = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device='cuda'); "
_HOG += "print('held', flush=True); sys.stdin.read()"


def measure(large: Path, small: Path, folder: Path, port: int, deadline: float) -> dict[str, Any]:
    """The step; ``deadline`` is by ``time.monotonic``. On a machine with no kernel compiled yet the
    first start takes 200 s, all of it 450 s; where the time is short, the last parts are left out.
    """

    def left(most: float) -> float:
        return max(0.0, min(most, deadline - time.monotonic() - 15))

    parts = PARTS | {TOO_SMALL: 0.02}
    models = [
        application(
            name,
            large if name == MODEL else small,
            ENGINE,
            frontends=1,
            resources={"gpu_share": part},
        )
        for name, part in parts.items()
    ]
    device = gpu.given()
    assert device is not None
    found: dict[str, Any] = {"gpu": device.kind.name, "free_gib_before": _gib(device.free())}
    found["refused before a start"] = _refused(folder, models, device)
    command = serve_run(folder, port, *models)
    server = Server(command, port, folder / "shares.log", **RAY)
    try:
        began = time.monotonic()
        started = until(lambda: all(answers(port, name) for name in PARTS), left(280))
        found["all three answer after_s"] = started
        found["memory"] = _memory(server, device, Path(command[-1]))
        until(lambda: bool(state(port, TOO_SMALL).get("message")), left(10))
        found["the part that is too small"] = state(port, TOO_SMALL).get("message")
        _print(found)
        if started is None:
            return found | {"failed": server.text()[-6000:]}
        if left(1e9) > 130:
            found["two deaths"] = _two_deaths(server, left)
            _print(found["two deaths"])
        if left(1e9) > 70:
            found["a full GPU"] = _full(server, device, left)
        found["step of seconds"] = round(time.monotonic() - began, 1)
        return found
    finally:
        server.stop()


def _refused(folder: Path, models: list[dict[str, Any]], device: gpu.Device) -> str:
    """What ``serve-app run`` says where the parts together are more than the GPU."""
    path = folder / "overcommitted.json"
    more = [json.loads(json.dumps(model)) for model in models[:3]]
    for model in more:
        model["args"]["resources"]["gpu_share"] = 0.4
    path.write_text(json.dumps({"applications": more}))
    try:
        check_model.refuse(load(path), Limits((device.kind,), 64, 500 * GIB, 400 * GIB))
    except UserError as error:
        return str(error)
    return "nothing"


def _memory(server: Server, device: gpu.Device, config: Path) -> dict[str, Any]:
    """Each model's planned and taken memory, in GiB, and KV tokens."""
    models = load(config).models
    held: dict[str, int] = {}
    for holder in device.holders():
        name = gpu.name_of(holder.pid).strip("'")
        held[name] = held.get(name, 0) + (holder.held or 0)
    found: dict[str, Any] = {}
    for name in PARTS:
        model = load_model(models[name])
        plan = choose.plan_on(model, choose.arguments_of(models[name]), device.kind)
        part = together.part_of(name, models[name], device.kind, plan)
        assert part is not None
        sizes = together.as_json([together.Shared("", [part])])[0]["models"][0]
        planned = sum(
            sizes[f"{each}_bytes"] for each in ("weights", "working", "context", "kv_cache")
        )
        told = re.findall(_TOKENS.format(name=name), server.text())
        found[name] = {
            "part_gib": _gib(sizes["part_bytes"]),
            "planned_gib": _gib(planned),
            "taken_gib": _gib(held.get(name, 0)),
            "planned_kv_tokens": plan.kv_cache_tokens,
            "kv_tokens": int(told[-1].replace(",", "")) if told else None,
        }
    return found | {"free_gib": _gib(device.free()), "holders": held}


def _two_deaths(server: Server, left: Any) -> dict[str, Any]:
    """One replica is killed; while it starts again, another one is."""
    began = time.monotonic()
    first = _kill(server, "small-b")
    imports = ("", "starting the engine")
    again = until(lambda: _starts(server.port, "small-b") not in imports, left(90))
    phase = _starts(server.port, "small-b")
    second = _kill(server, MODEL)
    until(lambda: not answers(server.port, MODEL), 10)
    back = until(lambda: all(answers(server.port, name) for name in PARTS), left(150))
    return {
        "killed": [first, second],
        "second killed after_s": again,
        "while the first was": phase,
        "all answer again after_s": None if back is None else round(time.monotonic() - began, 1),
    }


def _full(server: Server, device: gpu.Device, left: Any) -> dict[str, Any]:
    """A replica's place is taken by another process as soon as it is gone."""
    _kill(server, "small-a")
    until(lambda: device.free() > 0.25 * device.kind.memory_bytes, 20)
    with _hog(device.free() - 4 * GIB):
        waits = until(lambda: "memory" in _starts(server.port, "small-a"), left(90))
        phase = _starts(server.port, "small-a")
    began = time.monotonic()
    back = until(lambda: answers(server.port, "small-a"), left(60))
    return {
        "waits after_s": waits,
        "its phase": phase,
        "answers after the memory came back after_s": back and round(time.monotonic() - began, 1),
    }


@contextmanager
def _hog(size: int) -> Iterator[None]:
    command = [sys.executable, "-c", _HOG, str(size)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def _kill(server: Server, name: str) -> str:
    for process in server.processes(f"ray::ServeReplica:{name}:"):
        process.send_signal(signal.SIGKILL)
    return name


def state(port: int, name: str) -> dict[str, Any]:
    """A model's part of GET /ready."""
    return dict(ready(port).get("models", {}).get(name, {}))


def _starts(port: int, name: str) -> str:
    """The phase of a model's starting replica; empty without one."""
    return next((str(one["phase"]) for one in state(port, name).get("starting", [])), "")


def answers(port: int, name: str) -> bool:
    body = {"model": name, "prompt": "x " * 50, "max_tokens": 2, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with suppress(OSError, ValueError), urllib.request.urlopen(request, timeout=5) as answer:
        return bool(json.load(answer)["choices"])
    return False


def _gib(size: int) -> float:
    return round(size / GIB, 2)


def _print(what: Any) -> None:
    print(json.dumps(what), flush=True)

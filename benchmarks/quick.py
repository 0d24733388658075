"""``python -m benchmarks.quick``: what this gateway costs, on this machine, in minutes.

All arms run one after the other, a few rounds of it, so that what the machine does meanwhile
falls on all of them. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks import arms, load, profiling, report
from benchmarks.tiny_model import tiny_model
from serve_app.errors import UserError

_CACHE = Path(".cache/bench")
_RESULTS = Path(__file__).parent / "results"
_LEVELS = (1, 16, 64)
_DEFAULT_ARMS = "bare,python,haproxy,rayllm"


def main() -> int:
    options = _options()
    console = Console(highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        load.require_wrk()
        chosen = _chosen(options.arms)
        setup = _setup(options, console)
        return _run(options, chosen, setup, console)
    except UserError as error:
        print(f"bench-quick: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description=__doc__)
    parser.add_argument("--arms", default=_DEFAULT_ARMS, help=f"of: {', '.join(arms.ARMS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="concurrency levels, such as 64 or 1,64")
    parser.add_argument("--seconds", type=float, default=12, help="for each level, about")
    parser.add_argument(
        "--executor",
        choices=["mp", "uni"],
        default="mp",
        help="vLLM's executor; Ray Serve LLM has only mp on a CPU",
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="for every engine"
    )
    parser.add_argument(
        "--patience", type=float, default=60, help="seconds to wait for others to be quiet"
    )
    parser.add_argument("--profile", action="store_true", help="py-spy at the highest level")
    parser.add_argument("--native", action="store_true", help="py-spy sees C frames too")
    parser.add_argument("--results", type=Path, help="where the JSON goes", default=None)
    return parser.parse_args()


def _chosen(names: str) -> list[arms.Arm]:
    unknown = [n for n in names.split(",") if n not in arms.ARMS]
    if unknown:
        raise UserError(f"there is no arm '{unknown[0]}' (arms: {', '.join(arms.ARMS)})")
    chosen = [arms.ARMS[n] for n in names.split(",")]
    for arm in chosen:
        for package in arm.needs:
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"the arm '{arm.name}' needs the package {package}; run: "
                    f"{sys.executable} -m pip install --no-deps {package}"
                )
    return chosen


def _setup(options: argparse.Namespace, console: Console) -> arms.Setup:
    _CACHE.mkdir(parents=True, exist_ok=True)
    model = tiny_model(_CACHE / "tiny-llama", console)
    work = Path(tempfile.mkdtemp(prefix="serve-app-bench-"))
    engine = arms.ENGINE | {"distributed_executor_backend": options.executor}
    env = dict(pair.partition("=")[::2] for pair in options.env)
    return arms.Setup(model, work, engine, env)


def _run(
    options: argparse.Namespace, chosen: list[arms.Arm], setup: arms.Setup, console: Console
) -> int:
    levels = sorted(int(c) for c in options.only.split(",")) if options.only else list(_LEVELS)
    machine = report.machine()
    console.print(report.facts(machine), markup=False)
    console.print(f"logs: {setup.work}", markup=False)
    records: list[report.Record] = []
    for number in range(1, options.rounds + 1):
        for arm in chosen:
            record = _measure(arm, number, setup, levels, options, console)
            records.append(record)
            shutil.copy(setup.work / f"{arm.name}.log", setup.work / f"{arm.name}-{number}.log")
    titles = {arm.name: arm.title for arm in chosen}
    print(f"\n{report.throughput(records, titles)}\n\n{report.ratios(records, titles)}\n")
    print(f"cores in use at c={levels[-1]}:\n{report.cores(records)}")
    path = options.results or _RESULTS / f"quick-{datetime.datetime.now():%Y-%m-%d-%H%M}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine,
        "setup": arms.as_json(setup) | {"tokens": load.TOKENS, "seconds": options.seconds},
        "records": records,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{path}")
    return 0


def _measure(
    arm: arms.Arm,
    number: int,
    setup: arms.Setup,
    levels: list[int],
    options: argparse.Namespace,
    console: Console,
) -> report.Record:
    record: dict[str, Any] = {"arm": arm.name, "round": number, "load": {}}
    body = setup.work / "request.json"
    body.write_bytes(load.request_body())
    try:
        with arms.started(arm, setup) as running:
            record["start_s"] = running.wait_until_it_answers()
            record["events_per_request"] = load.check_stream(running.port)
            _settle(running, body, levels)
            for concurrency in levels:
                level = _undisturbed(running, concurrency, body, options)
                record["load"][concurrency] = level
                if concurrency == levels[-1]:
                    record["cores"] = level.pop("cores")
                time.sleep(1)  # the engine drops what wrk cut off
            if 1 in levels:
                _wait_for_quiet(running, options.patience)
                record["first_token"] = dataclasses.asdict(load.first_token(running.port))
            if options.profile:
                _profile(running, levels[-1], body, options)
    except (UserError, OSError, ValueError) as error:
        record["error"] = str(error)
    _say(record, console)
    return record


def _settle(running: arms.Running, body: Path, levels: list[int]) -> None:
    """Warm every path, and let Ray's processes finish their start."""
    load.run_wrk(running.port, levels[-1], 3, body, waves=1)
    time.sleep(2)


def _undisturbed(
    running: arms.Running, concurrency: int, body: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """The least disturbed of up to three tries; on a machine of one's own, the first."""
    tries: list[dict[str, Any]] = []
    while len(tries) < 3:
        _wait_for_quiet(running, options.patience)
        watch = _CpuWatch(running)
        measured = load.run_wrk(running.port, concurrency, options.seconds, body)
        cores = watch.cores() | {"(wrk)": round(measured.client_cores, 3)}
        others = watch.busy() - sum(cores.values())
        level = dataclasses.asdict(measured) | {"others_cores": round(others, 3), "cores": cores}
        tries.append(level)
        if others <= report.DISTURBED:
            break
    return min(tries, key=lambda t: t["others_cores"])


def _wait_for_quiet(running: arms.Running, patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        watch = _CpuWatch(running)
        time.sleep(1)
        own = sum(watch.cores().values())
        if watch.busy() - own <= report.DISTURBED:
            return


class _CpuWatch:
    """CPU use from here on: of an arm by process, and of the whole machine, in cores."""

    def __init__(self, running: arms.Running) -> None:
        self._running = running
        self._before = arms.cpu_seconds(running)
        self._busy = _busy_seconds()
        self._began = time.monotonic()

    def cores(self) -> dict[str, float]:
        self._elapsed = time.monotonic() - self._began
        self._busy = _busy_seconds() - self._busy
        used: dict[str, float] = defaultdict(float)
        for process, (name, seconds) in arms.cpu_seconds(self._running).items():
            used[name] += (seconds - self._before.get(process, (name, 0.0))[1]) / self._elapsed
        return {name: round(share, 3) for name, share in used.items() if share > 0.002}

    def busy(self) -> float:
        return self._busy / self._elapsed


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _profile(
    running: arms.Running, concurrency: int, body: Path, options: argparse.Namespace
) -> None:
    """A run of its own, since being watched makes a process slower."""
    seconds = max(10, int(options.seconds))
    watched = []
    for process in running.processes():
        name = arms.title(process)
        if any(part in name for part in running.arm.profiled) or name == "VLLM::EngineCore":
            short = name.replace("/", "_").split(":")[-1]
            into = Path(f"/tmp/bench-{running.arm.name}-{short}-{process.pid}.raw")
            watched.append((name, into, process.pid))
    recorders = [profiling.record(pid, seconds, into, native=options.native)
                 for _, into, pid in watched]  # fmt: skip
    measured = load.run_wrk(running.port, concurrency, seconds + 3, body)
    for recorder in recorders:
        with contextlib.suppress(Exception):
            recorder.wait(timeout=60)
        recorder.kill()
    print(f"\nprofile of {running.arm.name}: {measured.tokens_per_s:.0f} tokens/s while watched")
    for name, into, _ in watched:
        text = profiling.summary(into, seconds) if into.exists() else "  py-spy wrote nothing"
        print(f"{name} ({into})\n{text}\n", flush=True)


def _notes(level: dict[str, Any]) -> str:
    notes = [f"{level['errors']} ERRORS"] if level["errors"] else []
    if level["others_cores"] > report.DISTURBED:
        notes.append(f"others used {level['others_cores']:.2f} cores")
    return f" ({', '.join(notes)})" if notes else ""


def _say(record: report.Record, console: Console) -> None:
    levels = ", ".join(
        f"c={c} {level['tokens_per_s']:.0f} tok/s" + _notes(level)
        for c, level in record["load"].items()
    )
    ttft = record.get("first_token")
    shown = f", TTFT {ttft['ttft_p50_ms']:.1f} ms" if ttft else ""
    start = f" (up in {record['start_s']:.0f} s)" if "start_s" in record else ""
    console.print(f"round {record['round']} {record['arm']}: {levels}{shown}{start}", markup=False)
    if record.get("error"):
        console.print(f"  FAILED: {record['error']}", markup=False)


if __name__ == "__main__":
    sys.exit(main())

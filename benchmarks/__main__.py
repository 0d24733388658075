"""``make bench``: what this gateway costs on this machine, beside bare vLLM and others.

All contenders run one after the other, a few rounds of it, so that what the machine does meanwhile
falls on all of them. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks import arms, clients, load, others, profiling, report
from benchmarks.tiny_model import tiny_model
from serve_app.errors import UserError

_CACHE = Path(".cache/bench")
_RESULTS = Path(__file__).parent / "results"
_LEVELS = (1, 64)
_CLIENT_LEVEL = 16
"""Requests at once of the clients in Python: they take a core of the same machine."""

Running = Sequence[arms.Running]
"""What is measured, first the one that clients ask."""

_DEFAULT_ARMS = "bare,vllm-router,litellm,bare-n,bare-rust,haproxy,rayllm,rayllm-direct"


def main() -> int:
    options = _options()
    console = Console(highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        load.require_wrk()
        setup = _setup(options, console)
        chosen, left_out = _chosen(options.arms, setup)
        asked = clients.chosen(options.clients)
        return _run(options, chosen, left_out, asked, setup, console)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--arms", default=_DEFAULT_ARMS, help=f"of: {', '.join(arms.ARMS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="concurrency levels, such as 64 or 1,64")
    parser.add_argument("--seconds", type=float, default=5, help="for each level, about")
    parser.add_argument(
        "--clients", default="vllm", help=f"beside wrk, of: {', '.join(clients.ALL)}; or none"
    )
    parser.add_argument("--front-ends", type=int, default=1, help="of ours, and of bare-n")
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
        "--patience",
        type=float,
        default=20,
        help="seconds to wait for others to be quiet; 0: measure once, whatever they do",
    )
    parser.add_argument("--profile", action="store_true", help="py-spy at the highest level")
    parser.add_argument("--native", action="store_true", help="py-spy sees C frames too")
    parser.add_argument("--results", type=Path, help="where the JSON goes", default=None)
    parser.add_argument("--add", action="store_true", help="to the rounds that the file has")
    return parser.parse_args()


def _chosen(names: str, setup: arms.Setup) -> tuple[list[arms.Arm], dict[str, str]]:
    """The arms, and why some of them cannot run here."""
    unknown = [n for n in names.split(",") if n not in arms.ARMS]
    if unknown:
        raise UserError(f"there is no arm '{unknown[0]}' (arms: {', '.join(arms.ARMS)})")
    wanted = [arms.ARMS[n] for n in names.split(",")]
    reasons = {arm.name: arm.left_out(setup) for arm in wanted}
    chosen = [arm for arm in wanted if not reasons[arm.name]]
    if not chosen:
        raise UserError(f"no arm can run here: {'; '.join(reasons.values())}")
    return chosen, {name: why for name, why in reasons.items() if why}


def _setup(options: argparse.Namespace, console: Console) -> arms.Setup:
    _CACHE.mkdir(parents=True, exist_ok=True)
    model = tiny_model(_CACHE / "tiny-llama", console)
    work = Path(tempfile.mkdtemp(prefix="serve-app-bench-"))
    engine = arms.ENGINE | {"distributed_executor_backend": options.executor}
    env = dict(pair.partition("=")[::2] for pair in options.env)
    return arms.Setup(model, work, engine, env, options.front_ends)


def _run(
    options: argparse.Namespace, chosen: list[arms.Arm], left_out: dict[str, str],
    asked: dict[str, clients.Client], setup: arms.Setup, console: Console,
) -> int:  # fmt: skip
    levels = sorted(int(c) for c in options.only.split(",")) if options.only else list(_LEVELS)
    machine = report.machine()
    theirs = {name: others.version(name) for name in ("vllm-router", "litellm")}
    machine["packages"] |= {name: version for name, version in theirs.items() if version}
    console.print(report.facts(machine), markup=False)
    for name, why in left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)
    console.print(f"logs: {setup.work}", markup=False)
    groups: dict[str, list[arms.Arm]] = defaultdict(list)
    for arm in chosen:
        groups[arm.behind or arm.name].append(arm)
    path = options.results or _RESULTS / f"bench-{datetime.date.today()}.json"
    document: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "machine": machine,
        "command": f"python -m benchmarks {' '.join(sys.argv[1:])}".strip(),
        "contenders": {arm.name: arm.title for arm in chosen},
        "left_out": left_out,
        "setup": arms.as_json(setup)
        | {"tokens": load.TOKENS, "seconds": options.seconds, "clients": list(asked)},
        "records": [],
    }
    if options.add:
        document = _added(document, path)
    done = Counter(record["arm"] for record in document["records"])
    for number in range(1, options.rounds + 1):
        for server, group in groups.items():
            for record in _measure_group(arms.ARMS[server], group, setup, levels, asked, options):
                document["records"].append({"round": done[record["arm"]] + number, **record})
                _say(document["records"][-1], console)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(document, indent=1) + "\n")
            for name in {server, *(arm.name for arm in group)}:
                log = setup.work / f"{name}.log"
                with contextlib.suppress(FileNotFoundError):
                    log.rename(log.with_name(f"{name}-{number}.log"))
    print(f"\n{report.page(document)}")
    print(f"written: {path}; make charts brings it into the docs")
    return 0


def _added(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """With the records that the file has already, if they were made alike.

    Raises:
        UserError: they were not.
    """
    if not path.is_file():
        return document
    before = json.loads(path.read_text())
    if before["setup"] != document["setup"]:
        raise UserError(f"{path} has another setup; take its options, or another --results")
    return {
        **document,
        "command": f"{before['command']}; {document['command']}",
        "contenders": before["contenders"] | document["contenders"],
        "left_out": before["left_out"] | document["left_out"],
        "records": before["records"],
    }


def _measure_group(
    server: arms.Arm, group: list[arms.Arm], setup: arms.Setup, levels: list[int],
    asked: dict[str, clients.Client], options: argparse.Namespace,
) -> Iterator[report.Record]:  # fmt: skip
    """A server, and each gateway by others in front of it, in turn; one record for each."""
    try:
        with arms.started(server, setup) as running:
            start_s = running.wait_until_it_answers()
            for arm in group:
                if arm is server:
                    record = _measure([running], setup, levels, asked, options)
                    yield {"arm": arm.name, "start_s": start_s, **record}
                    continue
                behind = dataclasses.replace(setup, upstream=running.port)
                try:
                    with arms.started(arm, behind) as front:
                        front_s = front.wait_until_it_answers()
                        record = _measure([front, running], setup, levels, asked, options)
                    yield {"arm": arm.name, "start_s": front_s, **record}
                except UserError as error:
                    yield {"arm": arm.name, "load": {}, "error": str(error)}
    except UserError as error:
        yield from ({"arm": arm.name, "load": {}, "error": str(error)} for arm in group)


def _measure(
    running: Running, setup: arms.Setup, levels: list[int], asked: dict[str, clients.Client],
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """One contender in one round. Its first process is asked; CPU is counted of all of them."""
    record: dict[str, Any] = {"load": {}}
    body = setup.work / "request.json"
    body.write_bytes(load.request_body())
    port = running[0].port
    try:
        record["events_per_request"] = load.check_stream(port)
        load.run_wrk(port, levels[-1], 2, body, waves=1)  # warm every path
        time.sleep(2)  # Ray's processes finish their start
        for concurrency in levels:
            level = _undisturbed(running, concurrency, body, options)
            record["load"][concurrency] = level
            if concurrency == levels[-1]:
                record["cores"] = level.pop("cores")
            time.sleep(1)  # the engine drops what wrk cut off
        if 1 in levels:
            record["first_token"] = dataclasses.asdict(load.first_token(port, requests=12))
        for name, client in asked.items():
            _wait_for_quiet(running, options.patience)
            record.setdefault("clients", {})[name] = client(
                clients.Target(port, setup.model, setup.work, _CLIENT_LEVEL)
            )
        if options.profile:
            _profile(running[0], levels[-1], body, options)
    except Exception as error:  # told, and the others go on
        record["error"] = f"{type(error).__name__}: {error}"
    return record


def _undisturbed(
    running: Running, concurrency: int, body: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """The least disturbed of up to three tries; on a machine of one's own, the first."""
    tries: list[dict[str, Any]] = []
    while len(tries) < 3:
        _wait_for_quiet(running, options.patience)
        watch = _CpuWatch(running)
        measured = load.run_wrk(running[0].port, concurrency, options.seconds, body)
        cores = watch.cores() | {"(wrk)": round(measured.client_cores, 3)}
        elsewhere = watch.busy() - sum(cores.values())
        level = dataclasses.asdict(measured) | {"others_cores": round(elsewhere, 3), "cores": cores}
        tries.append(level)
        if elsewhere <= report.DISTURBED or not options.patience:
            break
    return min(tries, key=lambda t: t["others_cores"])


def _wait_for_quiet(running: Running, patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        watch = _CpuWatch(running)
        time.sleep(1)
        own = sum(watch.cores().values())
        if watch.busy() - own <= report.DISTURBED:
            return


class _CpuWatch:
    """CPU use from here on: of a contender by process, and of the whole machine, in cores."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._before = self._seconds()
        self._busy = _busy_seconds()
        self._began = time.monotonic()

    def cores(self) -> dict[str, float]:
        self._elapsed = time.monotonic() - self._began
        self._busy = _busy_seconds() - self._busy
        used: dict[str, float] = defaultdict(float)
        for process, (name, seconds) in self._seconds().items():
            used[name] += (seconds - self._before.get(process, (name, 0.0))[1]) / self._elapsed
        return {name: round(share, 3) for name, share in used.items() if share > 0.002}

    def busy(self) -> float:
        return self._busy / self._elapsed

    def _seconds(self) -> dict[psutil.Process, tuple[str, float]]:
        return {k: v for one in self._running for k, v in arms.cpu_seconds(one).items()}


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

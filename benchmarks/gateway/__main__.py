"""``make bench-gateway``: what the whole gateway costs, with everything on and off, beside others.

An instant upstream and a client in C stand around each contender; their CPU is not counted. All
contenders live for the whole run and take turns in each round, so that what the machine does
meanwhile falls on all. With ``--soak REQUESTS`` only the gateway with everything on runs, and its
memory is told as the requests pass.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import resource
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks import processes, report
from benchmarks.gateway import results, soak
from benchmarks.gateway.arms import TREE, Arm, Contenders, load
from serve_app.errors import UserError

_PROMPT = "Tell a short story of a fox and a hare who meet at a river. " * 8

DOCUMENT = {
    "model": "instant",
    "max_tokens": 16,
    "messages": [{"role": "user", "content": _PROMPT}],
}
STREAM = {**DOCUMENT, "stream": True}
PACED = {**STREAM, "model": "paced", "max_tokens": 128}
HELD = {**STREAM, "model": "slow", "max_tokens": 1000}

_SECONDS = 3.0
"""Of each measurement, about."""

_BUSY = 64
"""Connections where the contender has as much to do as it can."""

_PACED = 32
"""Streams of 50 tokens/s: 1600 events/s, which each contender can relay without falling behind
far; one that is behind sends several at once, which is cheaper."""

_OPEN_LOOP = 0.7
"""Part of what a contender can at most that it is asked for in an open loop."""


def main() -> int:
    options = _options()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        with contextlib.ExitStack() as running, tempfile.TemporaryDirectory() as work:
            if options.soak:
                text, data = soak.run(Path(work), options.port, options.soak, running)
            else:
                text, data = _compare(Path(work), options, running)
    except UserError as error:
        print(f"bench-gateway: {error}", file=sys.stderr)
        return 2
    print(f"\n{text}")
    name = f"{'soak' if options.soak else 'gateway'}-{datetime.date.today()}"
    path = (options.results or TREE / "benchmarks" / "results") / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    print(f"written: {path}, and all numbers beside it (.json)")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1000, help="requests/s of the open loop")
    parser.add_argument("--streams", type=int, default=5000, help="open at once, for the memory")
    parser.add_argument("--only", default="off,on,litellm,vllm_router", help="contenders")
    parser.add_argument("--port", type=int, default=18700, help="the first of twelve")
    parser.add_argument("--soak", type=int, metavar="REQUESTS", help="memory over so many requests")
    parser.add_argument("--results", type=Path, help="the folder that the table is written to")
    return parser.parse_args()


def _compare(
    work: Path, options: argparse.Namespace, running: contextlib.ExitStack
) -> tuple[str, dict[str, Any]]:
    client = processes.wire(work)
    contenders = Contenders(work, options.port, running)
    upstream = contenders.upstream()
    arms, absent = [], {}
    for number, name in enumerate(options.only.split(","), 1):
        try:
            arms.append(getattr(contenders, name)(options.port + 2 + 2 * number))
        except (UserError, OSError) as error:
            absent[name] = str(error)
    measured = [_Measured(client, arm, upstream) for arm in [upstream, *arms]]
    before = os.getloadavg()
    records = []
    for number in range(1, options.rounds + 1):
        for one in measured:
            record = {"round": number, "arm": one.arm.name, **one.once(options.rate)}
            records.append(record)
            print(json.dumps({k: _rounded(v) for k, v in record.items()}), flush=True)
    memory = [one.memory(options.streams) for one in measured[1:]]
    data = {
        "machine": report.machine(),
        "command": f"python -m benchmarks.gateway {' '.join(sys.argv[1:])}".strip(),
        "load_average": [before[0], os.getloadavg()[0]],
        "absent": absent,
        "recorded": {one.arm.name: one.recorded() for one in measured if one.arm.headers},
        "records": records,
        "memory": memory,
    }
    return results.markdown(data), data


def _rounded(value: Any) -> Any:
    return round(value, 1) if isinstance(value, float) else value


class _Measured:
    """One contender, and what is asked of it."""

    def __init__(self, client: Path, arm: Arm, upstream: Arm) -> None:
        self.arm = arm
        self._client, self._upstream = client, upstream
        self._asked = 0
        self._events = {body["model"]: self._probe(body) for body in (STREAM, PACED, HELD | SHORT)}
        self._load(_BUSY, 2 * _BUSY, STREAM)  # warm
        self._peak = self._rate(self._load(_BUSY, 3 * _BUSY, DOCUMENT))
        self._alone = self._rate(self._load(1, 100, DOCUMENT))
        self._peak_streams = self._rate(self._load(_BUSY, 3 * _BUSY, STREAM))

    def once(self, rate: float) -> dict[str, float]:
        """One round."""
        alone = self._load(1, int(self._alone * _SECONDS), DOCUMENT)
        busy = self._load(_BUSY, int(self._peak * _SECONDS), DOCUMENT)
        streams = self._load(_BUSY, int(self._peak_streams * _SECONDS), STREAM)
        paced = self._load(_PACED, _PACED, PACED)
        rate = min(rate, _OPEN_LOOP * self._rate(busy))
        due = self._load(_BUSY * 4, int(rate * _SECONDS), DOCUMENT, rate)
        parts = (alone, busy, streams, paced, due)
        return {
            "alone_p50_us": alone["p50_us"],
            "alone_p99_us": alone["p99_us"],
            "request_cpu_us": busy["cpu_us"] / busy["answers"],
            "requests_per_s": self._rate(busy),
            "stream_cpu_us": streams["cpu_us"] / streams["answers"],
            "event_cpu_us": paced["cpu_us"] / paced["events"],
            "rate": rate,
            "rate_p50_us": due["p50_us"],
            "rate_p99_us": due["p99_us"],
            "errors": sum(part["errors"] for part in parts),
        }

    def memory(self, streams: int) -> dict[str, Any]:
        """Of the contender at rest, and with so many streams open, each with its first token."""
        assert self.arm.pid
        before = processes.memory_mib(self.arm.pid)
        with load(self._client, self.arm, streams, streams, HELD, self._events["slow"]):
            opened = self._until(streams, 60)
            held = processes.memory_mib(self.arm.pid)
        self._asked += streams
        self._until(0, 20)
        after = processes.memory_mib(self.arm.pid)
        return {"arm": self.arm.name, "streams": opened, "before_mib": before, "held_mib": held,
                "after_mib": after}  # fmt: skip

    def recorded(self) -> dict[str, int]:
        """What its usage database has, beside the requests that were sent to it."""
        wanted = self._asked
        deadline = time.monotonic() + 60
        while True:
            said = json.loads(self._get(f"http://127.0.0.1:{self.arm.port}/v1/usage"))["data"][0]
            if said["requests"] >= wanted or time.monotonic() > deadline:
                return {"sent": wanted, **said}
            time.sleep(1)

    def _until(self, streams: int, within_s: float) -> int:
        """Wait until the upstream has so many streams, or no more come; how many it has."""
        deadline = time.monotonic() + within_s
        while True:
            found = int(self._get(f"http://127.0.0.1:{self._upstream.port}/streams"))
            if found == streams or time.monotonic() > deadline:
                time.sleep(2)  # what it has sent has arrived
                return found
            time.sleep(0.5)

    def _probe(self, body: dict[str, Any]) -> int:
        """The events of one whole answer."""
        url = f"http://127.0.0.1:{self.arm.port}/v1/chat/completions"
        said = self._get(url, json.dumps(body).encode())
        if b"data: [DONE]" not in said:
            raise UserError(f"{self.arm.name} does not stream: {said[:500]!r}")
        self._asked += 1
        return said.count(b"\n\n")

    def _get(self, url: str, body: bytes | None = None) -> bytes:
        lines = [line.split(": ", 1) for line in self.arm.headers.split("\r\n") if line]
        headers = {"content-type": "application/json", **dict(lines)}
        try:
            asked = urllib.request.Request(url, body, headers)
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise UserError(f"{self.arm.name}: {error} {error.read()[:500]!r}") from None

    def _load(
        self, connections: int, requests: int, body: dict[str, Any], rate: float = 0.0
    ) -> dict[str, Any]:
        events = self._events[body["model"]] if body.get("stream") else 0
        self._asked += requests
        before = self.arm.cpu_s()
        with load(self._client, self.arm, connections, requests, body, events, rate) as client:
            said, _ = client.communicate()
        used = self.arm.cpu_s() - before
        return {**json.loads(said), "cpu_us": used * 1e6}

    @staticmethod
    def _rate(said: dict[str, Any]) -> float:
        return float(said["answers"] / said["seconds"])


SHORT = {"max_tokens": 1}
"""So that the answer of a slow model ends."""


if __name__ == "__main__":
    sys.exit(main())

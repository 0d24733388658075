"""The load: wrk for throughput, one patient Python client for the time to the first token."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from serve_app.errors import UserError

MODEL = "tiny-llama"
TOKENS = 64
PATH = "/v1/chat/completions"
NONE: Mapping[str, str] = {}
WORDS = (
    "river", "house", "light", "water", "stone", "green", "small", "north", "paper", "table",
    "music", "plant", "story", "night", "money", "point", "board", "train", "field", "heart",
)  # fmt: skip
"""Each about one token: a prompt for gateways that take no list of token ids (LiteLLM)."""

_SCRIPT = Path(__file__).with_name("wrk.lua")

# wrk runs until it is told that its script is content.
_LONGEST_S = 600


def request_body(max_tokens: int = TOKENS) -> bytes:
    return json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Tell me a story about a lighthouse."}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


def require_wrk() -> str:
    """The path of wrk.

    Raises:
        UserError: how to install it.
    """
    found = shutil.which("wrk")
    if found is None:
        raise UserError("wrk, the load generator, is not installed; run: apt-get install wrk")
    return found


@dataclass(frozen=True)
class Load:
    """What one run of wrk measured."""

    concurrency: int
    requests: int
    tokens_per_s: float
    seconds: float
    events_per_request: float
    errors: int
    client_cores: float
    """CPU that wrk itself took, in cores."""


def run_wrk(
    port: int, concurrency: int, seconds: float, body: Path, waves: int = 3,
    path: str = PATH, prompt_tokens: int = 0, headers: Mapping[str, str] = NONE,
    words: bool = False,
) -> Load:  # fmt: skip
    """Keep ``concurrency`` requests running for about ``seconds`` seconds.

    Args:
        prompt_tokens: random token ids that take the place of ``"@PROMPT@"`` in the body, others
            for each request; 0 sends the body as it is.
        words: the prompt is so many of :data:`WORDS` instead.

    Raises:
        UserError: the load did not finish; what wrk said.
    """
    command = [
        require_wrk(), "-t1", f"-c{concurrency}", f"-d{_LONGEST_S}s", "--timeout", "300s",
        *(it for name, value in headers.items() for it in ("-H", f"{name}: {value}")),
        "-s", str(_SCRIPT), f"http://127.0.0.1:{port}{path}", "--",
        str(body), str(concurrency), str(seconds), str(waves), str(prompt_tokens),
        ",".join(WORDS) if words else "",
    ]  # fmt: skip
    wrk = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    patience = threading.Timer(_LONGEST_S - 10, wrk.kill)
    patience.start()
    said: list[str] = []
    result: list[str] | None = None
    errors = 0
    began, cpu = time.monotonic(), 0.0
    assert wrk.stdout is not None
    try:
        for line in wrk.stdout:
            said.append(line)
            word, _, rest = line.partition(" ")
            if word == "RESULT":
                result = rest.split()
                times = psutil.Process(wrk.pid).cpu_times()
                cpu = (times.user + times.system) / (time.monotonic() - began)
                wrk.send_signal(signal.SIGINT)  # ends its sleep
                threading.Timer(3, wrk.kill).start()
            elif word == "ERRORS":
                errors += sum(int(n) for n in rest.split())
    finally:
        patience.cancel()
        wrk.kill()
        wrk.wait()
    if result is None:
        raise UserError(f"the load at c={concurrency} did not finish: {''.join(said)[-800:]}")
    requests, failed, tokens, events = (int(n) for n in result[:4])
    elapsed = float(result[4])
    if failed:
        errors += failed
    return Load(
        concurrency,
        requests,
        tokens / elapsed,
        elapsed,
        events / max(1, requests - failed),
        errors,
        cpu,
    )


@dataclass(frozen=True)
class FirstToken:
    """One client, one request after the other."""

    ttft_p50_ms: float
    ttft_p90_ms: float
    request_p50_ms: float
    requests: int


def first_token(port: int, requests: int = 30) -> FirstToken:
    """Time from a request's last byte sent to its first event."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = request_body()
    first, whole = [], []
    for _ in range(requests + 2):
        began = time.perf_counter()
        connection.request("POST", PATH, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        while not answer.readline().startswith(b"data: {"):
            if answer.isclosed():
                raise UserError(f"status {answer.status} and no event")
        first.append(time.perf_counter() - began)
        answer.read()
        whole.append(time.perf_counter() - began)
    connection.close()
    first, whole = first[2:], whole[2:]
    return FirstToken(
        statistics.median(first) * 1000,
        statistics.quantiles(first, n=10)[-1] * 1000,
        statistics.median(whole) * 1000,
        requests,
    )


def check_stream(port: int) -> int:
    """The number of events of one answer, which has all its tokens.

    Raises:
        UserError: it has not.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", PATH, request_body(), {"content-type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    usage = [e["usage"]["completion_tokens"] for e in events if e.get("usage")]
    if answer.status != 200 or usage[-1:] != [TOKENS] or "data: [DONE]" not in text:
        raise UserError(f"status {answer.status}, usage {usage}, {text[-300:]!r}")
    return len(events)


def answers(port: int) -> bool:
    """Whether a completion of one token comes back."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", PATH, request_body(1), {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status == 200 and b"[DONE]" in answer.read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

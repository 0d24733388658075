"""Starts that end because they take too long, or because nobody wants them."""

from __future__ import annotations

import subprocess
import sys

import pytest

OVERDUE = """
import multiprocessing, time
from serve_app.replica.start.watch import StartWatch
engine = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
engine.start()
with StartWatch("m", "r1", limit_s=0.5) as watch:
    engine.join()
print(watch.overdue, engine.exitcode)
"""

STUCK = """
import time
from serve_app.replica.start import watch as module
module.GRACE_S = 0.1
with module.StartWatch("m", "r1", limit_s=0.1):
    time.sleep(300)
"""

REPORTED = """
import time
from serve_app.cluster import serve
from serve_app.replica.start import watch as module
replicas = [
    {{"replica_id": id, "state": state, "start_time_s": 1.0}}
    for id, state in (("r1", {state!r}), ("r2", "STOPPING"))
]
application = {{"status": "DEPLOYING", "deployments": {{"ModelServer": {{"replicas": replicas}}}}}}
serve.report = lambda timeout_s: {{"applications": {{"m": application}}}}
module.PERIOD_S = 0.05
with module.StartWatch("m", "r1", limit_s=300) as watch:
    time.sleep({seconds})
print("started", watch.overdue)
"""


def run(script: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout.strip()


def test_the_engine_of_a_start_that_takes_too_long_is_ended() -> None:
    assert run(OVERDUE) == (0, "True -9")


def test_a_replica_that_cannot_be_broken_off_ends() -> None:
    assert run(STUCK) == (1, "")


@pytest.mark.parametrize(
    ("state", "seconds", "came_to"),
    [("STOPPING", 300, (0, "")), ("STARTING", 1, (0, "started False"))],
)
def test_a_start_ends_once_serve_wants_the_replica_gone(
    state: str, seconds: float, came_to: tuple[int, str]
) -> None:
    assert run(REPORTED.format(state=state, seconds=seconds)) == came_to

"""How many gateways a fleet needs: ``python -m benchmarks.scale.model --streams 10000``.

The costs are those of docs/scale.md, measured on the slow cores of a CI machine; ``--slower 0.5``
is a core twice as fast. What is printed is arithmetic: a plan to begin with, not a measurement.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from benchmarks import report
from serve_app.gateway.directory import PART, REFRESH_S, SELDOM_S
from serve_app.gateway.exchange import TOLD_PER_S


@dataclass(frozen=True)
class Costs:
    """Core seconds, MiB and files; where each comes from is in docs/scale.md."""

    request_s: float = 470e-6
    """A request and its whole answer, with everything off (relay-2026-11-27.json)."""

    request_on_s: float = 800e-6
    """With keys, limits, usage database, access log and spans (gateway-2026-11-27.json)."""

    event_s: float = 52e-6
    """An event of a stream, each in a write of its own (relay-2026-11-27.json)."""

    late_event_s: float = 13e-6
    """With eight events in a write, as a gateway that is late sends them (the same)."""

    haproxy_request_s: float = 74e-6
    haproxy_event_s: float = 25e-6
    """The same in HAProxy, which is on every node (relay-2026-11-27.json)."""

    front_end_s: float = 75e-6
    """Of a gateway for each front end that idles, each second: a third of a question and its
    answer."""

    heard_s: float = 225e-6
    """A question and its answer, which tells what other gateways have sent."""

    prompt_s: float = 14e-6
    """Each such prompt, of 28 kB."""

    index_mib: float = 1.1
    """At the most, for each replica that keeps 400,000 tokens (an 8B on an H100): what it has, in
    blocks of 179 bytes."""

    look_model_s: float = 19e-6
    """Of a gateway for each model, each look at Serve's report; with its replicas, five each."""

    gateway_mib: float = 115.0
    replica_mib: float = 0.03
    stream_mib: float = 0.029

    controller_replica_s: float = 58e-6
    """Of one turn of Serve's loop, for each replica."""

    report_replica_s: float = 45e-6
    """Of Serve's controller for one look of one gateway, for each replica."""

    pause_s: float = 0.1
    """Between two turns of Serve's loop: CONTROL_LOOP_INTERVAL_S."""


COSTS = Costs()

BUSY = 0.6
"""Part of a core that a gateway shall need: beyond, events wait for each other. They then go out
together and cost less, so it is late and not overrun."""

CONTROLLER_BUSY = 0.8
"""Part of its time from which on Serve's controller falls behind with health and scaling."""

FILES = 65536
"""Open files of a process: the usual hard limit (``ulimit -Hn``), up to which Ray raises it."""


@dataclass(frozen=True)
class Fleet:
    """What shall be served."""

    streams: int
    """Open at once."""

    tokens_per_s: float = 30.0
    """Of each stream; an event for each token."""

    requests_per_s: float | None = None
    """None: as many as end where an answer has 300 tokens."""

    models: int = 20
    replicas: int = 100
    front_ends: int = 1
    """Of each replica."""

    everything_on: bool = False

    @property
    def requests(self) -> float:
        if self.requests_per_s is not None:
            return self.requests_per_s
        return self.streams * self.tokens_per_s / 300


@dataclass(frozen=True)
class Plan:
    """What that takes."""

    gateways: int
    late_gateways: int
    """The fewest that keep up: events wait some milliseconds and go out together."""

    relaying_cores: float
    """Of all gateways together."""

    knowing_cores: float
    """Of each gateway, also without a request."""

    gateway_mib: float
    gateway_files: int
    haproxy_cores: float
    exchanges: int
    """Connections between gateways and front ends that are always open."""

    controller: float
    """Part of its time that Serve's controller is busy."""


def plan(fleet: Fleet, costs: Costs = COSTS, slower: float = 1.0, files: int = FILES) -> Plan:
    """The fewest gateways that stay below :data:`BUSY` and below the limit on open files."""
    events = fleet.streams * fleet.tokens_per_s
    each = costs.request_on_s if fleet.everything_on else costs.request_s
    relaying = slower * (fleet.requests * each + events * costs.event_s)
    front_ends = fleet.replicas * fleet.front_ends
    knowing = slower * (front_ends * costs.front_end_s + fleet.models * costs.look_model_s)
    if knowing >= BUSY:
        raise ValueError("a gateway is busy with knowing the replicas alone")
    by_files = 2 * fleet.streams / max(1, files - front_ends)
    gateways = max(1, math.ceil(max(relaying / (BUSY - knowing), by_files)))
    if gateways > 1:
        answers = min(fleet.requests, TOLD_PER_S)
        knowing += slower * (answers * costs.heard_s + fleet.requests * costs.prompt_s)
        gateways = max(gateways, math.ceil(relaying / (BUSY - knowing)))
    late = slower * (fleet.requests * each + events * costs.late_event_s) / (1 - knowing)
    return Plan(
        gateways=gateways,
        late_gateways=max(1, math.ceil(max(late, by_files))),
        relaying_cores=relaying,
        knowing_cores=knowing,
        gateway_mib=costs.gateway_mib
        + fleet.replicas * (costs.replica_mib + costs.index_mib)
        + fleet.streams / gateways * costs.stream_mib,
        gateway_files=2 * fleet.streams // gateways + front_ends,
        haproxy_cores=slower
        * (fleet.requests * costs.haproxy_request_s + events * costs.haproxy_event_s),
        exchanges=gateways * front_ends,
        controller=_controller(fleet.replicas, gateways, costs, slower),
    )


def _controller(replicas: int, gateways: int, costs: Costs, slower: float) -> float:
    """How busy Serve's controller is: turns of its loop, with a pause after each, and the looks of
    all gateways. Each gateway looks every second, or less often where a look takes long."""
    turn_s = slower * replicas * costs.controller_replica_s
    report_s = slower * replicas * costs.report_replica_s
    turns = turn_s / (turn_s + costs.pause_s)
    busy = 0.0
    for _ in range(100):  # a look takes longer where the controller is busy, and is then rarer
        took_s = report_s / (1 - min(busy, 0.95))
        looks = min(1.0, gateways * report_s / min(max(REFRESH_S, took_s / PART), SELDOM_S))
        busy += 0.1 * (looks + (1 - looks) * turns - busy)
    return busy


def table(fleets: list[Fleet], slower: float = 1.0) -> str:
    """A row for each fleet, in Markdown."""
    rows = []
    for fleet in fleets:
        it = plan(fleet, slower=slower)
        rows.append(
            [
                f"{fleet.streams:,}",
                f"{fleet.tokens_per_s:g}",
                f"{fleet.requests:.0f}" + (", everything on" if fleet.everything_on else ""),
                f"{fleet.models:,} / {fleet.replicas:,}",
                f"{it.gateways}",
                f"{it.late_gateways}",
                f"{it.relaying_cores:.1f}",
                f"{it.knowing_cores:.2f}",
                f"{it.gateway_mib:.0f} MiB, {it.gateway_files:,} files",
                f"{it.haproxy_cores:.1f}",
                f"{it.exchanges:,}",
                f"{it.controller:.0%}" + ("!" if it.controller > CONTROLLER_BUSY else ""),
            ]
        )
    header = [
        "streams at once", "tokens/s of each", "requests/s", "models / replicas", "gateways",
        "at the least",
        "cores for relaying, all", "for knowing the fleet, each", "each gateway",
        "HAProxy's cores, all", "exchanges open", "controller busy",
    ]  # fmt: skip
    return report.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, required=True, help="open at once")
    parser.add_argument("--tokens-per-s", type=float, default=30.0, help="of each stream")
    parser.add_argument("--requests-per-s", type=float, help="default: answers of 300 tokens")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--front-ends", type=int, default=1, help="of each replica")
    parser.add_argument("--everything-on", action="store_true", help="keys, limits, usage, spans")
    parser.add_argument("--slower", type=float, default=1.0, help="0.5: a core twice as fast")
    options = vars(parser.parse_args())
    slower = options.pop("slower")
    print(table([Fleet(**options)], slower))


if __name__ == "__main__":
    main()

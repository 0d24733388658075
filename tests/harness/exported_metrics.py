"""The metrics that a real run exports, for the tests of dashboards and alerts.

``make metrics`` runs a fleet on this CPU, does to it all that makes a metric appear (load that
preempts, a shared prefix, a killed replica, a fallback), and writes what Ray's agent then exports
to tests/kube/data/exported_metrics.txt: one line a metric, its type and its samples' labels.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from harness import processes, servers
from harness.processes import REPO
from harness.servers import CHAT, EMBED, Cluster
from serve_app.config import keys

RECORDED = REPO / "tests/kube/data/exported_metrics.txt"
_CONSTANT = "# Labels with one value: "

COLD = "cold"

TEAM, LIMITED = keys.new(), keys.new()
"""API keys and their hashes."""


@dataclass(frozen=True)
class Exported:
    """One metric: Prometheus' type, and every label that one of its samples has."""

    kind: str
    labels: frozenset[str]


def recorded() -> dict[str, Exported]:
    """The recorded metrics by the name that Ray gives them."""
    found = {}
    for line in RECORDED.read_text().splitlines():
        if line and not line.startswith("#"):
            name, kind, *labels = line.split()
            found[name] = Exported(kind, frozenset(labels))
    return found


def constant_labels() -> set[str]:
    """Labels that had one value on the whole page: no two series differ by them."""
    (line,) = [li for li in RECORDED.read_text().splitlines() if li.startswith(_CONSTANT)]
    return set(line.removeprefix(_CONSTANT).split())


def summary(families: Iterable[Metric]) -> dict[str, Exported]:
    """What :func:`recorded` would say of these."""
    found = {}
    for family in families:
        labels = frozenset(label for sample in family.samples for label in sample.labels)
        # The parser takes a counter's ending off; PromQL needs it.
        ending = "_total" if family.type == "counter" else ""
        found[family.name + ending] = Exported(family.type, labels - {"le", "quantile"})
    return found


def scrape() -> str:
    """What the agent of this machine's Ray node exports; needs :meth:`Cluster.ray`."""
    import ray

    (node,) = [n for n in ray.nodes() if n["Alive"]]
    answer = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=30)
    answer.raise_for_status()
    return answer.text


def run(folder: Path) -> str:
    """Start the fleet, provoke every metric, and return the agent's page."""
    chat = servers.chat_application()
    # Seven blocks hold one long request and a half: more of them preempt each other.
    chat["args"]["engine"] |= {"max_model_len": 512, "num_gpu_blocks_override": 7}
    chat["args"] |= {"replicas": 2}
    # Asked once, at the end: another one answers for it.
    args = servers.demo_args("smollm2-135m") | {"served_as": [], "fallback": [CHAT]}
    scaling = {"min_replicas": 0, "max_replicas": 1}
    cold = servers.application(COLD, **args, fallback_after_s=0, autoscaling=scaling)
    models = chat, servers.embed_application(), cold
    config = servers.document(processes.free_port(), *models, gateways=2)
    usage = folder / "usage"
    config["applications"][-1]["args"] |= {"keys": {"file": _keys(folder)}, "usage_dir": str(usage)}
    cluster = Cluster.start(config, folder, "haproxy")
    try:
        cluster.wait_until_ready()
        with cluster.ray():
            shutil.rmtree(usage)  # so no request can be written down
            assert [_chat(cluster, 0, key=LIMITED[0], stream=False) for _ in range(9)][-1] == 429
            _load(cluster)
            _lose_a_replica(cluster)
            cluster.wait_until_ready()
            _load(cluster)
            assert _chat(cluster, 0, stream=False, model=COLD) == 200
            time.sleep(15)  # workers report to the agent every 10 s
            return scrape()
    finally:
        cluster.interrupt()


def _keys(folder: Path) -> str:
    file = folder / "keys.yaml"
    entries = [
        {"name": "team", "hash": TEAM[1]},
        {"name": "limited", "hash": LIMITED[1], "requests_per_minute": 1},
    ]
    file.write_text(yaml.safe_dump(entries))
    return str(file)


def _load(cluster: Cluster) -> None:
    """Chats that fill the KV cache and share a prefix, half of them streamed; an embedding."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: _chat(cluster, n, stream=n % 2 == 0), range(8)))
    embedded = httpx.post(
        f"{cluster.base_url}/v1/embeddings",
        json={"model": EMBED, "input": "Paris"},
        headers={"x-api-key": TEAM[0]},
        timeout=60,
    )
    embedded.raise_for_status()


def _chat(
    cluster: Cluster, number: int, *, stream: bool, key: str = TEAM[0], model: str = CHAT
) -> int:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"{'A long story, please. ' * 30}{number}"}],
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": stream,
    }
    url = f"{cluster.base_url}/v1/chat/completions"
    return httpx.post(url, json=body, headers={"x-api-key": key}, timeout=300).status_code


def _lose_a_replica(cluster: Cluster) -> None:
    """Kill one while it has requests without a byte of their answers: the gateway retries."""
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(_chat, cluster, n, stream=False) for n in range(8)]
        time.sleep(2)
        os.kill(cluster.replicas(CHAT)[_busiest(cluster)], signal.SIGKILL)
        assert [a.result() for a in asked].count(200) >= 4
    assert processes.eventually(lambda: len(cluster.replicas(CHAT)) == 2, 300)


def _busiest(cluster: Cluster) -> str:
    """The replica that runs the most: prompts that begin alike are at one of them."""
    answer = httpx.get(f"{cluster.base_url}/fleet", headers={"x-api-key": TEAM[0]}, timeout=30)
    there = answer.json()["models"][CHAT]["replicas"]
    return str(max(there, key=lambda it: it["load"]["running"])["id"])


def report(page: str) -> str:
    """The recorded file's text for an agent's page."""
    families = list(text_string_to_metric_families(page))
    values: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            for label, value in sample.labels.items():
                values.setdefault(label, set()).add(value)
    constant = sorted(label for label, seen in values.items() if len(seen) == 1)
    header = (
        f"# What one node's agent exported in a real run on a CPU, {date.today()}: Ray "
        f"{version('ray')}, vLLM {version('vllm')},\n# this gateway. `make metrics` writes it "
        f"(tests/harness/exported_metrics.py). Name, type, labels.\n{_CONSTANT}"
    )
    lines = [
        " ".join([name, metric.kind, *sorted(metric.labels)])
        for name, metric in sorted(summary(families).items())
    ]
    return f"{header}{' '.join(constant)}\n" + "\n".join(lines) + "\n"


def main() -> None:
    before = recorded().keys()
    with tempfile.TemporaryDirectory() as folder:
        RECORDED.write_text(report(run(Path(folder))))
    gone = ", ".join(sorted(before - recorded().keys())) or "none"
    print(f"{len(recorded())} metrics in {RECORDED}; gone since the last time: {gone}")


if __name__ == "__main__":
    main()

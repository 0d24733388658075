"""A real Serve with a fleet that is played: its controller, its long poll, its HAProxy, gateways.

``python -m benchmarks.scale.serve`` deploys each size in turn and prints one line of JSON for it.
Needs no models and no GPU; see :mod:`benchmarks.scale.stand_in`.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import sys
import time
import urllib.request
from typing import Any

import psutil

from benchmarks import processes
from benchmarks.scale.fleet import Fleet, application
from benchmarks.scale.stand_in import FIRST_PORT_ENV
from serve_app.cluster import haproxy
from serve_app.config.document import GATEWAY_IMPORT_PATH
from serve_app.local.instance import Instance

SIZES = "100:10:1,400:50:1,1000:200:1,1000:200:2,1000:200:4"
"""Replicas, models, gateways."""

_SETTLE_S = 8.0
_IDLE_S = 10.0
_REPORTS = 15

_PARTS = {
    "ray::ServeController": "controller",
    "ray::ServeReplica:gateway": "gateways",
    "ray::HAProxyManager": "haproxy_manager",
    "haproxy": "haproxy",
    "gcs_server": "gcs",
    "raylet": "raylet",
    "ray::Players": "players",
}
"""Processes by how their command begins; the last stands for all replicas and is not counted."""


class Cluster:
    """Ray and Serve of this process, and what is asked of them."""

    def __init__(self, port: int, first_port: int) -> None:
        self._instance = Instance(port)
        os.environ.update(
            haproxy.environment()
            | self._instance.environment()
            | {
                "RAY_SERVE_ENABLE_HA_PROXY": "1",
                "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "benchmarks.scale.stand_in:install",
                FIRST_PORT_ENV: str(first_port),
            }
        )
        import ray
        from ray import serve
        from ray.serve.context import _get_global_client

        ray.init(num_cpus=8, include_dashboard=False, namespace="serve", log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        self.url = f"http://127.0.0.1:{port}"
        self._client: Any = _get_global_client()
        self._get = ray.get

    def close(self) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self._instance.close(keep=False)

    def deploy(self, fleet: Fleet, gateways: int) -> float:
        """Deploy it; the seconds until all of it runs."""
        from ray.serve.schema import ServeDeploySchema

        gateway = {
            "name": "gateway",
            "route_prefix": "/",
            "import_path": GATEWAY_IMPORT_PATH,
            "args": {"replicas": gateways, "num_cpus": 0},
        }
        models = [application(name, len(fleet.places(name))) for name in fleet.names]
        began = time.monotonic()
        self._client.deploy_apps(
            ServeDeploySchema.model_validate({"applications": [gateway, *models]})
        )
        while not self._runs(fleet, gateways):
            if time.monotonic() - began > 240:
                raise TimeoutError("the fleet does not start")
            time.sleep(0.5)
        return time.monotonic() - began

    def _runs(self, fleet: Fleet, gateways: int) -> bool:
        applications = self.report()["applications"]
        running = [
            sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])
            for it in applications.values()
            for deployment in it["deployments"].values()
        ]
        return (
            len(applications) == fleet.models + 1
            and sum(running) == fleet.replicas + gateways
            and all(str(it["status"].value) == "RUNNING" for it in applications.values())
        )

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = self._get(
            self._client._controller.get_serve_instance_details.remote()
        )
        return found

    def known(self) -> int:
        """Replicas of which the gateway that answers knows."""
        with urllib.request.urlopen(f"{self.url}/fleet", timeout=30) as said:
            return sum(len(it["replicas"]) for it in json.load(said)["models"].values())

    def parts(self) -> dict[str, list[psutil.Process]]:
        found: dict[str, list[psutil.Process]] = {name: [] for name in _PARTS.values()}
        for process in processes.tree(os.getpid())[1:]:
            command = (process.cmdline() or [""])[0]
            program = command if command.startswith("ray::") else os.path.basename(command)
            part = next((it for begin, it in _PARTS.items() if program.startswith(begin)), None)
            if part:
                found[part].append(process)
        return found


def measure(cluster: Cluster, fleet: Fleet, gateways: int) -> dict[str, Any]:
    """One size."""
    started_s = cluster.deploy(fleet, gateways)
    processes.until(lambda: cluster.known() >= fleet.replicas, 60)
    time.sleep(_SETTLE_S)
    parts = cluster.parts()
    before = {name: _cpu_s(of) for name, of in parts.items()}
    began = time.monotonic()
    time.sleep(_IDLE_S)
    seconds = time.monotonic() - began
    cores = {name: (_cpu_s(of) - before[name]) / seconds for name, of in parts.items()}
    health = cluster.report()["controller_health_metrics"]
    times, size = [], 0
    for _ in range(_REPORTS):
        asked = time.perf_counter()
        size = len(pickle.dumps(cluster.report()))
        times.append((time.perf_counter() - asked) * 1e3)
    memory = {name: round(_mib(of), 1) for name, of in parts.items()}
    proxies = {it.pid for it in parts["haproxy"]}
    more = Fleet(fleet.models, fleet.replicas + 1)
    began = time.monotonic()
    cluster.deploy(more, gateways)
    processes.until(lambda: cluster.known() > fleet.replicas, 60)
    known_s = time.monotonic() - began
    for_a_replica = {it.pid for it in cluster.parts()["haproxy"]} - proxies
    cluster.deploy(more, gateways + 1)
    time.sleep(3)
    for_a_gateway = {it.pid for it in cluster.parts()["haproxy"]} - proxies - for_a_replica
    return {
        "replicas": fleet.replicas,
        "models": fleet.models,
        "gateways": gateways,
        "started_s": round(started_s, 1),
        "idle_cores": {name: round(of, 4) for name, of in cores.items()},
        "memory_mib": memory,
        "loop_ms": {k: v * 1e3 for k, v in health["loop_duration_s"].items()},
        "report_bytes": size,
        "report_ms": [min(times), statistics.median(times), max(times)],
        "replica_known_s": round(known_s, 2),
        "proxies_started": [len(for_a_replica), len(for_a_gateway)],
    }


def _cpu_s(of: list[psutil.Process]) -> float:
    times = [it.cpu_times() for it in of]
    return float(sum(it.user + it.system for it in times))


def _mib(of: list[psutil.Process]) -> float:
    return float(sum(it.memory_full_info().pss for it in of)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--port", type=int, default=18900)
    parser.add_argument("--budget-s", type=float, default=3600.0, help="no size begins after it")
    options = parser.parse_args()
    first_port = 20000
    sizes = [tuple(map(int, size.split(":"))) for size in options.sizes.split(",")]
    most = max(replicas for replicas, _, _ in sizes) + 1
    command = [sys.executable, "-m", "benchmarks.gateway.upstream", first_port, 2 * most]
    began = time.monotonic()
    with processes.process(command, {}):
        cluster = Cluster(options.port, first_port)
        try:
            for replicas, models, gateways in sizes:
                if time.monotonic() - began > options.budget_s:
                    print(f"no time is left for {replicas}:{models}:{gateways}", file=sys.stderr)
                    break
                found = measure(cluster, Fleet(models, replicas), gateways)
                print(json.dumps(found), flush=True)
        finally:
            cluster.close()


if __name__ == "__main__":
    main()

"""What tests of deploying share: a fleet, changes to it, and what is in the cluster."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result
from controllers import adopt
from harness.manifests import ROOT
from kube_api import KubeAPI

NAME, SPACE = "llama70b", "serve-app"
CONFIG = ROOT / "configs/llama70b.yaml"

OPERATORS = ("kuberay-operator", "Update")
GROUPS = ("spec", "rayClusterConfig", "workerGroupSpecs")


def config(tmp_path: Path, *changes: tuple[str, str]) -> str:
    text = CONFIG.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / f"{NAME}.yaml"
    path.write_text(text)
    return str(path)


def service(api: KubeAPI) -> dict[str, Any]:
    found = api.get("rayservices", SPACE, NAME)
    assert found is not None
    return found


def set_status(
    api: KubeAPI,
    apps: dict[str, str],
    *,
    message: str = "",
    active: str = "llama70b-abcde",
    pending: dict[str, str] | None = None,
    conditions: dict[str, tuple[str, str]] | None = None,
) -> None:
    """Play the operator: statuses for the spec as it is now."""
    adopt(api, SPACE, NAME)

    def part(cluster: str, statuses: dict[str, str]) -> dict[str, Any]:
        entries = {n: {"status": s, "message": message} for n, s in statuses.items()}
        return {"rayClusterName": cluster, "applicationStatuses": entries}

    ready = all(s == "RUNNING" for s in apps.values()) and bool(apps)
    default = {"Ready": ("True" if ready else "False", "NonZeroServeEndpoints")}
    status = {
        "observedGeneration": service(api)["metadata"]["generation"],
        "activeServiceStatus": part(active, apps),
        "conditions": [
            {"type": kind, "status": value, "reason": reason, "message": message}
            for kind, (value, reason) in {**default, **(conditions or {})}.items()
        ],
    }
    if pending is not None:
        status["pendingServiceStatus"] = part("llama70b-fghij", pending)
    api.change("rayservices", SPACE, NAME, status=status)


RUNNING = {"llama-3.3-70b": "RUNNING", "gateway": "RUNNING"}


def later(api: KubeAPI, *steps: Callable[[], Any]) -> threading.Thread:
    """Do things one after the other while a command waits for its RayService."""

    def play() -> None:
        while not any("watch=true" in path for _, path in api.requests):
            time.sleep(0.05)
        for step in steps:
            step()
            time.sleep(0.3)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    return thread


def deployed(api: KubeAPI, run: Callable[..., Result]) -> None:
    run("deploy", str(CONFIG), "--no-wait")
    set_status(api, RUNNING)


def answers(api: KubeAPI) -> list[tuple[str, str, Any]]:
    """Let the Service answer, and record what it was asked."""
    asked: list[tuple[str, str, Any]] = []

    def proxy(method: str, name: str, path: str, body: Any) -> tuple[int, str]:
        asked.append((name, path, body))
        return 200, "{}"

    api.proxy = proxy
    return asked


def pod(name: str, role: str, **status: Any) -> dict[str, Any]:
    labels = {
        "app.kubernetes.io/part-of": "serve-app",
        "app.kubernetes.io/instance": NAME,
        "serve-app/role": role,
        "ray.io/group": role,
    }
    return {
        "metadata": {"name": name, "namespace": SPACE, "labels": labels},
        "spec": {"containers": []},
        "status": status,
    }


def node(
    gpus: int, name: str = "n1", *, kind: str = "p5.48xlarge", ready: str = "True", **spec: Any
) -> dict[str, Any]:
    """A machine as Kubernetes shows it; `kubectl cordon` and a lost kubelet leave taints, too."""
    taints = [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]
    if spec.get("unschedulable"):
        taints.append({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"})
    if ready != "True":
        taints.append({"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"})
    return {
        "metadata": {"name": name, "labels": {"node.kubernetes.io/instance-type": kind}},
        "spec": {"taints": taints, **spec},
        "status": {
            "allocatable": {"nvidia.com/gpu": str(gpus)},
            "conditions": [{"type": "Ready", "status": ready}],
        },
    }


def pool(limit: int, used: int, *types: str) -> dict[str, Any]:
    requirements = [
        {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": list(types)}
    ]
    return {
        "metadata": {"name": f"pool-{'-'.join(types) or 'any'}"},
        "spec": {
            "limits": {"nvidia.com/gpu": str(limit)},
            "template": {"spec": {"requirements": requirements if types else []}},
        },
        "status": {"resources": {"nvidia.com/gpu": str(used)}},
    }


SMALL = (
    "- name: small\n  route_prefix: null\n  import_path: serve_app.model:app\n"
    "  args: {model: org/small, resources: {accelerator_type: L4}}\n\n- name: gateway"
)
"""A model of another shape."""


NOPE = ("model: meta-llama/Llama-3.3-70B-Instruct", "model: /nope")
"""A change to a model that cannot be loaded."""

BIGGER = ("    replicas: 2\n", "    replicas: 2\n    num_cpus: 3\n")
"""A change that makes a new cluster."""


def owners(api: KubeAPI) -> dict[tuple[str, ...], set[tuple[str, str]]]:
    return api.owners["rayservices", SPACE, NAME]


def edited(api: KubeAPI, by: str, **fields: Any) -> None:
    """Somebody else changes fields of the RayService's spec."""
    document = copy.deepcopy(service(api))
    document["spec"] |= fields
    api.update("rayservices", document, by)


GATEWAY_API = {
    "gateway.networking.k8s.io/v1": {"gatewayclasses": ("GatewayClass", False)},
    "gateway.k8s.aws/v1": {
        "loadbalancerconfigurations": ("LoadBalancerConfiguration", True),
        "targetgroupconfigurations": ("TargetGroupConfiguration", True),
    },
}
"""What an incremental upgrade needs beyond the stand-in's kinds."""


def started(*arguments: str) -> subprocess.Popen[str]:
    """A command in a process of its own, which Ctrl-C reaches."""
    code = "from serve_app import cli; cli.main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # A test run in the background ignores Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

"""The pods of a RayService: containers, environment, volumes, scheduling."""

from __future__ import annotations

import math
from typing import Any

from serve_app.cluster import haproxy
from serve_app.config import caches
from serve_app.config.document import Fleet
from serve_app.config.yaml_files import note
from serve_app.kuberay.render import api_keys, otlp_headers, usage_db
from serve_app.kuberay.render.names import ROLE_LABEL, instance_name, labels
from serve_app.kuberay.render.profile import ClusterProfile
from serve_app.kuberay.render.workers import OBJECT_STORE_GIB, WorkerGroup
from serve_app.planner import hardware

CACHE_PATH = "/models"
SERVE_STOP_MARGIN_S = 15
"""Seconds that ``serve_app.model`` adds to a model's own drain before Serve kills the replica."""

PROXY_DRAIN_S = 30
"""Serve's RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S."""

HAPROXY = f"/opt/venv/bin/{haproxy.COMMAND}"
"""The path of HAProxy's stand-in, in the image."""

LOG_SHIPPER_IMAGE = "cr.fluentbit.io/fluent/fluent-bit:4.0.3"


def head_spec(fleet: Fleet, profile: ClusterProfile) -> dict[str, Any]:
    """The head's pod: control plane only, on an on-demand or reserved machine."""
    size = {"cpu": str(profile.head.cpu), "memory": f"{profile.head.memory_gib}Gi"}
    container = {
        "name": "ray-head",
        "image": profile.image,
        "ports": [
            {"containerPort": 6379, "name": "gcs-server"},
            {"containerPort": 8265, "name": "dashboard"},
            {"containerPort": 10001, "name": "client"},
            {"containerPort": 8080, "name": "metrics"},
            {"containerPort": 44217, "name": "as-metrics"},
            {"containerPort": 44227, "name": "dash-metrics"},
            note(
                {"containerPort": fleet.port, "name": "serve"},
                "KubeRay makes the Serve Service only when the head has a port of this name.",
            ),
        ],
        "env": _env(fleet, profile, None),
        "resources": {"requests": {**size}, "limits": {"memory": size["memory"]}},
        "securityContext": _read_only(),
        "volumeMounts": _mounts(profile, loads_models=False),
    }
    return _pod_spec(
        profile,
        [container, _log_shipper()],
        shm_gib=OBJECT_STORE_GIB + 1,
        loads_models=False,
        scheduling={
            "nodeSelector": {"kubernetes.io/arch": "amd64"},
            "affinity": {
                "nodeAffinity": _node_affinity(profile, capacity_types=["on-demand", "reserved"])
            },
        },
        grace_s=60,
        calls_kubernetes=True,
    )


def drain_s(fleet: Fleet, profile: ClusterProfile) -> int:
    """Seconds that a pod's drain may take: the replacement's start, then the longest answer."""
    longest = max(model.graceful_shutdown_timeout_s for model in fleet.models.values())
    if fleet.gateway is not None:
        longest = max(longest, fleet.gateway.graceful_shutdown_timeout_s)
    return profile.replacement_s + math.ceil(longest) + SERVE_STOP_MARGIN_S + PROXY_DRAIN_S


def worker_spec(
    group: WorkerGroup, fleet: Fleet, profile: ClusterProfile, incremental: bool
) -> dict[str, Any]:
    name = instance_name(fleet)
    drain = drain_s(fleet, profile)
    loads_models = group.role != "gateway"
    # A gateway's pod has one core more than the gateway needs, for HAProxy and Ray.
    cores = group.cpu + 1 if group.role == "gateway" else group.cpu
    requests: dict[str, Any] = {"cpu": str(cores), "memory": f"{group.memory_gib}Gi"}
    limits: dict[str, Any] = {
        "memory": note(
            f"{group.memory_gib}Gi",
            "Counts /dev/shm too. No CPU limit: throttling the engine's loop costs latency.",
        )
    }
    devices: dict[str, str] = {}
    if group.gpus:
        devices["nvidia.com/gpu"] = str(group.gpus)
    if group.efa:
        devices["vpc.amazonaws.com/efa"] = str(group.efa)
    container: dict[str, Any] = {
        "name": "ray-worker",
        "image": profile.image,
        "ports": [{"containerPort": 8080, "name": "metrics"}],
        "env": _env(fleet, profile, group.name if loads_models else None)
        + (_efa_env() if group.efa else []),
        "resources": {"requests": requests | devices, "limits": limits | devices},
        # With a GPU not tried: NVIDIA's runtime adds the driver's files to the container's root.
        "securityContext": container_security() if group.gpus else _read_only(),
        "volumeMounts": _mounts(profile, loads_models=loads_models),
        "lifecycle": {"preStop": {"exec": {"command": ["bash", "-c", _drain_script(drain)]}}},
    }
    if group.role == "gateway":
        for secret in (api_keys, usage_db, otlp_headers):
            container["env"] += secret.env(fleet, profile)
        container["volumeMounts"] += api_keys.mounts(fleet)
    if group.role == "gateway" or incremental:
        # KubeRay's default readiness probe asks Serve's proxy: right for pods that get traffic. An
        # incremental upgrade ignores serveService and sends traffic to every pod with a proxy.
        container["ports"].insert(0, {"containerPort": fleet.port, "name": "serve"})
    else:
        container["readinessProbe"] = note(
            {
                "httpGet": {"path": "/api/healthz", "port": 52365},
                "initialDelaySeconds": 10,
                "periodSeconds": 5,
                "timeoutSeconds": 5,
                "failureThreshold": 10,
            },
            "Only Ray's node. KubeRay's default also asks Serve's proxy, which a pod without a "
            "replica's front end has not: the peers of a multi-node replica would never be "
            "Ready (kuberay#4994).",
        )
    spec = _pod_spec(
        profile,
        [container, _log_shipper()],
        shm_gib=group.shm_gib,
        loads_models=loads_models,
        scheduling=_scheduling(group, name, profile),
        grace_s=note(
            drain + 60,
            "Longer than the preStop hook: a replacement's start "
            f"({profile.replacement_s} s), then the longest answer.",
        ),
    )
    if group.role == "gateway":
        spec["volumes"] += api_keys.volumes(fleet, profile)
    return spec


def _drain_script(drain_s: int) -> str:
    """A worker's ``preStop`` hook: move its replicas elsewhere, and wait until they are gone.

    ``ray drain-node`` makes Serve start replacements, and stop this pod's replicas once those run.
    Without it SIGTERM would end the raylet, and with it every stream.
    """
    return (
        "# Serve starts replacements elsewhere, then drains the replicas here.\n"
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION "
        f'--reason-message "pod is stopping" --deadline-remaining-seconds {drain_s} || exit 0\n'
        "# [S]: else the pattern would find this script's own command line, and grep's.\n"
        f"while grep -qsa '[S]erveReplica' /proc/[0-9]*/cmdline && (( SECONDS < {drain_s} )); do "
        "sleep 2; done\n"
        "# The load balancer forgets this target within its health check's time.\n"
        "sleep 15\n"
    )


def _env(fleet: Fleet, profile: ClusterProfile, group: str | None) -> list[Any]:
    """The environment of Ray's container. ``group`` names a worker group that loads models.

    Each model's own ``cache_dir`` and ``env`` override it.
    """
    env: list[Any] = [
        note(
            {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"},
            "Serve's HAProxy; its Python proxy carries half as many tokens.",
        ),
        note(
            {"name": "RAY_SERVE_HAPROXY_BINARY_PATH", "value": HAPROXY},
            "HAProxy without splicing, with which it does not notice clients that leave.",
        ),
        note(
            {"name": "SERVE_APP_GATEWAY_NODES", "value": f"{ROLE_LABEL}=gateway"},
            "Gateway replicas go to nodes with this label: those are the Service's endpoints.",
        ),
        {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        {"name": "VLLM_NO_USAGE_STATS", "value": "1"},
        {"name": "HOME", "value": "/tmp"},
    ]
    if fleet.on_ipv6:
        env.append(
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        )
    if group is None:
        return env
    if profile.cache.kind == "pvc":
        env += _pairs(caches.downloads(CACHE_PATH))
        first, *others = _pairs(caches.compiled(f"{CACHE_PATH}/{group}"))
        env.append(
            note(
                first,
                "What is compiled and measured at a first start, for the next pod of this kind; "
                "other GPUs must not find it.",
            )
        )
        env += others
    if profile.hf_token is not None:
        env.append({"name": "HF_TOKEN", **profile.hf_token.value()})
    return env


def _pairs(variables: dict[str, str]) -> list[Any]:
    return [{"name": name, "value": value} for name, value in variables.items()]


def _efa_env() -> list[Any]:
    return [
        {"name": "FI_PROVIDER", "value": "efa"},
        {"name": "FI_EFA_USE_DEVICE_RDMA", "value": "1"},
        note(
            {"name": "FI_EFA_USE_HUGE_PAGE", "value": "0"},
            "A pod that asks for huge pages gets no node: Karpenter does not know of them.",
        ),
    ]


def container_security() -> dict[str, Any]:
    """The security context of all our containers: without what none of them needs."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _read_only() -> dict[str, Any]:
    """The security context of a container that writes to its volumes only."""
    return container_security() | {"readOnlyRootFilesystem": True}


def _mounts(profile: ClusterProfile, *, loads_models: bool) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"name": "dshm", "mountPath": "/dev/shm"},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "ray-logs", "mountPath": "/tmp/ray"},
    ]
    if loads_models and profile.cache.kind == "pvc":
        mounts.append({"name": "model-cache", "mountPath": CACHE_PATH})
    return mounts


def _log_shipper() -> Any:
    return note(
        {
            "name": "logs",
            "image": LOG_SHIPPER_IMAGE,
            "args": [
                *("-i", "tail", "-p", "path_key=file", "-p", "read_from_head=true"),
                *("-p", "path=/tmp/ray/session_latest/logs/serve/*.log"),
                *("-o", "stdout", "-p", "format=json_lines"),
            ],
            "resources": {
                "requests": {"cpu": "100m", "memory": "128Mi"},
                "limits": {"memory": "256Mi"},
            },
            "securityContext": container_security(),
            "volumeMounts": [{"name": "ray-logs", "mountPath": "/tmp/ray", "readOnly": True}],
        },
        "Replicas log into files that die with the pod; this copies them to the pod's log, for "
        "`serve-app logs` and whatever ships logs on the cluster.",
    )


def _pod_spec(
    profile: ClusterProfile,
    containers: list[Any],
    *,
    shm_gib: int,
    loads_models: bool,
    scheduling: dict[str, Any],
    grace_s: Any,
    calls_kubernetes: bool = False,
) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {
            "name": "dshm",
            "emptyDir": note(
                {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"},
                "Ray's object store, and NCCL's and vLLM's queues by the number of GPUs. "
                "hostIPC is not needed for tensor parallelism.",
            ),
        },
        {"name": "ray-logs", "emptyDir": {"sizeLimit": "20Gi"}},
    ]
    if loads_models and profile.cache.kind == "pvc":
        volumes.append(
            {
                "name": "model-cache",
                "persistentVolumeClaim": {"claimName": profile.cache.claim},
            }
        )
    volumes.append(
        {
            "name": "tmp",
            "emptyDir": note({}, "Sockets of Python and HAProxy; home: the root may be read-only."),
        }
    )
    account: dict[str, Any] = {"serviceAccountName": profile.service_account}
    if not calls_kubernetes:
        account["automountServiceAccountToken"] = note(
            False,
            "The autoscaler in the head needs this account's token, by which pods and RayClusters "
            "can be changed; no model does. EKS mounts its own token for AWS all the same.",
        )
    return {
        **account,
        "terminationGracePeriodSeconds": grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "fsGroupChangePolicy": note(
                "OnRootMismatch", "Else every start walks through the whole model cache."
            ),
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **scheduling,
        "containers": containers,
        "volumes": volumes,
    }


def _scheduling(group: WorkerGroup, name: str, profile: ClusterProfile) -> dict[str, Any]:
    selector = {"matchLabels": labels(name, group.role) | {"ray.io/group": group.name}}
    # The pods of an upgrade's second cluster are scheduled independently.
    this_cluster = {"matchLabelKeys": ["ray.io/cluster"]}
    scheduling: dict[str, Any] = {"nodeSelector": {"kubernetes.io/arch": "amd64"}}
    affinity: dict[str, Any] = {}
    if group.shape is None:
        affinity["nodeAffinity"] = _node_affinity(profile, ["on-demand", "reserved"])
    else:
        affinity["nodeAffinity"] = _node_affinity(
            profile, list(profile.capacity_types), list(group.shape.instance_types)
        )
        gpu_name = _gpu_name(group)
        scheduling["nodeSelector"][f"{profile.instance_label_prefix}/instance-gpu-name"] = gpu_name
        scheduling["tolerations"] = note(
            [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "The GPU nodes' taint, which keeps everything else off them.",
        )
    if group.spans_machines:
        affinity["podAffinity"] = note(
            {
                "requiredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "topologyKey": "topology.kubernetes.io/zone",
                        "labelSelector": selector,
                        **this_cluster,
                    }
                ]
            },
            "All stages in one availability zone: EFA does not cross zones, and traffic costs.",
        )
    else:
        scheduling["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": "topology.kubernetes.io/zone",
                "whenUnsatisfiable": note(
                    "ScheduleAnyway", "GPUs are scarce: a full zone must not keep a model down."
                )
                if group.gpus
                else "ScheduleAnyway",
                "labelSelector": selector,
                **this_cluster,
            }
        ]
    return scheduling | {"affinity": affinity}


def _gpu_name(group: WorkerGroup) -> str:
    assert group.shape is not None
    return hardware.instances()[group.shape.instance_types[0]].gpu.ec2_name or ""


def _node_affinity(
    profile: ClusterProfile, capacity_types: list[Any], instance_types: list[str] | None = None
) -> dict[str, Any]:
    wanted: list[tuple[str, list[str]]] = [("karpenter.sh/capacity-type", capacity_types)]
    if instance_types:
        wanted.append(("node.kubernetes.io/instance-type", instance_types))
    if profile.zones:
        wanted.append(("topology.kubernetes.io/zone", profile.zones))
    terms = [{"key": key, "operator": "In", "values": values} for key, values in wanted]
    return {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": terms}]
        }
    }

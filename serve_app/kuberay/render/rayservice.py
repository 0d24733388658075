"""The RayService: the config, a head without a GPU, and one worker group for each pod shape."""

from __future__ import annotations

from typing import Any

from serve_app.config.document import Fleet
from serve_app.config.yaml_files import note
from serve_app.kuberay.render import pods
from serve_app.kuberay.render.names import ROLE_LABEL, instance_name, labels
from serve_app.kuberay.render.profile import RAY_VERSION, ClusterProfile
from serve_app.kuberay.render.workers import OBJECT_STORE_GIB, WorkerGroup


def rayservice(fleet: Fleet, profile: ClusterProfile, groups: list[WorkerGroup]) -> dict[str, Any]:
    """The RayService document, with comments."""
    name = instance_name(fleet)
    incremental = profile.upgrade.strategy == "NewClusterWithIncrementalUpgrade"
    spec: dict[str, Any] = {
        "upgradeStrategy": _upgrade(profile),
        "rayClusterDeletionDelaySeconds": note(
            min(3600, profile.ingress.request_timeout_s + 60),
            "The old cluster stays this long after the switch, so that answers under way end. "
            "KubeRay deletes it then, streams or not (default: 60).",
        ),
        "excludeHeadPodFromServeSvc": note(
            True, "Clients never go through the head: it can restart without cutting a stream."
        ),
    }
    if not incremental:
        spec["serveService"] = note(
            {
                "metadata": {"name": f"{name}-serve-svc", "labels": labels(name)},
                "spec": {
                    "ports": [
                        {
                            "name": "serve",
                            "port": fleet.port,
                            "targetPort": note(
                                "serve",
                                "By the port's name: only the gateway's pods have one of this "
                                "name. GPU pods then need no proxy to be Ready (kuberay#4994).",
                            ),
                        }
                    ]
                },
            },
            "KubeRay keeps the selector on the serving cluster; the rest is taken from here.",
        )
    spec["serveConfigV2"] = note(
        fleet.path.read_text(), f"{fleet.path.name}, as `serve run` takes it."
    )
    spec["rayClusterConfig"] = _cluster(fleet, profile, groups, incremental)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {
            "name": name,
            "namespace": profile.namespace,
            "labels": labels(name),
        },
        "spec": spec,
    }


def _upgrade(profile: ClusterProfile) -> Any:
    upgrade = profile.upgrade
    if upgrade.strategy == "NewCluster":
        return note(
            {"type": "NewCluster"},
            "A change of rayClusterConfig starts a second cluster beside this one and switches "
            "when all its models run: every GPU twice for that time. A change of serveConfigV2, "
            "of replica bounds or a worker group appended at the end does not.",
        )
    if upgrade.strategy == "None":
        return note(
            {"type": "None"},
            "A change of rayClusterConfig is ignored; delete and deploy again to apply it.",
        )
    return {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {
            "gatewayClassName": "serve-app-alb",
            "maxSurgePercent": note(
                upgrade.max_surge_percent,
                "Capacity beyond 100 %. A model with one replica still gets a whole second one "
                "at the first step: Serve rounds up.",
            ),
            "stepSizePercent": upgrade.step_percent,
            "intervalSeconds": upgrade.interval_s,
        },
    }


def _cluster(
    fleet: Fleet, profile: ClusterProfile, groups: list[WorkerGroup], incremental: bool
) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "rayVersion": note(RAY_VERSION, "The image's. KubeRay picks probes and features by it."),
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": note(
                "v2", "Written out: unset, Ray runs v2 but KubeRay treats the cluster as v1's."
            ),
            "idleTimeoutSeconds": note(
                300, "Seconds without a replica before a pod goes (default: 60)."
            ),
            "resources": {
                "requests": {"cpu": "500m", "memory": "1Gi"},
                "limits": {"cpu": "500m", "memory": "1Gi"},
            },
            "securityContext": pods.container_security(),
        },
    }
    if profile.redis is not None:
        redis: dict[str, Any] = {"redisAddress": profile.redis.address}
        if profile.redis.password is not None:
            redis["redisPassword"] = profile.redis.password.value()
        cluster["gcsFaultToleranceOptions"] = note(
            redis, "The head's state outlives the head: a new one takes over, the models go on."
        )
    cluster["authOptions"] = note(
        {"mode": "token"},
        "Ray's ports run any code for who may reach them. Ray 2.60 wants a token by default; only "
        "written out does KubeRay make one that all pods share.",
    )
    cluster["headGroupSpec"] = _head(fleet, profile)
    cluster["workerGroupSpecs"] = note(
        [_worker_group(group, fleet, profile, incremental) for group in groups],
        "Append new groups at the end: any other change of the list makes a new cluster.",
    )
    return cluster


def _head(fleet: Fleet, profile: ClusterProfile) -> dict[str, Any]:
    name = instance_name(fleet)
    return {
        "rayStartParams": {
            "num-cpus": note("0", "No replica is ever placed on the head."),
            "dashboard-host": "::" if fleet.on_ipv6 else "0.0.0.0",
            **_node_address(fleet),
            "object-store-memory": str(OBJECT_STORE_GIB * 2**30),
        },
        "template": {
            "metadata": {
                "labels": labels(name, "head"),
                "annotations": {
                    "karpenter.sh/do-not-disrupt": note(
                        "true", "Consolidation must not move the head; a node's expiry still does."
                    ),
                },
            },
            "spec": pods.head_spec(fleet, profile),
        },
    }


def _worker_group(
    group: WorkerGroup, fleet: Fleet, profile: ClusterProfile, incremental: bool
) -> dict[str, Any]:
    name = instance_name(fleet)
    resources = {"CPU": str(group.cpu), "memory": f"{group.memory_gib}Gi"}
    if group.shape is not None:
        resources["GPU"] = str(group.gpus)
        # Ray finds the GPU's type once the node is up; the autoscaler must know it earlier.
        resources[f"accelerator_type:{group.shape.accelerator}"] = "1"
    document: dict[str, Any] = {
        "groupName": group.name,
        "minReplicas": group.min_pods,
        "maxReplicas": note(
            group.max_pods,
            "One replica more than is ever asked for: when a machine is drained, its pod waits "
            "for the replacement to run.",
        ),
        "labels": note(
            {ROLE_LABEL: group.role},
            "Labels of the Ray node and of the pod. Gateways are placed by this one.",
        ),
        "resources": note(
            resources,
            "What Ray may place here. accelerator_type is for the autoscaler, which cannot guess "
            "it for a group that has no pod yet (kuberay#863).",
        )
        if group.shape
        else resources,
        "rayStartParams": {
            **_node_address(fleet),
            "object-store-memory": str(OBJECT_STORE_GIB * 2**30),
        },
        "scaleStrategy": note(
            {},
            "The operator would write it in, and then own this whole list: the next apply would "
            "be a conflict.",
        ),
        "template": {
            "metadata": {
                "labels": labels(name, group.role),
            },
            "spec": pods.worker_spec(group, fleet, profile, incremental),
        },
    }
    if group.role != "gateway":
        document["template"]["metadata"]["annotations"] = {
            "karpenter.sh/do-not-disrupt": note(
                "true", "Consolidation would cost minutes of model loading to save cents."
            )
        }
    if group.spans_machines:
        shape = group.shape
        assert shape is not None
        document["minReplicas"] = note(
            group.min_pods,
            f"{shape.pods_per_replica} pods make one replica, a stage or rank in each. Not "
            "numOfHosts: the autoscaler counts one node a replica (kuberay#4099).",
        )
    return document


def _node_address(fleet: Fleet) -> dict[str, Any]:
    if not fleet.on_ipv6:
        return {}
    return {
        "node-ip-address": note(
            "$POD_IP",
            "Left to itself Ray takes the IPv4 address that EKS gives IPv6 pods for leaving the "
            "cluster, where no other pod and no probe reaches it (kuberay#5215).",
        )
    }

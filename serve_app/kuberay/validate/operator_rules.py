"""The rules by which KubeRay refuses a RayService, so that they speak before `kubectl apply`.

The API server checks types; the operator checks the rest, and says so only in a condition of
the object. Source: ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7, whose order
these follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from serve_app.errors import did_you_mean

MAX_NAME = 47
"""Characters of a RayService's name: KubeRay appends to it to name clusters and pods."""

Finding = tuple[str, str]
"""A field's path and what is wrong with it."""

# The fields of CRD v1 in KubeRay 1.7, for a check of spelling without the CRD at hand.
_FIELDS = {
    "spec": (
        "deploymentUnhealthySecondThreshold excludeHeadPodFromServeSvc managedBy rayClusterConfig "
        "rayClusterDeletionDelaySeconds serveConfigV2 serveService serviceUnhealthySecondThreshold "
        "suspend upgradeStrategy"
    ),
    "cluster": (
        "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions "
        "headGroupSpec headServiceAnnotations historyServerOptions managedBy networkPolicy "
        "rayVersion suspend tlsOptions upgradeStrategy workerGroupSpecs"
    ),
    "head": (
        "enableIngress headService ingressOptions labels rayStartParams resources serviceType "
        "template"
    ),
    "worker": (
        "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority "
        "rayStartParams replicas resources scaleStrategy suspend template"
    ),
}


def findings(document: dict[str, Any]) -> Iterator[Finding]:
    """Everything that KubeRay 1.7 would refuse, or that its CRD has no field for."""
    spec = _dict(document.get("spec"))
    cluster = _dict(spec.get("rayClusterConfig"))
    head = _dict(cluster.get("headGroupSpec"))
    workers = [_dict(group) for group in cluster.get("workerGroupSpecs") or []]
    yield from _metadata(_dict(document.get("metadata")))
    yield from _unknown("spec", spec, "spec")
    yield from _unknown("spec.rayClusterConfig", cluster, "cluster")
    yield from _unknown("spec.rayClusterConfig.headGroupSpec", head, "head")
    if not cluster:
        yield "spec.rayClusterConfig", "is missing"
        return
    if not head:
        yield "spec.rayClusterConfig.headGroupSpec", "is missing"
        return
    v2 = _is_v2(cluster)
    yield from _group("spec.rayClusterConfig.headGroupSpec", head, v2)
    seen: set[str] = set()
    for index, group in enumerate(workers):
        where = f"spec.rayClusterConfig.workerGroupSpecs[{index}]"
        yield from _unknown(where, group, "worker")
        yield from _group(where, group, v2)
        yield from _worker(where, group, v2, bool(cluster.get("enableInTreeAutoscaling")))
        name = group.get("groupName")
        if name in seen:
            yield f"{where}.groupName", f"'{name}' is the name of another group too"
        seen.add(str(name))
    yield from _head_rules(spec, cluster, head)
    yield from _versions(cluster, workers)
    yield from _upgrade(spec, cluster)


def _metadata(metadata: dict[str, Any]) -> Iterator[Finding]:
    name = str(metadata.get("name") or "")
    if len(name) > MAX_NAME:
        yield "metadata.name", f"has {len(name)} characters; KubeRay takes {MAX_NAME} at most"
    elif not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield (
            "metadata.name",
            f"is '{name}'; it must be lower-case letters, digits and '-', and start with a letter",
        )


def _unknown(where: str, value: dict[str, Any], kind: str) -> Iterator[Finding]:
    known = _FIELDS[kind].split()
    for key in value:
        if key not in known:
            yield f"{where}.{key}", f"is not a field of ray.io/v1{did_you_mean(str(key), known)}"


def _group(where: str, group: dict[str, Any], v2: bool) -> Iterator[Finding]:
    pod = _dict(_dict(group.get("template")).get("spec"))
    params = _dict(group.get("rayStartParams"))
    if not pod.get("containers"):
        yield f"{where}.template.spec.containers", "is empty; the first container runs Ray"
    for key, value in params.items():
        if not isinstance(value, str):
            yield (
                f"{where}.rayStartParams.{key}",
                f"is {value!r}; the values must be strings: write {str(value).lower()!r} in quotes",
            )
    if "labels" in params:
        yield f"{where}.rayStartParams.labels", "is refused; use the group's labels field"
    if group.get("resources"):
        for key in ("num-cpus", "num-gpus", "memory", "resources"):
            if params.get(key):
                yield (
                    f"{where}.rayStartParams.{key}",
                    "is refused beside the group's resources field; keep one",
                )
    restart = pod.get("restartPolicy")
    if v2 and restart not in (None, "", "Never"):
        yield (
            f"{where}.template.spec.restartPolicy",
            f"is {restart}; autoscaler v2 needs Never, or no restartPolicy",
        )


def _worker(where: str, group: dict[str, Any], v2: bool, autoscaling: bool) -> Iterator[Finding]:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not autoscaling and (least is None or most is None):
        yield f"{where}", "needs minReplicas and maxReplicas, as autoscaling is off"
    if isinstance(least, int) and least < 0:
        yield f"{where}.minReplicas", f"is {least}"
    if isinstance(least, int) and isinstance(most, int) and least > most:
        yield f"{where}.minReplicas", f"is {least}, above maxReplicas ({most})"
    if group.get("suspend"):
        yield f"{where}.suspend", "is not for users of a RayService"
    for field in ("idleTimeoutSeconds", "priority"):
        if group.get(field) and not v2:
            yield (
                f"{where}.{field}",
                "needs autoscalerOptions.version v2, written out",
            )


def _head_rules(
    spec: dict[str, Any], cluster: dict[str, Any], head: dict[str, Any]
) -> Iterator[Finding]:
    where = "spec.rayClusterConfig.headGroupSpec"
    container = _first_container(head)
    env = {item.get("name") for item in container.get("env") or [] if isinstance(item, dict)}
    params = _dict(head.get("rayStartParams"))
    if _dict(_dict(head.get("headService")).get("metadata")).get("name"):
        yield f"{where}.headService.metadata.name", "must not be set under a RayService"
    storage = cluster.get("gcsFaultToleranceOptions")
    redis_env = env & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}
    for name in sorted(str(name) for name in redis_env):
        yield (
            f"{where}.template.spec.containers[0].env",
            f"sets {name}; use spec.rayClusterConfig.gcsFaultToleranceOptions",
        )
    for key in ("redis-password", "redis-username"):
        if params.get(key):
            yield (
                f"{where}.rayStartParams.{key}",
                "is refused; use spec.rayClusterConfig.gcsFaultToleranceOptions",
            )
    if isinstance(storage, dict):
        yield from _storage("spec.rayClusterConfig.gcsFaultToleranceOptions", storage)
    if "RAY_enable_autoscaler_v2" in env:
        yield (
            f"{where}.template.spec.containers[0].env",
            "sets RAY_enable_autoscaler_v2; use autoscalerOptions.version",
        )
    if _dict(cluster.get("upgradeStrategy")).get("type"):
        yield (
            "spec.rayClusterConfig.upgradeStrategy",
            "is refused under a RayService; use spec.upgradeStrategy",
        )
    if _dict(cluster.get("authOptions")).get("enableK8sTokenAuth"):
        yield (
            "spec.rayClusterConfig.authOptions.enableK8sTokenAuth",
            "is not supported for a RayService",
        )
    for gate, field in (
        ("RayClusterNetworkPolicy", "networkPolicy"),
        ("RayClusterMTLS", "tlsOptions"),
        ("RayClusterHistoryServer", "historyServerOptions"),
    ):
        if cluster.get(field):
            yield (
                f"spec.rayClusterConfig.{field}",
                f"needs the operator's feature gate {gate}, which is off by default",
            )
    delay = spec.get("rayClusterDeletionDelaySeconds")
    if isinstance(delay, int) and delay < 0:
        yield "spec.rayClusterDeletionDelaySeconds", f"is {delay}; it cannot be negative"


def _storage(where: str, storage: dict[str, Any]) -> Iterator[Finding]:
    backend = storage.get("backend") or "redis"
    if backend == "redis":
        if storage.get("storage"):
            yield f"{where}.storage", "belongs to the rocksdb backend"
        if not storage.get("redisAddress"):
            yield f"{where}.redisAddress", "is missing"
        return
    yield (
        f"{where}.backend",
        "rocksdb needs the operator's feature gate GCSFaultToleranceEmbeddedStorage, which is "
        "off by default",
    )
    for field in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
        if storage.get(field):
            yield f"{where}.{field}", "is refused with backend rocksdb"


def _versions(cluster: dict[str, Any], workers: list[dict[str, Any]]) -> Iterator[Finding]:
    text = str(cluster.get("rayVersion") or "")
    found = re.match(r"(\d+)\.(\d+)", text)
    if not found:
        yield (
            "spec.rayClusterConfig.rayVersion",
            f"is {text!r}; write the image's Ray version, as 2.60.0",
        )
        return
    version = (int(found[1]), int(found[2]))
    needs: list[tuple[bool, tuple[int, int], str]] = [
        (_dict(cluster.get("authOptions")).get("mode") == "token", (2, 52), "authOptions.mode"),
        (any(group.get("priority") for group in workers), (2, 56), "workerGroupSpecs.priority"),
    ]
    for used, floor, what in needs:
        if used and version < floor:
            yield (
                "spec.rayClusterConfig.rayVersion",
                f"is {text}, but {what} needs Ray {floor[0]}.{floor[1]} or later",
            )


def _upgrade(spec: dict[str, Any], cluster: dict[str, Any]) -> Iterator[Finding]:
    where = "spec.upgradeStrategy"
    strategy = _dict(spec.get("upgradeStrategy"))
    kind = strategy.get("type")
    known = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
    if kind is not None and kind not in known:
        hint = did_you_mean(str(kind), known) or f" (known: {', '.join(known)})"
        yield f"{where}.type", f"is '{kind}'{hint}"
    if kind != "NewClusterWithIncrementalUpgrade":
        return
    options = _dict(strategy.get("clusterUpgradeOptions"))
    if not cluster.get("enableInTreeAutoscaling"):
        yield (
            "spec.rayClusterConfig.enableInTreeAutoscaling",
            "must be true for an incremental upgrade",
        )
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent")
    if not isinstance(surge, int) or not 0 <= surge <= 100:
        yield f"{where}.clusterUpgradeOptions.maxSurgePercent", f"is {surge}; 0 to 100 is allowed"
    elif not isinstance(step, int) or not 0 <= step <= surge:
        yield (
            f"{where}.clusterUpgradeOptions.stepSizePercent",
            f"is {step}; it must lie between 0 and maxSurgePercent ({surge})",
        )
    interval = options.get("intervalSeconds")
    if not isinstance(interval, int) or interval <= 0:
        yield (
            f"{where}.clusterUpgradeOptions.intervalSeconds",
            f"is {interval}; it must be above 0",
        )
    if not options.get("gatewayClassName"):
        yield f"{where}.clusterUpgradeOptions.gatewayClassName", "is missing"


def _is_v2(cluster: dict[str, Any]) -> bool:
    """As the operator sees it: only when written out."""
    return _dict(cluster.get("autoscalerOptions")).get("version") == "v2"


def _first_container(group: dict[str, Any]) -> dict[str, Any]:
    containers = _dict(_dict(group.get("template")).get("spec")).get("containers") or [{}]
    return _dict(containers[0])


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

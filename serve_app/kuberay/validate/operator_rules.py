"""The rules by which KubeRay refuses a RayService, checked before `kubectl apply`.

The API server checks types. The operator checks the rest, and reports it only in a condition of
the object. Source: ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7. This module has
the rules that an edit of a rendering can break. Fields that no rendering has are left to KubeRay.
"""

from __future__ import annotations

import re

from serve_app.errors import did_you_mean
from serve_app.kuberay.render.names import MAX_NAME
from serve_app.kuberay.validate.manifests import Document, Pods, get, mapping, pods_of
from serve_app.kuberay.validate.rule import Found, check, fail

_CLUSTER = "spec.rayClusterConfig"
_STORAGE = f"{_CLUSTER}.gcsFaultToleranceOptions"
_INCREMENTAL = "NewClusterWithIncrementalUpgrade"
_STRATEGIES = ("NewCluster", _INCREMENTAL, "None")


@check("manifests")
def rules(service: Document) -> Found:
    """What KubeRay 1.7 would refuse in a RayService that the API server accepts."""
    name = str(get(service, "metadata.name"))
    if len(name) > MAX_NAME:
        yield fail("metadata.name", f"has {len(name)} characters; KubeRay takes {MAX_NAME} at most")
    elif not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield fail(
            "metadata.name",
            f"is '{name}'; it must be lower-case letters, digits and '-', and start with a letter",
        )
    cluster = mapping(service, _CLUSTER)
    # As for the operator: only if written out.
    v2 = get(cluster, "autoscalerOptions.version") == "v2"
    seen: set[str] = set()
    for pods in pods_of(service):
        yield from _group(pods, v2)
        if pods.name in seen:
            said = f"'{pods.name}' is the name of another group too"
            yield fail(f"{pods.where}.groupName", said)
        seen.add(pods.name)
        if pods.is_head and "RAY_REDIS_ADDRESS" in {entry.get("name") for _, entry in pods.env}:
            yield fail(f"{pods.container_at}.env", "sets RAY_REDIS_ADDRESS", f"use {_STORAGE}")
    if mapping(cluster, "upgradeStrategy").get("type"):
        at = f"{_CLUSTER}.upgradeStrategy"
        yield fail(at, "is refused under a RayService", "use spec.upgradeStrategy")
    storage = cluster.get("gcsFaultToleranceOptions")
    if get(storage, "backend") == "rocksdb":
        yield fail(
            f"{_STORAGE}.backend",
            "rocksdb needs the operator's feature gate GCSFaultToleranceEmbeddedStorage, which is "
            "off by default",
        )
    elif storage is not None and not get(storage, "redisAddress"):
        yield fail(f"{_STORAGE}.redisAddress", "is missing")
    yield from _version(cluster)
    yield from _upgrade(service, cluster)


def _group(pods: Pods, v2: bool) -> Found:
    params = mapping(pods.group, "rayStartParams")
    at = f"{pods.where}.rayStartParams"
    if "labels" in params:
        yield fail(f"{at}.labels", "is refused", "use the group's labels field")
    for key in ("num-cpus", "num-gpus", "memory", "resources"):
        if pods.told and params.get(key):
            yield fail(f"{at}.{key}", "is refused beside the group's resources field", "keep one")
    restart = pods.spec.get("restartPolicy")
    if v2 and restart not in (None, "", "Never"):
        yield fail(
            f"{pods.spec_at}.restartPolicy",
            f"is {restart}; autoscaler v2 needs Never, or no restartPolicy",
        )
    least, most = pods.group.get("minReplicas"), pods.group.get("maxReplicas")
    if isinstance(least, int) and least < 0:
        yield fail(f"{pods.where}.minReplicas", f"is {least}, below 0")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        yield fail(f"{pods.where}.minReplicas", f"is {least}, above maxReplicas ({most})")
    for field in ("idleTimeoutSeconds", "priority"):
        if pods.group.get(field) and not v2:
            said = "needs autoscalerOptions.version v2, written out"
            yield fail(f"{pods.where}.{field}", said)


def _version(cluster: Document) -> Found:
    at, text = f"{_CLUSTER}.rayVersion", str(cluster.get("rayVersion") or "")
    found = re.match(r"(\d+)\.(\d+)", text)
    if not found:
        yield fail(at, f"is {text!r}", "write the image's Ray version, as 2.60.0")
    elif get(cluster, "authOptions.mode") == "token" and (int(found[1]), int(found[2])) < (2, 52):
        yield fail(at, f"is {text}, but authOptions.mode needs Ray 2.52 or later")


def _upgrade(service: Document, cluster: Document) -> Found:
    at = "spec.upgradeStrategy"
    kind = get(service, f"{at}.type")
    if kind is not None and kind not in _STRATEGIES:
        hint = did_you_mean(str(kind), _STRATEGIES) or f" (known: {', '.join(_STRATEGIES)})"
        yield fail(f"{at}.type", f"is '{kind}'{hint}")
    if kind != _INCREMENTAL:
        return
    if not cluster.get("enableInTreeAutoscaling"):
        yield fail(f"{_CLUSTER}.enableInTreeAutoscaling", "must be true for an incremental upgrade")
    at = f"{at}.clusterUpgradeOptions"
    options = mapping(service, at)
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent")
    if not isinstance(surge, int) or not 0 <= surge <= 100:
        yield fail(f"{at}.maxSurgePercent", f"is {surge}; 0 to 100 is allowed")
    elif not isinstance(step, int) or not 0 <= step <= surge:
        yield fail(
            f"{at}.stepSizePercent",
            f"is {step}; it must lie between 0 and maxSurgePercent ({surge})",
        )
    for field in ("intervalSeconds", "gatewayClassName"):
        if not options.get(field):
            yield fail(f"{at}.{field}", "is missing")

"""Rules for the documents around the RayService: do pods, names and times agree with it?"""

from __future__ import annotations

from serve_app.errors import UserError
from serve_app.kuberay.render.names import ROLE_LABEL
from serve_app.kuberay.validate.manifests import (
    GPU,
    INSTANCE_TYPE,
    Document,
    Manifests,
    amount,
    get,
    items,
    mapping,
    texts,
    whole,
    workers_of,
)
from serve_app.kuberay.validate.pods import KARPENTER_LABELS
from serve_app.kuberay.validate.rule import Found, check, fail
from serve_app.kuberay.validate.serving import fleet_of
from serve_app.planner import hardware

READINESS_GATE = "elbv2.k8s.aws/pod-readiness-gate-inject"
"""Label of a namespace: a pod behind a load balancer then is Ready only once that is healthy."""

_IMAGE_DISK = 60 * hardware.GIB
"""Bytes of disk that the image needs while it unpacks, the system's own included."""

_ALB = "alb.ingress.kubernetes.io"
_ALB_LONGEST_S = 4000


@check("network")
def namespace(document: Document, manifests: Manifests) -> Found:
    if mapping(document, "metadata.labels").get(READINESS_GATE) != "enabled":
        return
    # KubeRay's Service selects every worker, and the controller gates every pod that a Service
    # selects. But only a pod with the port becomes a target, which can get healthy.
    waiting = [p for s in manifests.services for p in workers_of(s) if "serve" not in p.ports]
    for pods in waiting[:1]:
        yield fail(
            f"metadata.labels.{READINESS_GATE}",
            f"makes pods of '{pods.name}' wait for ever to be healthy targets: they have no port "
            "'serve'",
            "remove the label",
        )


@check("network")
def ingress(document: Document, manifests: Manifests) -> Found:
    serving = {
        f"{get(s, 'metadata.name')}-serve-svc": s
        for s in manifests.services
        if get(s, "spec.upgradeStrategy.type") != "NewClusterWithIncrementalUpgrade"
    }
    for i, rule in enumerate(items(document, "spec.rules")):
        for j, entry in enumerate(items(rule, "http.paths")):
            name = str(get(entry, "backend.service.name"))
            port = mapping(entry, "backend.service.port")
            at = f"spec.rules[{i}].http.paths[{j}].backend.service"
            if name.endswith("-head-svc") or 8265 in port.values() or "dashboard" in port.values():
                yield fail(
                    at, "opens Ray's dashboard: whoever reaches it can run code on the cluster"
                )
            elif manifests.services and name not in serving:
                known = ", ".join(serving) or "none: incremental upgrades go through a Gateway"
                yield fail(f"{at}.name", f"is '{name}'; KubeRay's Service is {known}")
    annotations = mapping(document, "metadata.annotations")
    at = f"metadata.annotations.{_ALB}"
    health = annotations.get(f"{_ALB}/healthcheck-path")
    if health != "/-/healthz":
        yield fail(
            f"{at}/healthcheck-path",
            f"is {health or 'the default /'}; Serve's proxy tells its health at /-/healthz",
        )
    if annotations.get(f"{_ALB}/target-type") != "ip":
        yield fail(f"{at}/target-type", "must be ip: the Service has no NodePort")
    attributes = str(annotations.get(f"{_ALB}/load-balancer-attributes") or "")
    pairs = dict(pair.split("=", 1) for pair in attributes.split(",") if "=" in pair)
    given = pairs.get("idle_timeout.timeout_seconds", "60")
    yield from _idle_timeout(f"{at}/load-balancer-attributes", given, list(serving.values()))


def _idle_timeout(at: str, given: str, services: list[Document]) -> Found:
    idle, option = whole(given), "idle_timeout.timeout_seconds"
    if not idle:
        yield fail(at, f"{option} is '{given}', which is no number of seconds")
        return
    for service in services:
        try:
            gateway = fleet_of(service).gateway
        except UserError:
            continue  # a rule of the RayService reports it
        silent = gateway.request_timeout_s if gateway else None
        if silent is not None and silent > idle:
            yield fail(
                at,
                f"closes a silent connection after {idle} s, but the gateway waits {silent:.0f} s "
                "for a replica",
                f"raise {option}",
            )
    if idle > _ALB_LONGEST_S:
        yield fail(at, f"{option} is {idle}; AWS takes {_ALB_LONGEST_S} at most")
    elif idle <= 60:
        yield fail(
            at,
            "leaves the idle timeout at 60 s, which cuts every answer that is silent for a minute",
            f"set {option}",
        )


@check("draining")
def budget(document: Document, manifests: Manifests) -> Found:
    if "ray.io/cluster" in mapping(document, "spec.selector.matchLabels"):
        yield fail(
            "spec.selector.matchLabels.ray.io/cluster",
            "changes with every upgrade",
            "select by app.kubernetes.io/instance",
        )
        return
    wrong = [
        (field, value)
        for field, value in mapping(document, "spec").items()
        if field == "maxUnavailable" or (field == "minAvailable" and not isinstance(value, int))
    ]
    if wrong and (manifests.services or _of_ray(document)):
        field, value = wrong[0]
        yield fail(
            f"spec.{field}",
            f"is '{value}', which allows no disruption at all, so every drain waits for ever: "
            "Kubernetes cannot count a RayCluster's pods",
            "write minAvailable as a number of pods",
        )
        return
    yield from selector(document, manifests)


def _of_ray(document: Document) -> bool:
    """Whether a selector is for Ray's pods, also where no RayService is at hand to compare."""
    wanted = mapping(document, "spec.selector.matchLabels")
    return any(key.startswith("ray.io/") or key == ROLE_LABEL for key in map(str, wanted))


@check("selectors")
def selector(document: Document, manifests: Manifests) -> Found:
    """Does the selector match a pod of these manifests?"""
    if not manifests.services:
        return
    field = "spec.podSelector" if document.get("kind") == "NetworkPolicy" else "spec.selector"
    wanted = mapping(document, f"{field}.matchLabels")
    if not any(wanted.items() <= labels.items() for labels in manifests.pod_labels):
        shown = ", ".join(f"{k}={v}" for k, v in wanted.items())
        yield fail(f"{field}.matchLabels", f"matches no pod of the RayService ({shown})")


@check("machines")
def node_class(document: Document) -> Found:
    disks = {"spec.ephemeralStorage.size": get(document, "spec.ephemeralStorage.size")}
    for i, disk in enumerate(items(document, "spec.blockDeviceMappings")):
        disks[f"spec.blockDeviceMappings[{i}].ebs.volumeSize"] = get(disk, "ebs.volumeSize")
    for at, size in disks.items():
        given = amount(size)
        if given is not None and given < _IMAGE_DISK:
            yield fail(at, f"is {size}, but the image alone needs 60Gi while it unpacks")


@check("machines")
def node_pool(document: Document) -> Found:
    for index, requirement in enumerate(items(document, "spec.template.spec.requirements")):
        at = f"spec.template.spec.requirements[{index}]"
        prefix, _, name = str(requirement.get("key")).partition("/")
        if prefix == "karpenter.sh" and name not in KARPENTER_LABELS:
            yield fail(f"{at}.key", f"is karpenter.sh/{name}, which is no label of Karpenter's")
        if requirement.get("key") == INSTANCE_TYPE:
            for value in texts(requirement, "values"):
                # GPU families start with these letters; the table has no others.
                if value[:1] in "gp" and value not in hardware.instances():
                    said = f"names '{value}', which is no EC2 type with a GPU"
                    yield fail(f"{at}.values", said)
    if get(document, "spec.template.spec.taints") and GPU not in mapping(document, "spec.limits"):
        yield fail(f"spec.limits.{GPU}", "is missing: nothing bounds the bill")

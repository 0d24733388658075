"""The documents around the RayService: do they mean the same pods, names and times?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from serve_app.config.document import parse_document
from serve_app.errors import UserError
from serve_app.kuberay.validate.reading import (
    GPU,
    INSTANCE_TYPE,
    KARPENTER_LABELS,
    Bundle,
    Document,
    Found,
    byte_count,
    container_of,
    get,
    groups_of,
    items,
    mapping,
    texts,
    whole,
)
from serve_app.planner import hardware

PLACEHOLDER = "REPLACE_ME"
"""What is to be filled in: in secrets.template.yaml, and in the profiles of kuberay/."""


def refuse_placeholders(documents: list[Document]) -> None:
    """Refuse to deploy what nobody has filled in.

    Raises:
        UserError: the first value that is still a placeholder.
    """
    for document in documents:
        for path, value in _leaves(document, ""):
            if PLACEHOLDER in str(value):
                kind, name = document.get("kind"), get(document, "metadata.name")
                raise UserError(
                    f"{kind}/{name}: {path} is '{value}'; put your own value into the profile"
                )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def secret(document: Document) -> Found:
    for field in ("data", "stringData"):
        for key, value in mapping(document, field).items():
            if value not in ("", None, PLACEHOLDER):
                yield f"{field}.{key}", "puts a secret into a manifest; create it outside of git"


READINESS_GATE = "elbv2.k8s.aws/pod-readiness-gate-inject"
"""Label of a namespace: a pod behind a load balancer is Ready only when that one says so."""

_IMAGE_DISK = 60 * 2**30
"""Bytes of disk that the image takes while it unpacks, with the system's own."""


def namespace(document: Document, bundle: Bundle) -> Found:
    if mapping(document, "metadata.labels").get(READINESS_GATE) != "enabled":
        return
    for service in bundle.services:
        # KubeRay's Service selects every worker, and the controller gates whatever it selects;
        # but only a pod with the port becomes a target that can get healthy.
        for _, group in groups_of(service):
            ports = {p.get("name") for p in items(container_of(group), "ports")}
            if "groupName" in group and "serve" not in ports:
                yield (
                    f"metadata.labels.{READINESS_GATE}",
                    f"makes pods of '{group['groupName']}' wait for ever to be healthy targets: "
                    "they have no port 'serve'; remove the label",
                )
                return


def node_class(document: Document) -> Found:
    disks = [("spec.ephemeralStorage.size", get(document, "spec.ephemeralStorage.size"))]
    disks += [
        (f"spec.blockDeviceMappings[{i}].ebs.volumeSize", get(disk, "ebs.volumeSize"))
        for i, disk in enumerate(items(document, "spec.blockDeviceMappings"))
    ]
    for where, size in disks:
        given = byte_count(size)
        if given is not None and given < _IMAGE_DISK:
            yield where, f"is {size}, but the image alone needs 60Gi while it unpacks"


def ingress(document: Document, bundle: Bundle) -> Found:
    annotations = mapping(document, "metadata.annotations")
    prefix = "alb.ingress.kubernetes.io"
    serving = {
        f"{get(s, 'metadata.name')}-serve-svc": s
        for s in bundle.services
        if get(s, "spec.upgradeStrategy.type") != "NewClusterWithIncrementalUpgrade"
    }
    for i, rule in enumerate(items(document, "spec.rules")):
        for j, entry in enumerate(items(rule, "http.paths")):
            name = str(get(entry, "backend.service.name"))
            port = mapping(entry, "backend.service.port")
            where = f"spec.rules[{i}].http.paths[{j}].backend.service"
            if name.endswith("-head-svc") or 8265 in port.values() or "dashboard" in port.values():
                yield where, "opens Ray's dashboard: whoever reaches it can run code on the cluster"
            elif bundle.services and name not in serving:
                known = ", ".join(serving) or "none: incremental upgrades go through a Gateway"
                yield f"{where}.name", f"is '{name}'; KubeRay's Service is {known}"
    health = annotations.get(f"{prefix}/healthcheck-path")
    if health != "/-/healthz":
        yield (
            f"metadata.annotations.{prefix}/healthcheck-path",
            f"is {health or 'the default /'}; Serve's proxy tells its health at /-/healthz",
        )
    attributes = dict(
        item.split("=", 1)
        for item in str(annotations.get(f"{prefix}/load-balancer-attributes") or "").split(",")
        if "=" in item
    )
    where = f"metadata.annotations.{prefix}/load-balancer-attributes"
    given = attributes.get("idle_timeout.timeout_seconds", "60")
    idle = whole(given)
    if not idle:
        yield where, f"idle_timeout.timeout_seconds is '{given}', which is no number of seconds"
        return
    for service in serving.values():
        text = get(service, "spec.serveConfigV2")
        try:
            fleet = parse_document(yaml.safe_load(text or ""), Path("serveConfigV2"))
        except (UserError, yaml.YAMLError):
            continue
        silent = fleet.gateway.request_timeout_s if fleet.gateway else None
        if silent is not None and silent > idle:
            yield (
                where,
                f"closes a silent connection after {idle} s, but the gateway waits {silent:.0f} s "
                "for a replica; raise idle_timeout.timeout_seconds",
            )
    if idle > 4000:
        yield where, f"idle_timeout.timeout_seconds is {idle}; AWS takes 4000 at most"
    elif idle <= 60:
        yield (
            where,
            "leaves the idle timeout at 60 s, which cuts every answer that is silent for a "
            "minute; set idle_timeout.timeout_seconds",
        )
    if annotations.get(f"{prefix}/target-type") != "ip":
        yield (
            f"metadata.annotations.{prefix}/target-type",
            "must be ip: the Service has no NodePort",
        )


def budget(document: Document, bundle: Bundle) -> Found:
    if "ray.io/cluster" in mapping(document, "spec.selector.matchLabels"):
        yield (
            "spec.selector.matchLabels.ray.io/cluster",
            "changes with every upgrade; select by app.kubernetes.io/instance",
        )
        return
    yield from selector(document, bundle)


def selector(document: Document, bundle: Bundle) -> Found:
    """Does the selector match any pod of the bundle?"""
    if not bundle.services:
        return
    field = "spec.podSelector" if document.get("kind") == "NetworkPolicy" else "spec.selector"
    wanted = mapping(document, f"{field}.matchLabels")
    if not any(wanted.items() <= labels.items() for labels in bundle.pod_labels):
        shown = ", ".join(f"{k}={v}" for k, v in wanted.items())
        yield f"{field}.matchLabels", f"matches no pod of the RayService ({shown})"


def node_pool(document: Document) -> Found:
    for index, requirement in enumerate(items(document, "spec.template.spec.requirements")):
        where = f"spec.template.spec.requirements[{index}]"
        prefix, _, name = str(requirement.get("key")).partition("/")
        if prefix == "karpenter.sh" and name not in KARPENTER_LABELS:
            yield f"{where}.key", f"is karpenter.sh/{name}, which is no label of Karpenter's"
        if requirement.get("key") == INSTANCE_TYPE:
            for value in texts(requirement, "values"):
                # Families of GPU machines start so; the table does not have the others.
                if value[:1] in "gp" and value not in hardware.instances():
                    yield f"{where}.values", f"names '{value}', which is no EC2 type with a GPU"
    limits = mapping(document, "spec.limits")
    if get(document, "spec.template.spec.taints") and GPU not in limits:
        yield f"spec.limits.{GPU}", "is missing: nothing bounds the bill"

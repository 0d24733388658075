"""Checks manifests without a cluster. Each mistake is one line with the document and the field.

A manifest can fail in three places, in this order: the API server refuses it (:mod:`schema`);
KubeRay refuses it (:mod:`operator_rules`); or it is accepted and does not work (the other rules:
machines that do not fit, labels that no node has, timeouts that cut each other).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from serve_app.errors import ConfigError, UserError
from serve_app.kuberay.validate import around, operator_rules, pods, schema, secrets, serving
from serve_app.kuberay.validate.manifests import Document, Manifests, get, pods_of
from serve_app.kuberay.validate.rule import Found, check, fail
from serve_app.planner.finding import Finding


def judge(documents: list[Document], crd: dict[str, Any] | None = None) -> list[Finding]:
    """All findings about these documents, taken together.

    ``crd`` comes from :func:`schema.load_crd`. Without it only the names of the RayService's own
    fields and its pod templates are checked, not every type.
    """
    refused = [list(_refused(document, crd)) for document in documents]
    # A refused document says nothing about others: its names and pods will change.
    sound = Manifests(d for d, wrong in zip(documents, refused, strict=True) if not wrong)
    found: dict[Finding, None] = {}  # in order, each once
    for document, wrong in zip(documents, refused, strict=True):
        name = str(get(document, "metadata.name") or "?")
        for finding in wrong or _misread(document, sound):
            about = f"{document.get('kind')}/{name}: {finding.about}"
            message, fix = _one_line(finding.message), _one_line(finding.fix or "")
            found[replace(finding, about=_one_line(about), message=message, fix=fix or None)] = None
    return list(found)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def refuse_errors(findings: list[Finding]) -> None:
    """Refuse manifests with findings of status ``fail``.

    Raises:
        UserError: the first such finding, and the number of others.
    """
    errors = [finding for finding in findings if finding.status == "fail"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0].about} {errors[0].text}{more}")


def _refused(document: Document, crd: dict[str, Any] | None) -> Found:
    """Findings of the API server's and KubeRay's rules. Other rules assume that these hold."""
    version, kind = document.get("apiVersion"), document.get("kind")
    if not re.fullmatch(r"([a-z][-a-z0-9.]*/)?v[0-9][a-z0-9]*", str(version)):
        yield fail("apiVersion", f"is {version!r}", "write it as apps/v1")
    elif not str(kind).isalnum():
        yield fail("kind", f"is {kind!r}, which is no kind")
    elif not isinstance(get(document, "metadata.name"), str):
        yield fail("metadata.name", "is missing")
    elif kind != "RayService":
        yield from schema.builtin(document)
    elif version != "ray.io/v1":
        yield fail("apiVersion", f"is {version}", "write ray.io/v1")
    else:
        wrong = list(schema.rayservice(document, crd))
        yield from wrong or operator_rules.rules(document)


def _misread(document: Document, manifests: Manifests) -> Found:
    """Findings about what would be accepted, but would not work."""
    yield from secrets.placeholder(document)
    match document.get("kind"):
        case "RayService":
            yield from _service(document, manifests)
        case "Secret":
            yield from secrets.secret(document)
        case "Namespace":
            yield from around.namespace(document, manifests)
        case "Ingress":
            yield from around.ingress(document, manifests)
        case "PodDisruptionBudget":
            yield from around.budget(document, manifests)
        case "PodMonitor" | "NetworkPolicy":
            yield from around.selector(document, manifests)
        case "NodePool":
            yield from around.node_pool(document)
        case "EC2NodeClass" | "NodeClass":
            yield from around.node_class(document)


def _service(service: Document, manifests: Manifests) -> Iterator[Finding]:
    yield from pods.head(service)
    yield from pods.images(service)
    yield from pods.references(service, manifests)
    yield from secrets.of_service(service, manifests)
    for group in pods_of(service):
        yield from pods.shared_memory(group)
        yield from pods.resources(group)
        yield from pods.machines(group, manifests)
    try:
        fleet = serving.fleet_of(service)
    except ConfigError as error:
        yield from _unreadable(str(error))
        return
    yield from serving.config(service, fleet)
    yield from serving.environment(fleet)
    impossible = [
        *serving.models(fleet),
        *serving.fallbacks(fleet),
        *serving.sharing(fleet),
    ]
    yield from impossible
    if any(finding.status == "fail" for finding in impossible):
        return  # such a model's number of GPUs tells nothing
    yield from serving.capacity(service, fleet, manifests)
    yield from serving.front_end_cores(service, fleet)
    yield from serving.stages(service, fleet)
    yield from serving.caches(service, fleet)
    yield from serving.drain(service, fleet, manifests)


@check("model")
def _unreadable(why: str) -> Found:
    yield fail(serving.CONFIG, why)

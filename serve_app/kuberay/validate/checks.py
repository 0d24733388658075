"""Manifests judged without a cluster: one line a mistake, naming the document and the field.

Three parties would refuse or misread a manifest, in this order: the API server (schemas), KubeRay
(:mod:`operator_rules`), and reality (the checks here: machines that do not fit, labels that no
node has, timeouts that cut each other). An *error* cannot work; a *warning* works and costs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve_app.config import yaml_files
from serve_app.errors import ConfigError, UserError
from serve_app.kuberay.validate import (
    check_config,
    check_others,
    check_pods,
    operator_rules,
    schema,
)
from serve_app.kuberay.validate.operator_rules import Finding
from serve_app.kuberay.validate.reading import Bundle, Document, Found, Warn, get, groups_of


@dataclass(frozen=True)
class Problem:
    """One mistake. ``where`` is ``Kind/name: field``."""

    level: Literal["error", "warning"]
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.where} {self.text}"


def load_documents(paths: Iterable[Path]) -> list[Document]:
    """Every document of the files, and of the YAML files in the folders.

    Kustomize's own files and patches are left out: they are no Kubernetes objects.

    Raises:
        ConfigError: a file that cannot be read, with line and column.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(f for f in path.rglob("*.yaml") if f.name != "kustomization.yaml")
        else:
            files.append(path)
    documents: list[Document] = []
    for file in files:
        found = yaml_files.read_all(file)
        documents += [d for d in found if isinstance(d, dict) and isinstance(d.get("kind"), str)]
    if not documents:
        raise ConfigError(
            f"{', '.join(map(str, paths)) or 'nothing'}: no Kubernetes manifest there"
        )
    return documents


def validate(documents: list[Document], crd: dict[str, Any] | None = None) -> list[Problem]:
    """Everything wrong with these documents, taken together as one bundle.

    ``crd`` is :func:`schema.load_crd`'s; without it the spelling of the RayService's own fields
    and its pod templates are checked, but not every type.
    """
    refused = {id(d): list(_refused(d, crd)) for d in documents}
    # What nobody would accept says nothing of the others: its names and pods will change.
    bundle = Bundle([d for d in documents if not refused[id(d)]])
    problems: list[Problem] = []
    for document in documents:
        kind = str(document.get("kind"))
        name = str(get(document, "metadata.name") or "?")
        for where, text in refused[id(document)] or _check(document, bundle):
            level: Literal["error", "warning"] = "warning" if isinstance(text, Warn) else "error"
            line = text.text if isinstance(text, Warn) else text
            place = f"{kind}/{name}: {where}"
            problem = Problem(level, " ".join(place.split()), " ".join(line.split()))
            if problem not in problems:
                problems.append(problem)
    return problems


def refuse_errors(problems: list[Problem]) -> None:
    """Raise when one of them is an error.

    Raises:
        UserError: the first error, and how many more there are.
    """
    errors = [p for p in problems if p.level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0].where} {errors[0].text}{more}")


def _refused(document: Document, crd: dict[str, Any] | None) -> Iterator[Finding]:
    """What the API server or KubeRay would refuse: no other check makes sense before."""
    version = document.get("apiVersion")
    if not re.fullmatch(r"([a-z][-a-z0-9.]*/)?v[0-9][a-z0-9]*", str(version)):
        yield "apiVersion", f"is {version!r}; write it as apps/v1"
        return
    if not str(document.get("kind")).isalnum():
        yield "kind", f"is {document.get('kind')!r}, which is no kind"
        return
    if not isinstance(get(document, "metadata.name"), str):
        yield "metadata.name", "is missing"
        return
    if document.get("kind") != "RayService":
        yield from schema.builtin_findings(document)
        return
    if document.get("apiVersion") != "ray.io/v1":
        yield "apiVersion", f"is {document.get('apiVersion')}; write ray.io/v1"
        return
    structural: list[Finding] = []
    if crd is not None:
        structural += schema.crd_findings(crd, document)
    else:
        for where, group in groups_of(document):
            structural += schema.pod_findings(f"{where}.template", group.get("template"))
    operator = list(operator_rules.findings(document))
    # The schema and the operator's rules see the same misspelling: once is enough.
    seen = {where for where, _ in operator}
    yield from operator
    yield from (finding for finding in structural if finding[0] not in seen)


def _check(document: Document, bundle: Bundle) -> Found:
    """What would be accepted, and not work."""
    kind = document.get("kind")
    if kind == "RayService":
        yield from _ray_service(document, bundle)
    elif kind == "Secret":
        yield from check_others.secret(document)
    elif kind == "Namespace":
        yield from check_others.namespace(document, bundle)
    elif kind == "Ingress":
        yield from check_others.ingress(document, bundle)
    elif kind == "PodDisruptionBudget":
        yield from check_others.budget(document, bundle)
    elif kind in ("PodMonitor", "NetworkPolicy"):
        yield from check_others.selector(document, bundle)
    elif kind == "NodePool":
        yield from check_others.node_pool(document)
    elif kind in ("EC2NodeClass", "NodeClass"):
        yield from check_others.node_class(document)


def _ray_service(document: Document, bundle: Bundle) -> Found:
    yield from check_pods.head(document)
    yield from check_pods.images(document)
    yield from check_pods.references(document, bundle)
    for where, group in groups_of(document):
        yield from check_pods.pod(where, group)
        yield from check_pods.machines(where, group, bundle)
    fleet = yield from check_config.serve_config(document)
    if fleet is not None:
        impossible = list(check_config.models(fleet))
        yield from impossible
        if any(not isinstance(text, Warn) for _, text in impossible):
            return  # how many GPUs such a model takes says nothing
        yield from check_config.capacity(document, fleet, bundle)
        yield from check_config.stages(document, fleet)
        yield from check_config.caches(document, fleet)
        yield from check_config.drain(document, fleet, bundle)

"""Applying a fleet, and watching it until every model answers."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from serve_app.errors import UserError
from serve_app.kuberay.live import capacity, reasons, revisions, state
from serve_app.kuberay.live.client import Cluster, Forbidden, Gone
from serve_app.kuberay.live.plan import Plan, plan

Document = dict[str, Any]
Tell = Callable[[str], None]

_SETTLE_S = 5.0
"""Everything must run for this long: KubeRay reports the old models for a moment after a change."""

_LOOK_S = 10.0
"""Between two looks at the pods while the RayService itself says nothing new."""


@dataclass(frozen=True)
class Target:
    """A RayService on a cluster."""

    cluster: Cluster
    name: str
    namespace: str

    def get(self) -> Document | None:
        return self.cluster.get("RayService", self.name, self.namespace)

    def require(self) -> Document:
        """The object.

        Raises:
            UserError: there is none.
        """
        document = self.get()
        if document is None:
            raise UserError(f"no RayService {self.name} in namespace {self.namespace}")
        return document


def preview(
    cluster: Cluster, documents: list[Document], *, force: bool = False
) -> tuple[Plan, Document | None, Document]:
    """What applying would do, by the API server's own dry run: plan, live object, future object.

    Nothing is changed. Where the namespace does not exist yet, the server cannot try what goes
    into it, and the documents themselves stand for its answer.

    Raises:
        UserError: the server refuses one of the documents, or lacks a kind.
    """
    service = _service(documents)
    namespace = service["metadata"]["namespace"]
    live = cluster.get("RayService", service["metadata"]["name"], namespace)
    if live is None:
        cluster.list("RayService", namespace)  # says so when KubeRay is not installed
    if cluster.get("Namespace", namespace) is None:
        return plan(None, service), None, service
    future = service
    for document in documents:
        answer = cluster.apply(document, dry_run=True, force=force)
        if document is service:
            future = answer
    return plan(live, future), live, future


def apply(cluster: Cluster, documents: list[Document], *, force: bool = False, tell: Tell) -> int:
    """Apply all, record the revision, and return its number.

    Raises:
        UserError: the server refuses one; those before it are applied.
    """
    for document in documents:
        cluster.apply(document, force=force)
        tell(f"applied {document['kind']} {document['metadata']['name']}")
    return revisions.record(cluster, _service(documents))


def check_capacity(cluster: Cluster, change: Plan, *, force: bool, tell: Tell) -> None:
    """Tell whether the GPUs for a change exist.

    Raises:
        UserError: they do not, and ``force`` is not set.
    """
    if not change.gpus:
        return
    try:
        tell(capacity.refuse_shortage(cluster, change.gpus))
    except UserError as shortage:
        # A first deployment waits for its nodes and harms nobody; a second cluster that never
        # comes up blocks every later change (kuberay#1476).
        if change.kind == "new cluster" and not force:
            raise UserError(
                f"{shortage}, choose upgrade.strategy None or NewClusterWithIncrementalUpgrade, or "
                "go ahead with --force"
            ) from None
        tell(f"warning: {shortage}")


def follow(target: Target, *, timeout_s: float, tell: Tell, now: Callable[[], float]) -> None:
    """Watch until every application runs and nothing is under way, telling what changes.

    Raises:
        UserError: it failed, with the reason; or the time is over, with what is missing.
    """
    deadline = now() + timeout_s
    told: set[str] = set()
    running_since: float | None = None

    def tell_new(lines: list[str]) -> None:
        for line in lines:
            if line not in told:
                tell(line)
        told.clear()
        told.update(lines)

    while True:
        document = target.require()
        seen = state.of(document)
        tell_new([*seen.lines(), *reasons.pod_lines(target.cluster, target.name, target.namespace)])
        if seen.failure:
            raise UserError(_with_reasons(target, f"{target.name} failed: {seen.failure}"))
        if not seen.running:
            running_since = None
        elif running_since is None:
            running_since = now()
        elif now() - running_since >= _SETTLE_S:
            return
        left = deadline - now()
        if left <= 0:
            missing = [line for line in seen.lines() if ": RUNNING" not in line]
            what = "; ".join(missing) or "no endpoint yet"
            raise UserError(
                _with_reasons(target, f"{target.name} is not ready after {timeout_s:.0f} s: {what}")
            )
        _wait_for_change(target, document, min(left, _SETTLE_S if seen.running else _LOOK_S))


def _wait_for_change(target: Target, document: Document, timeout_s: float) -> None:
    version = str(document["metadata"].get("resourceVersion") or "")
    started = time.monotonic()
    try:
        for _ in target.cluster.watch(
            "RayService", target.name, target.namespace, since=version, timeout_s=timeout_s
        ):
            return
    except Gone:
        return
    # The server may hang up at once (a proxy, a rolling control plane): do not spin.
    time.sleep(max(0.0, min(1.0, timeout_s - (time.monotonic() - started))))


def _with_reasons(target: Target, headline: str) -> str:
    """One line: the headline, then the first reason that the cluster itself gives."""
    try:
        found = reasons.explain(target.cluster, target.name, target.namespace)
    except UserError:
        found = []
    more = f" (and {len(found) - 1} more: serve-app status {target.name})" if len(found) > 1 else ""
    return f"{headline}; {found[0]}{more}" if found else headline


def unanswered(target: Target, document: Document) -> list[str]:
    """The models that do not answer a real request through the Service, one line each.

    A model that may be scaled to nothing is left alone: asking would wake it.

    Raises:
        Forbidden: these credentials may not use the API server's way to Services.
    """
    silent = []
    for name, application in state.models_of(document).items():
        args = application.get("args") or {}
        if (args.get("autoscaling") or {}).get("min_replicas") == 0:
            continue
        status, text = _ask(target, f"{_serve_service(document)}:serve", name)
        # 401 and 403 of the gateway are an answer: it wants an API key, which we have not.
        if status not in (200, 401, 403) and not _has_no_such_route(status, text):
            silent.append(f"{name} answers HTTP {status}: {' '.join(text.split())[:200]}")
    return silent


def _ask(target: Target, service: str, model: str) -> tuple[int, str]:
    """Status and body of the cheapest request that the model truly answers.

    What a model is for is vLLM's to know: one that completes nothing says so, and is then asked
    what every pooling model answers. One for speech has neither route; that it says so itself has
    to do.

    Raises:
        Forbidden: these credentials may not use the API server's way to Services.
    """
    status, text = 0, ""
    for path, question in (
        ("/v1/completions", {"prompt": "ready?", "max_tokens": 1}),
        ("/pooling", {"input": "ready?"}),
    ):
        body = {"model": model, **question}
        status, text = target.cluster.through_service(service, target.namespace, "POST", path, body)
        if status == 403 and '"kind":"Status"' in text.replace(" ", ""):
            raise Forbidden("not allowed to reach services through the API server")
        if not _has_no_such_route(status, text):
            break
    return status, text


def _has_no_such_route(status: int, text: str) -> bool:
    """Whether a model server answered that it has no such route (serve_app.replica.no_route)."""
    try:
        return status == 404 and bool(json.loads(text)["error"]["code"] == "not_found")
    except (ValueError, TypeError, LookupError):
        return False


def _serve_service(document: Document) -> str:
    """The Service in front of the serving cluster, as KubeRay names it."""
    strategy = (document["spec"].get("upgradeStrategy") or {}).get("type")
    if strategy == "NewClusterWithIncrementalUpgrade":
        return f"{state.of(document).active}-serve-svc"
    return f"{document['metadata']['name']}-serve-svc"


def difference(live: Document | None, future: Document) -> str:
    """A unified diff of the two as YAML, without what only the server writes."""
    before = _readable(live) if live else []
    name = f"RayService/{future['metadata']['name']}"
    return "".join(
        difflib.unified_diff(before, _readable(future), f"live {name}", f"new {name}", n=3)
    )


def _readable(document: Document) -> list[str]:
    shown = json.loads(json.dumps(document))
    shown.pop("status", None)
    for key in ("managedFields", "resourceVersion", "uid", "creationTimestamp", "generation"):
        shown["metadata"].pop(key, None)
    # As its own document: a diff of one quoted string helps nobody.
    config = shown["spec"].pop("serveConfigV2", "")
    text = yaml.safe_dump(shown, width=100, sort_keys=True)
    return [*text.splitlines(keepends=True), "# serveConfigV2\n", *config.splitlines(keepends=True)]


def _service(documents: list[Document]) -> Document:
    return next(d for d in documents if d["kind"] == "RayService")

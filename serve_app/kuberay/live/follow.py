"""Watches a RayService until every model answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from serve_app.errors import UserError
from serve_app.kuberay.live import reasons, state
from serve_app.kuberay.live.api_server import Forbidden, Gone, Unreachable
from serve_app.kuberay.live.cluster_spec import plain
from serve_app.kuberay.live.target import Target

Document = dict[str, Any]

_SETTLE_S = 5.0
"""Seconds for which all must run: just after a change KubeRay still reports the old models."""

_FAILED_S = 8.0
"""Seconds for which the same failure must be reported: just after a change KubeRay still reports
that of the spec before, which this change may mend."""

_LOOK_S = 10.0
"""Seconds between two looks at the pods while the RayService itself does not change."""


def follow(
    target: Target, applied: Document, *, timeout_s: float, tell: Callable[[str], None]
) -> None:
    """Watch until every application runs and no change is under way; ``tell`` what happens.

    While the API server is away the deployment goes on, and so does this. ``applied`` is the
    RayService as it was just after the apply.

    Raises:
        UserError: the deployment failed, with the reason; or timed out, with what is missing; or
            somebody else changed the RayService meanwhile.
    """
    deadline = time.monotonic() + timeout_s
    before = state.of(applied)
    told: set[str] = set()
    since = time.monotonic()
    was: tuple[bool, str | None] | None = None  # whether all runs; the failure

    def tell_new(lines: list[str]) -> None:
        for line in lines:
            if line not in told:
                tell(line)
        told.clear()
        told.update(lines)

    while True:
        try:
            document = target.require()
            if _is_superseded(applied, document):
                raise UserError(
                    f"somebody else has changed {target.name} since: what runs now is theirs; "
                    f"serve-app status {target.address}"
                )
            seen = state.of(document)
            if seen.deleting:
                raise UserError(f"somebody deletes {target.name} since: what was applied goes, too")
            headline = [seen.headline] if seen.headline else []
            tell_new([*headline, *seen.lines(), *reasons.pod_lines(target)])
            if seen.refusal and seen.spoken != before.spoken:
                raise UserError(f"KubeRay's operator refuses {target.name}: {seen.refusal}")
            now = (seen.running, seen.failure)
            if now != was:
                since, was = time.monotonic(), now
            lasted = time.monotonic() - since
            if seen.running and lasted >= _SETTLE_S:
                return
            if seen.failure and lasted >= _FAILED_S:
                raise UserError(_with_reasons(target, f"{target.name} failed: {seen.failure}"))
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [line for line in seen.lines() if ": RUNNING" not in line]
                what = seen.headline or "; ".join(missing) or seen.waiting
                raise UserError(
                    _with_reasons(
                        target, f"{target.name} is not ready after {timeout_s:.0f} s: {what}"
                    )
                )
            soon = 1.0 if seen.failure else _SETTLE_S if seen.running else _LOOK_S
            _wait_for_change(target, document, min(left, soon))
        except Unreachable as error:
            if time.monotonic() > deadline:
                raise
            tell_new([f"{error}; the deployment itself goes on"])
            time.sleep(1.0)


def _is_superseded(applied: Document, now: Document) -> bool:
    """Whether the spec is another by now. The operator adds fields that hold nothing."""
    mine = applied["spec"]
    theirs = {key: now["spec"].get(key) for key in mine}
    return bool(plain(theirs, mine) != plain(mine, mine))


def _wait_for_change(target: Target, document: Document, timeout_s: float) -> None:
    version = str(document["metadata"].get("resourceVersion") or "")
    started = time.monotonic()
    try:
        for _ in target.server.watch(
            "RayService", target.name, target.namespace, since=version, timeout_s=timeout_s
        ):
            return
    except Gone:
        return
    # The server may close at once (a proxy, a rolling control plane): do not spin.
    time.sleep(max(0.0, min(1.0, timeout_s - (time.monotonic() - started))))


def _with_reasons(target: Target, headline: str) -> str:
    """One line: the headline, and the first reason that pods or events give."""
    try:
        found = reasons.explain(target)
    except UserError:
        found = []
    rest = len(found) - 1
    more = f" (and {rest} more: serve-app status {target.address})" if rest > 0 else ""
    return f"{headline}; {found[0]}{more}" if found else headline


_ENDPOINT_S = 60.0
"""Seconds for which a Service may be without an endpoint: after a switch the operator turns it to
the new cluster before the gateways there are Ready."""


def unanswered(target: Target, document: Document) -> list[str]:
    """The models that do not answer a real request through the Service, one line each.

    Models that may be scaled to zero are not asked, because a request would wake them.

    Raises:
        Forbidden: these credentials may not use the API server's proxy to Services.
    """
    silent = []
    deadline = time.monotonic() + _ENDPOINT_S
    for name, application in state.models_of(document).items():
        args = application.get("args") or {}
        if (args.get("autoscaling") or {}).get("min_replicas") == 0:
            continue
        status, text = _ask(target, f"{_serve_service(document)}:serve", name)
        while _has_no_endpoint(status, text) and time.monotonic() < deadline:
            time.sleep(1.0)
            status, text = _ask(target, f"{_serve_service(document)}:serve", name)
        # 401 and 403 are answers too: the gateway wants an API key, which we do not have.
        if status not in (200, 401, 403) and not _has_no_such_route(status, text):
            silent.append(f"{name} answers HTTP {status}: {' '.join(text.split())[:200]}")
    return silent


def _ask(target: Target, service: str, model: str) -> tuple[int, str]:
    """Status and body of the cheapest request that the model truly answers.

    Only vLLM knows a model's tasks. A model without a completions route says so, and is then asked
    for pooling. A speech model has neither route; its own answer that says so counts as an answer.

    Raises:
        Forbidden: these credentials may not use the API server's proxy to Services.
    """
    status, text = 0, ""
    for path, question in (
        ("/v1/completions", {"prompt": "ready?", "max_tokens": 1}),
        ("/pooling", {"input": "ready?"}),
    ):
        body = {"model": model, **question}
        status, text = target.server.through_service(service, target.namespace, "POST", path, body)
        if status == 403 and '"kind":"Status"' in text.replace(" ", ""):
            raise Forbidden("not allowed to reach services through the API server")
        if not _has_no_such_route(status, text):
            break
    return status, text


def _has_no_endpoint(status: int, text: str) -> bool:
    """Whether the API server says that no Ready pod is behind the Service, or not any more."""
    nobody = ("no endpoints available", "error trying to reach service")
    return status == 503 and any(words in text for words in nobody)


def _has_no_such_route(status: int, text: str) -> bool:
    """Whether a model server answered that it has no such route (serve_app.replica.no_route).

    Those of an older image give no code.
    """
    try:
        return status == 404 and json.loads(text)["error"]["code"] in ("not_found", None)
    except (ValueError, TypeError, LookupError):
        return False


def _serve_service(document: Document) -> str:
    """The Service in front of the serving cluster, as KubeRay names it."""
    if state.is_incremental(document):
        return f"{state.of(document).active}-serve-svc"
    return f"{document['metadata']['name']}-serve-svc"

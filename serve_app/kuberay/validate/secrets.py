"""Rules for secrets in plain text, and for placeholders that were never replaced."""

from __future__ import annotations

from typing import Any

from serve_app.config.placeholders import PLACEHOLDER, leaves
from serve_app.config.secrets import in_plain_text
from serve_app.errors import UserError
from serve_app.kuberay.validate.manifests import (
    Document,
    Manifests,
    get,
    mapping,
    pods_of,
)
from serve_app.kuberay.validate.rule import Found, check, fail, warn

_REFERENCE = "valueFrom.secretKeyRef"


@check("secrets")
def secret(document: Document) -> Found:
    for field in ("data", "stringData"):
        for key, value in mapping(document, field).items():
            if value not in ("", None, PLACEHOLDER):
                yield fail(
                    f"{field}.{key}", "puts a secret into a manifest", "create it outside of git"
                )


@check("secrets")
def of_service(service: Document, manifests: Manifests) -> Found:
    """Do pods and Redis refer to their secrets, and do these Secrets exist in the manifests?"""

    def known(field: str, holder: Any) -> Found:
        name = get(holder, f"{_REFERENCE}.name")
        if name and manifests.secrets and name not in manifests.secrets:
            yield fail(f"{field}.{_REFERENCE}.name", f"'{name}' is in no manifest")

    for pods in pods_of(service):
        for at, entry in pods.env:
            yield from known(at, entry)
            for name in in_plain_text({entry.get("name"): entry.get("value")}):
                yield fail(
                    f"{at}.value", f"puts the secret {name} into the manifest", f"use {_REFERENCE}"
                )
    redis = "spec.rayClusterConfig.gcsFaultToleranceOptions.redisPassword"
    yield from known(redis, get(service, redis))
    if get(service, f"{redis}.value"):
        yield fail(f"{redis}.value", "puts a secret into the manifest", f"use {_REFERENCE}")


def refuse_placeholders(documents: list[Document]) -> None:
    """Refuse to deploy documents with placeholders.

    Raises:
        UserError: the first value that is still a placeholder.
    """
    for document in documents:
        for path, value in leaves(document):
            if PLACEHOLDER in str(value):
                kind, name = document.get("kind"), get(document, "metadata.name")
                raise UserError(f"{kind}/{name}: {path} is '{value}'; {_FILL_IN}")


_FILL_IN = "put your own value into the profile"


@check("placeholders")
def placeholder(document: Document) -> Found:
    """The first placeholder, in anything but a template of Secrets. ``deploy`` refuses it."""
    if document.get("kind") == "Secret":
        return
    for path, value in leaves(document):
        if PLACEHOLDER in str(value):
            ours = document.get("kind") == "RayService"
            yield warn(path, f"is '{value}'", _FILL_IN if ours else "put your own value there")
            return

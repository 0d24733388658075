"""Types and spelling: the RayService CRD's own schema, and Kubernetes' for built-in kinds.

The CRD is KubeRay's and not shipped here. ``serve-app validate --crd FILE`` reads it, from the
cluster (``kubectl get crd rayservices.ray.io -o yaml``) or from KubeRay's Helm chart. Without it
only the names of the RayService's own fields and its pod templates are checked. The schemas of the
built-in kinds are those of the package kubernetes-validate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from serve_app.errors import ConfigError, did_you_mean
from serve_app.kuberay.validate.manifests import HOW_QUANTITIES_ARE, Document, pods_of
from serve_app.kuberay.validate.rule import Found, fail

KUBERNETES_VERSION = "1.33"
"""Oldest Kubernetes for these manifests (matchLabelKeys in pod affinity is stable since)."""


def load_crd(path: Path) -> dict[str, Any]:
    """The strict schema of a RayService, from a CRD in YAML or from its schema alone in JSON.

    Raises:
        ConfigError: the file has no schema for ray.io/v1 RayService.
    """
    try:
        document = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    if isinstance(document, dict) and document.get("kind") == "CustomResourceDefinition":
        versions = (document.get("spec") or {}).get("versions") or []
        v1: dict[str, Any] = next((v for v in versions if v.get("name") == "v1"), {})
        document = (v1.get("schema") or {}).get("openAPIV3Schema")
    if not isinstance(document, dict) or "rayClusterConfig" not in str(document)[:200_000]:
        raise ConfigError(f"{path}: not the CRD of ray.io/v1 RayService")
    schema: dict[str, Any] = _strict(document)
    # The CRD says of metadata only that it is an object.
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _strict(schema: Any) -> Any:
    """The schema with unknown fields refused, as by the API server's fieldValidation=Strict."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if strict.pop("x-kubernetes-int-or-string", False):
        strict.pop("type", None)
        strict.pop("anyOf", None)
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and not (open_ended or "additionalProperties" in schema)
    ):
        strict["additionalProperties"] = False
    if isinstance(schema.get("required"), list):
        # The API server fills in defaults before it looks for what is missing.
        properties = schema.get("properties", {})
        strict["required"] = [
            key for key in schema["required"] if "default" not in properties.get(key, {})
        ]
    return strict


def _fields(names: str, *required: str, **properties: Any) -> dict[str, Any]:
    """The schema of an object that has these fields and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": {**{name: {} for name in names.split()}, **properties},
        "additionalProperties": False,
    }


_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}

_WITHOUT_CRD = _fields(
    "apiVersion kind metadata status",
    "spec",
    spec=_fields(
        "deploymentUnhealthySecondThreshold excludeHeadPodFromServeSvc managedBy "
        "rayClusterDeletionDelaySeconds serveConfigV2 serveService serviceUnhealthySecondThreshold "
        "suspend upgradeStrategy",
        "rayClusterConfig",
        rayClusterConfig=_fields(
            "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions "
            "headServiceAnnotations historyServerOptions managedBy networkPolicy rayVersion "
            "suspend tlsOptions upgradeStrategy",
            "headGroupSpec",
            headGroupSpec=_fields(
                "enableIngress headService ingressOptions labels resources serviceType",
                "template",
                rayStartParams=_TEXTS,
                template={"type": "object"},
            ),
            workerGroupSpecs={
                "type": "array",
                "items": _fields(
                    "idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority "
                    "replicas resources scaleStrategy suspend",
                    "groupName",
                    "template",
                    groupName={"type": "string"},
                    rayStartParams=_TEXTS,
                    template={"type": "object"},
                ),
            },
        ),
    ),
)
"""The fields of a RayService in KubeRay 1.7, for a check of spelling without the CRD at hand."""


def rayservice(document: Document, crd: dict[str, Any] | None) -> Found:
    """What the API server would refuse in a RayService."""
    for path, said in crd_findings(crd or _WITHOUT_CRD, document):
        yield fail(path, said)
    if crd is None:
        for pods in pods_of(document):
            template = pods.group.get("template")
            probe = {"kind": "PodTemplate", "metadata": {"name": "probe"}, "template": template}
            for path, said in _builtin(json.dumps({"apiVersion": "v1", **probe}, default=str)):
                yield fail(f"{pods.where}.{path}", said)


def crd_findings(schema: dict[str, Any], document: Document) -> Iterator[tuple[str, str]]:
    """The fields that a CRD's schema refuses, each with the reason."""
    validator = jsonschema.Draft202012Validator(schema)
    for error in validator.iter_errors(document):
        yield from _explain(error)


def builtin(document: Document) -> Found:
    """What the API server would refuse in a document of a built-in kind.

    Documents of other kinds have no findings.
    """
    for path, said in _builtin(json.dumps(document, default=str)):
        yield fail(path, said)


@cache
def _builtin(text: str) -> tuple[tuple[str, str], ...]:
    """The errors of one document (JSON). Cached: the package reads 2 MB of schemas every time."""
    try:
        kubernetes_validate.validate(json.loads(text), KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return tuple(_explain(error))
    except (kubernetes_validate.SchemaNotFoundError, FileNotFoundError):
        pass
    return ()


def _explain(error: jsonschema.ValidationError) -> Iterator[tuple[str, str]]:
    """One line for each mistake: the field, and what is wrong with it."""
    path = _path(error.absolute_path)
    if error.validator == "additionalProperties":
        known = sorted((error.schema or {}).get("properties") or {})
        for key in sorted(set(error.instance) - set(known)):
            yield _join(path, key), f"is not a field{did_you_mean(str(key), known)}"
    elif error.validator == "required":
        missing = re.match(r"'([^']+)'", error.message)
        yield _join(path, missing[1] if missing else "?"), "is missing"
    elif error.validator == "type":
        kinds = error.validator_value
        wanted = " or ".join(kinds) if isinstance(kinds, list) else str(kinds)
        yield path, f"is {_short(error.instance)}, but must be of type {wanted}"
    elif error.validator == "minimum":
        yield path, f"is {error.instance}, but must be {error.validator_value} or more"
    elif error.validator == "pattern" and "[KMGTPE]i" in error.validator_value:
        yield path, f"is {_short(error.instance)}; {HOW_QUANTITIES_ARE}"
    else:
        yield path, error.message if len(error.message) < 200 else f"fails {error.validator}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _path(parts: Any) -> str:
    path = ""
    for part in parts:
        path = f"{path}[{part}]" if isinstance(part, int) else _join(path, str(part))
    return path


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key

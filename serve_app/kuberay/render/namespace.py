"""The namespace, and in it the pods' identity, secrets and model cache."""

from __future__ import annotations

from typing import Any

from serve_app.config.yaml_files import note
from serve_app.kuberay.render.names import PART_OF
from serve_app.kuberay.render.profile import ClusterProfile


def namespace(profile: ClusterProfile) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": profile.namespace,
            # Without elbv2.k8s.aws/pod-readiness-gate-inject: KubeRay's Service selects GPU pods
            # too, which would wait for ever to become healthy targets.
            "labels": PART_OF
            | {
                "pod-security.kubernetes.io/enforce": note(
                    "baseline", "Our pods would pass restricted; KubeRay's Redis clean-up job not."
                ),
                "pod-security.kubernetes.io/warn": "restricted",
            },
        },
    }


def service_account(profile: ClusterProfile) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": profile.service_account,
        "namespace": profile.namespace,
        "labels": PART_OF,
    }
    if profile.role_arn:
        metadata["annotations"] = {
            "eks.amazonaws.com/role-arn": note(profile.role_arn, "IRSA: reads the model bucket.")
        }
    document: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata,
    }
    if not profile.role_arn:
        document["metadata"] = note(
            metadata,
            "EKS Pod Identity needs nothing here but the name: aws eks "
            f"create-pod-identity-association --namespace {profile.namespace} "
            f"--service-account {profile.service_account} --role-arn …",
        )
    return document


def cache_claim(profile: ClusterProfile) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": profile.cache.claim,
            "namespace": profile.namespace,
            "labels": PART_OF,
        },
        "spec": {
            "accessModes": note(
                ["ReadWriteMany"],
                "Pods of every zone, and of two clusters during an upgrade, mount it at once; an "
                "EBS volume would pin them to one zone.",
            ),
            "storageClassName": profile.cache.storage_class,
            "resources": {"requests": {"storage": f"{profile.cache.size_gib}Gi"}},
        },
    }


def secrets_template(profile: ClusterProfile) -> list[dict[str, Any]]:
    """The Secrets that must exist, without their values. No kustomization includes them."""
    redis = profile.redis.password if profile.redis else None
    wanted = [profile.hf_token, redis, profile.keys, profile.usage_db, profile.otlp_headers]
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": secret.name, "namespace": profile.namespace},
            "type": "Opaque",
            "stringData": {secret.key: "REPLACE_ME"},
        }
        for secret in wanted
        if secret is not None
    ]

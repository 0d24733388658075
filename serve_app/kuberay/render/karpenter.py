"""The machines: one NodePool for GPUs, one for everything else, and the NodeClass behind both."""

from __future__ import annotations

from typing import Any

from serve_app.config.yaml_files import note
from serve_app.kuberay.render.profile import ClusterProfile

GPU_POOL = "serve-app-gpu"
CPU_POOL = "serve-app-cpu"
NODE_CLASS = "serve-app"

_TERMINATION_GRACE = "3h"
"""How long a draining node waits for its pods: longer than any pod's own grace period."""


def node_pools(profile: ClusterProfile, instance_types: list[str]) -> list[dict[str, Any]]:
    """The NodePools. ``instance_types`` are those that the worker groups can use."""
    prefix = profile.instance_label_prefix
    common = [
        {"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64"]},
        {"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]},
    ]
    if profile.zones:
        common.append(
            {"key": "topology.kubernetes.io/zone", "operator": "In", "values": profile.zones}
        )
    gpu = _pool(
        profile,
        GPU_POOL,
        requirements=[
            *common,
            {
                "key": "node.kubernetes.io/instance-type",
                "operator": "In",
                "values": instance_types,
            },
            note(
                {
                    "key": "karpenter.sh/capacity-type",
                    "operator": "In",
                    "values": list(profile.capacity_types),
                },
                "Karpenter takes reserved capacity first, whatever the order here.",
            ),
        ],
        taints=[{"key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule"}],
        limits={
            "nvidia.com/gpu": note(
                str(profile.max_gpus),
                "The bill's ceiling. An upgrade to a new cluster needs every GPU twice.",
            )
        },
        disruption={
            "consolidationPolicy": note(
                "WhenEmpty", "A model costs minutes to load: never move one to save a machine."
            ),
            "consolidateAfter": note("10m", "A warm machine saves the 4 minutes of its start."),
        },
    )
    cpu = _pool(
        profile,
        CPU_POOL,
        requirements=[
            *common,
            {"key": f"{prefix}/instance-category", "operator": "In", "values": ["c", "m", "r"]},
            {"key": f"{prefix}/instance-generation", "operator": "Gt", "values": ["5"]},
            note(
                {
                    "key": "karpenter.sh/capacity-type",
                    "operator": "In",
                    "values": ["on-demand"],
                },
                "Head and gateways hold every stream: no spot.",
            ),
        ],
        taints=[],
        limits={"cpu": "128"},
        disruption={
            "consolidationPolicy": "WhenEmptyOrUnderutilized",
            "consolidateAfter": "5m",
            "budgets": [{"nodes": "1"}],
        },
    )
    return [gpu, cpu]


def _pool(
    profile: ClusterProfile,
    name: str,
    *,
    requirements: list[Any],
    taints: list[dict[str, str]],
    limits: dict[str, Any],
    disruption: dict[str, Any],
) -> dict[str, Any]:
    self_managed = profile.karpenter == "self-managed"
    spec: dict[str, Any] = {
        "nodeClassRef": {
            "group": profile.instance_label_prefix,
            "kind": "EC2NodeClass" if self_managed else "NodeClass",
            "name": NODE_CLASS,
        },
        "requirements": requirements,
        "expireAfter": note("720h", "A month: machines get their security fixes by being new."),
        "terminationGracePeriod": note(
            _TERMINATION_GRACE,
            "Ends the wait for pods marked do-not-disrupt; longer than their own grace period.",
        ),
    }
    if taints:
        spec["taints"] = taints
    return {
        "apiVersion": "karpenter.sh/v1",
        "kind": "NodePool",
        "metadata": {"name": name},
        "spec": {"template": {"spec": spec}, "limits": limits, "disruption": disruption},
    }


def node_class(profile: ClusterProfile) -> dict[str, Any]:
    """Disk, image and network of the nodes, for the kind of Karpenter that the cluster has."""
    discovery = [{"tags": {"karpenter.sh/discovery": profile.cluster_name}}]
    if profile.karpenter == "auto-mode":
        return {
            "apiVersion": "eks.amazonaws.com/v1",
            "kind": "NodeClass",
            "metadata": {"name": NODE_CLASS},
            "spec": {
                "role": profile.node_role or "AmazonEKSAutoNodeRole",
                "subnetSelectorTerms": discovery,
                "securityGroupSelectorTerms": discovery,
                "ephemeralStorage": {"size": "300Gi", "iops": 6000, "throughput": 600},
            },
        }
    return {
        "apiVersion": "karpenter.k8s.aws/v1",
        "kind": "EC2NodeClass",
        "metadata": {"name": NODE_CLASS},
        "spec": {
            "amiSelectorTerms": note(
                [{"alias": "al2023@latest"}],
                "With the NVIDIA driver. Pin a version in production: latest replaces nodes "
                "whenever AWS publishes an image.",
            ),
            "role": profile.node_role or f"KarpenterNodeRole-{profile.cluster_name}",
            "subnetSelectorTerms": discovery,
            "securityGroupSelectorTerms": note(
                discovery,
                "For EFA the group must allow all traffic to and from itself.",
            ),
            "instanceStorePolicy": note(
                "RAID0", "Local NVMe, where there is some, holds the pods."
            ),
            "blockDeviceMappings": [
                {
                    "deviceName": "/dev/xvda",
                    "ebs": note(
                        {
                            "volumeSize": "300Gi",
                            "volumeType": "gp3",
                            "iops": 6000,
                            "throughput": 600,
                            "encrypted": True,
                            "deleteOnTermination": True,
                        },
                        "The image unpacks to 30 GB; at the default 125 MiB/s that takes minutes.",
                    ),
                }
            ],
            "userData": note(
                "apiVersion: node.eks.aws/v1alpha1\n"
                "kind: NodeConfig\n"
                "spec:\n"
                "  featureGates:\n"
                "    FastImagePull: true\n"
                "  kubelet:\n"
                "    config:\n"
                "      serializeImagePulls: false\n",
                "Layers are pulled side by side: a large image in two minutes, not five.",
            ),
        },
    }

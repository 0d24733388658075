"""What a cluster at hand has, read from Ray's and from kubectl's answers."""

from __future__ import annotations

import re

import pytest

from serve_app.check.inventory import KubernetesInventory, Node, RayInventory
from serve_app.errors import UserError


def test_ray_nodes_are_read() -> None:
    raw = [
        {"Alive": True, "NodeManagerHostname": "head", "Resources": {"node:__internal_head__": 1}},
        {"Alive": True, "NodeManagerHostname": "a", "Resources": {"GPU": 8.0,
         "CPU": 16.0, "accelerator_type:H100": 1.0}},
        {"Alive": False, "NodeManagerHostname": "gone", "Resources": {"GPU": 8.0}},
    ]  # fmt: skip
    cluster = RayInventory(raw)
    assert cluster.nodes() == [
        Node("head", 0, is_head=True, cpus=0),
        Node("a", 8, gpu_type="H100", cpus=16, cores=16),
    ]
    assert cluster.secrets() is None


def test_kubernetes_nodes_are_read() -> None:
    node = {
        "metadata": {"name": "ip-10", "labels": {
            "karpenter.k8s.aws/instance-gpu-name": "h100"}},
        "status": {"allocatable": {"nvidia.com/gpu": "8", "cpu": "191450m"}},
    }  # fmt: skip
    answers = {
        "nodes": [node],
        "secrets": [{"metadata": {"name": "hf"}}],
        "storageclasses": [{"metadata": {"name": "gp3"}}],
        "customresourcedefinitions": [{"metadata": {"name": "rayservices.ray.io"}}],
    }
    cluster = KubernetesInventory(lambda resource: answers[resource])
    assert cluster.nodes() == [Node("ip-10", 8, gpu_type="h100", cores=191.45)]
    assert cluster.secrets() == {"hf"}
    assert cluster.classes() == {"StorageClass/gp3", "CRD/rayservices.ray.io"}


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9"])
def test_a_cluster_that_is_gone_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"answers at {re.escape(address)} \(RAY_ADD"):
        RayInventory.connect()


@pytest.mark.parametrize("address", ["::1:9", "here"])
def test_an_address_that_is_none_is_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"is .{address}., which is no address; write host:6379"):
        RayInventory.connect()

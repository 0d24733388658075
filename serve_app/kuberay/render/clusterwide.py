"""What a cluster needs once, whatever fleets run on it: operator, storage, Grafana."""

from __future__ import annotations

from serve_app.config.yaml_files import dump, note
from serve_app.kuberay.render.dashboards import dashboards
from serve_app.kuberay.render.profile import KUBERAY_VERSION

_SOURCE = "Rendered by `serve-app render --cluster-wide`; change serve_app/kuberay/clusterwide.py."


def clusterwide() -> dict[str, str]:
    """The files beside the fleets' folders in kuberay/, their text by path."""
    return {
        "cluster/operator-values.yaml": dump(
            {
                "image": {
                    "tag": note(
                        f"v{KUBERAY_VERSION}",
                        "The chart's default is a moving tag. KubeRay is tested against the three "
                        "Ray releases before it; 1.7.1 came out after Ray 2.57, before 2.60.",
                    )
                },
                "featureGates": [
                    {"name": "RayClusterStatusConditions", "enabled": True},
                    note(
                        {"name": "RayServiceIncrementalUpgrade", "enabled": True},
                        "For upgrade.strategy NewClusterWithIncrementalUpgrade.",
                    ),
                ],
                "metrics": {"serviceMonitor": {"enabled": True}},
                "resources": note(
                    {
                        "requests": {"cpu": "100m", "memory": "512Mi"},
                        "limits": {"memory": "1Gi"},
                    },
                    "The chart's CPU limit of 100m delays reconciling by seconds.",
                ),
            },
            header=(
                f"{_SOURCE}\n"
                "helm repo add kuberay https://ray-project.github.io/kuberay-helm/\n"
                "helm install kuberay-operator kuberay/kuberay-operator "
                f"--version {KUBERAY_VERSION} "
                "\\\n  --namespace kuberay-system --create-namespace -f operator-values.yaml"
            ),
        ),
        "cluster/storageclass.yaml": dump(
            {
                "apiVersion": "storage.k8s.io/v1",
                "kind": "StorageClass",
                "metadata": {"name": "efs-sc"},
                "provisioner": "efs.csi.aws.com",
                "parameters": {
                    "provisioningMode": "efs-ap",
                    "fileSystemId": note(
                        "fs-REPLACE_ME", "The file system of docs/eks.md, step 3."
                    ),
                    "directoryPerms": "750",
                    "uid": note("1000", "The user in the image."),
                    "gid": "1000",
                },
                "mountOptions": ["tls"],
            },
            header=_SOURCE,
        ),
        "monitoring/servicemonitor.yaml": dump(
            {
                "apiVersion": "monitoring.coreos.com/v1",
                "kind": "ServiceMonitor",
                "metadata": {
                    "name": "nvidia-dcgm-exporter",
                    "namespace": "monitoring",
                    "labels": {"release": "kube-prometheus-stack"},
                },
                "spec": {
                    "namespaceSelector": {"any": True},
                    "selector": {"matchLabels": {"app": "nvidia-dcgm-exporter"}},
                    "endpoints": [{"port": "gpu-metrics", "interval": "30s"}],
                },
            },
            header=f"{_SOURCE}\nThe GPUs themselves: temperature, power, Xid errors.",
        ),
        "monitoring/dashboards.yaml": dump(
            *(
                {
                    "apiVersion": "v1",
                    "kind": "ConfigMap",
                    "metadata": {
                        "name": name.removesuffix(".json"),
                        "namespace": "monitoring",
                        "labels": {
                            "grafana_dashboard": note(
                                "1", "The label that Grafana's sidecar looks for."
                            )
                        },
                    },
                    "data": {name: text},
                }
                for name, text in dashboards().items()
            ),
            header=f"{_SOURCE}\nOne ConfigMap each: an object may have 1 MB.",
        ),
        "monitoring/kustomization.yaml": dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": ["dashboards.yaml", "servicemonitor.yaml"],
            },
            header=_SOURCE,
        ),
    }

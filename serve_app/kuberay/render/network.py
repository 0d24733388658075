"""The ways in: ingress or Gateway API, and the network policies."""

from __future__ import annotations

from typing import Any

from serve_app.addresses import ANY_IPV6, V6_IS_V4
from serve_app.config.document import Fleet
from serve_app.config.yaml_files import note
from serve_app.kuberay.render.names import PART_OF, ROLE_LABEL, instance_name, labels
from serve_app.kuberay.render.profile import ClusterProfile

HEALTH_PATH = "/-/healthz"
"""A path of Serve's proxy: 200 only while the proxy has routes and is not draining."""

GATEWAY_CLASS = "serve-app-alb"


def why_unreachable(host: str) -> str | None:
    """Why other pods cannot reach an ``http_options.host``; None where they can."""
    if host in ("0.0.0.0", ANY_IPV6):
        return None
    if host == "::":
        return f"http_options.host is {V6_IS_V4}"
    return (
        f"http_options.host is {host}, where no other pod can reach it; set 0.0.0.0, or {ANY_IPV6} "
        "on a cluster of IPv6"
    )


def _ip_address_type(fleet: Fleet) -> dict[str, Any]:
    if not fleet.on_ipv6:
        return {}
    return {
        "ipAddressType": note(
            "dualstack", "A load balancer of IPv4 alone takes no IPv6 address as a target."
        )
    }


def ingress(fleet: Fleet, profile: ClusterProfile) -> dict[str, Any]:
    """An ALB in front of the RayService's stable Service (not for incremental upgrades)."""
    name, wish = instance_name(fleet), profile.ingress
    annotations: dict[str, Any] = {
        "alb.ingress.kubernetes.io/scheme": wish.scheme,
        "alb.ingress.kubernetes.io/target-type": note(
            "ip", "Pods directly: no NodePort hop, and draining follows the pod."
        ),
        "alb.ingress.kubernetes.io/healthcheck-path": note(
            HEALTH_PATH, "Serve's proxy answers 200 only while it has routes and is not draining."
        ),
        "alb.ingress.kubernetes.io/healthcheck-interval-seconds": "5",
        "alb.ingress.kubernetes.io/healthcheck-timeout-seconds": "3",
        "alb.ingress.kubernetes.io/healthy-threshold-count": "2",
        "alb.ingress.kubernetes.io/unhealthy-threshold-count": "2",
        "alb.ingress.kubernetes.io/load-balancer-attributes": note(
            f"idle_timeout.timeout_seconds={wish.request_timeout_s},client_keep_alive.seconds=3600",
            "The default idle timeout of 60 s cuts every answer that is silent for a minute: "
            "long prompts, reasoning, and all that is not streamed.",
        ),
        "alb.ingress.kubernetes.io/target-group-attributes": note(
            f"deregistration_delay.timeout_seconds={min(3600, wish.request_timeout_s)},"
            "load_balancing.algorithm.type=least_outstanding_requests",
            "Open streams end before a target is dropped; requests differ too much in length "
            "for round robin.",
        ),
    }
    for kind in _ip_address_type(fleet).values():
        annotations["alb.ingress.kubernetes.io/ip-address-type"] = kind
    if wish.certificate_arn:
        annotations["alb.ingress.kubernetes.io/listen-ports"] = '[{"HTTPS": 443}]'
        annotations["alb.ingress.kubernetes.io/certificate-arn"] = wish.certificate_arn
    else:
        annotations["alb.ingress.kubernetes.io/listen-ports"] = '[{"HTTP": 80}]'
    if wish.scheme == "internet-facing":
        annotations["alb.ingress.kubernetes.io/inbound-cidrs"] = ",".join(profile.client_cidrs)
    rule: dict[str, Any] = {"host": wish.host} if wish.host else {}
    rule["http"] = {
        "paths": [
            {
                "path": "/",
                "pathType": "Prefix",
                "backend": {"service": {"name": f"{name}-serve-svc", "port": {"name": "serve"}}},
            }
        ]
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": {
            "name": name,
            "namespace": profile.namespace,
            "labels": labels(name),
            "annotations": annotations,
        },
        "spec": {"ingressClassName": "alb", "rules": [rule]},
    }


def ingress_class(fleet: Fleet, profile: ClusterProfile) -> list[dict[str, Any]]:
    """The IngressClass `alb` for EKS Auto Mode, whose own controller comes without one."""
    group = profile.instance_label_prefix
    return [
        {
            "apiVersion": f"{group}/v1",
            "kind": "IngressClassParams",
            "metadata": {"name": "alb"},
            "spec": {"scheme": profile.ingress.scheme, **_ip_address_type(fleet)},
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "IngressClass",
            "metadata": {"name": "alb"},
            "spec": {
                "controller": f"{group}/alb",
                "parameters": {"apiGroup": group, "kind": "IngressClassParams", "name": "alb"},
            },
        },
    ]


def gateway_api(fleet: Fleet, profile: ClusterProfile) -> list[dict[str, Any]]:
    """The GatewayClass of KubeRay's Gateway, for incremental upgrades.

    KubeRay writes the Gateway and the HTTPRoute itself, without these settings. So the settings are
    attached to the class (AWS Load Balancer Controller 3.5 or later: 3.0 to 3.4 have v1beta1 only).
    """
    attributes = {
        "deregistration_delay.timeout_seconds": str(min(3600, profile.ingress.request_timeout_s)),
        "load_balancing.algorithm.type": "least_outstanding_requests",
    }
    return [
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "GatewayClass",
            "metadata": {"name": GATEWAY_CLASS, "labels": PART_OF},
            "spec": {
                "controllerName": "gateway.k8s.aws/alb",
                "parametersRef": {
                    "group": "gateway.k8s.aws",
                    "kind": "LoadBalancerConfiguration",
                    "name": GATEWAY_CLASS,
                    "namespace": profile.namespace,
                },
            },
        },
        {
            "apiVersion": "gateway.k8s.aws/v1",
            "kind": "LoadBalancerConfiguration",
            "metadata": {
                "name": GATEWAY_CLASS,
                "namespace": profile.namespace,
                "labels": PART_OF,
            },
            "spec": {
                "scheme": note(
                    "internal", "KubeRay's Gateway has one plain HTTP listener: not for the open."
                ),
                **_ip_address_type(fleet),
                "loadBalancerAttributes": [
                    {
                        "key": "idle_timeout.timeout_seconds",
                        "value": str(profile.ingress.request_timeout_s),
                    }
                ],
                "defaultTargetGroupConfiguration": {"name": GATEWAY_CLASS},
            },
        },
        {
            "apiVersion": "gateway.k8s.aws/v1",
            "kind": "TargetGroupConfiguration",
            "metadata": {
                "name": GATEWAY_CLASS,
                "namespace": profile.namespace,
                "labels": PART_OF,
            },
            "spec": {
                "defaultConfiguration": {
                    "targetType": note("ip", "The default here is instance."),
                    "healthCheckConfig": {
                        "healthCheckPath": HEALTH_PATH,
                        "healthCheckInterval": 5,
                        "healthCheckTimeout": 3,
                        "healthyThresholdCount": 2,
                        "unhealthyThresholdCount": 2,
                    },
                    "targetGroupAttributes": [
                        {"key": key, "value": value} for key, value in attributes.items()
                    ],
                }
            },
        },
    ]


def network_policies(fleet: Fleet, profile: ClusterProfile) -> list[dict[str, Any]]:
    """Policies that open only the endpoint. Ports of Ray, models and metrics stay inside."""
    name = instance_name(fleet)
    everyone = {"matchLabels": labels(name)}

    def policy(suffix: str, selector: dict[str, Any], rules: list[Any]) -> dict[str, Any]:
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {
                "name": f"{name}-{suffix}",
                "namespace": profile.namespace,
                "labels": labels(name),
            },
            "spec": {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": rules},
        }

    def namespace(which: str) -> dict[str, Any]:
        return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": which}}}

    def ports(*numbers: int) -> list[dict[str, Any]]:
        return [{"protocol": "TCP", "port": number} for number in numbers]

    serving_roles = ["gateway"]
    if profile.upgrade.strategy == "NewClusterWithIncrementalUpgrade":
        serving_roles += ["gpu", "cpu"]
    return [
        policy(
            "internal",
            everyone,
            [
                note(
                    {"from": [{"podSelector": everyone}]},
                    "Ray and the models use ports of their own choice among each other.",
                ),
                note(
                    {
                        "from": [namespace(profile.monitoring_namespace)],
                        "ports": ports(8080, 44217, 44227),
                    },
                    "Metrics of Ray nodes, the autoscaler and the dashboard.",
                ),
            ],
        ),
        policy(
            "operator",
            {"matchLabels": labels(name, "head")},
            [
                note(
                    {
                        "from": [namespace(profile.operator_namespace)],
                        "ports": ports(8265, fleet.port),
                    },
                    "KubeRay hands over the Serve config and reads its status here.",
                )
            ],
        ),
        policy(
            "clients",
            {
                "matchLabels": labels(name),
                "matchExpressions": [
                    {"key": ROLE_LABEL, "operator": "In", "values": serving_roles}
                ],
            },
            [
                {
                    "from": [{"ipBlock": {"cidr": cidr}} for cidr in profile.client_cidrs],
                    "ports": ports(fleet.port),
                }
            ],
        ),
    ]

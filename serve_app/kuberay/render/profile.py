"""The cluster profile: names, machines, limits, and the upgrade strategy.

A profile is a YAML file with any of these settings. The defaults alone render manifests that work
on an EKS cluster made as docs/eks.md says.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from serve_app.config import yaml_files
from serve_app.config.settings import parse
from serve_app.errors import ConfigError
from serve_app.planner.pods import KEPT_CPU_M, KEPT_MEMORY_MIB

RAY_VERSION = "2.60.0"
"""The version of Ray in the image, by which KubeRay picks probes and features."""


def _a_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", text):
        raise ValueError(f"'{text}' is no name; use lower-case letters, digits and '-', 63 at most")
    return text


def _an_image(text: str) -> str:
    pinned = re.fullmatch(r"[^\s@]+(:[\w][\w.-]*|@sha256:[0-9a-f]{64})", text)
    if not pinned or text.endswith(":latest"):
        raise ValueError(f"'{text}' names no fixed version; write name:tag or name@sha256:…")
    return text


def _a_network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        raise ValueError(f"'{text}' is no network; write it as 10.0.0.0/16") from None


_Name = Annotated[str, AfterValidator(_a_name)]
"""The name of a Kubernetes object or namespace."""

_Image = Annotated[str, AfterValidator(_an_image)]
_Network = Annotated[str, AfterValidator(_a_network)]


class _Profile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SecretKey(_Profile):
    """One key of a Secret; the Secret itself is made outside of these manifests."""

    name: _Name
    """The Secret's name."""

    key: str = Field(min_length=1)
    """The key within it."""

    def value(self) -> dict[str, Any]:
        """Where a pod gets the value, as ``valueFrom`` has it."""
        return {"valueFrom": {"secretKeyRef": self.model_dump()}}


class Cache(_Profile):
    """The volume that keeps downloaded weights and compiled kernels between pods."""

    kind: Literal["pvc", "none"] = "pvc"
    """``none`` if every model streams from S3 (``load_format: runai_streamer``)."""

    claim: _Name = "model-cache"
    """Name of the PersistentVolumeClaim, which all fleets of a namespace share."""

    storage_class: _Name = "efs-sc"
    """Must offer ReadWriteMany: pods of every zone and of two clusters mount it at once."""

    size_gib: int = Field(default=1000, ge=1)
    """Requested size in GiB. EFS grows by itself and ignores it."""


class Redis(_Profile):
    """Where the head keeps its state, so that a lost head does not end the models."""

    address: str = Field(pattern=r"^(rediss?://)?(\[[\da-fA-F:]+\]|[^:/\s]+):\d+$")
    """``host:port`` or ``rediss://host:port`` of a Redis, Valkey or ElastiCache outside Ray."""

    password: SecretKey | None = None
    """Where its password is; None sends none."""


class Ingress(_Profile):
    """How clients reach the endpoint."""

    kind: Literal["alb", "none"] = "alb"
    """``alb`` renders an AWS load balancer; ``none`` leaves the way in to you."""

    scheme: Literal["internal", "internet-facing"] = "internal"
    """``internet-facing`` opens it to ``client_cidrs``, and needs a gateway with ``keys``."""

    public_without_keys: bool = False
    """Whether it may be ``internet-facing`` all the same where the gateway asks for no API keys."""

    host: str | None = None
    """The host name that requests must have; None takes any."""

    certificate_arn: str | None = None
    """ACM certificate; without one the load balancer listens on plain HTTP."""

    request_timeout_s: int = Field(default=900, ge=1, le=4000)
    """The load balancer's idle timeout: seconds that a response may stay silent, which a long
    non-streamed one does. AWS takes 4000 at most (its default is 60)."""


class Upgrade(_Profile):
    """What happens to the old pods when the cluster's spec changes."""

    strategy: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"] = "NewCluster"
    """``NewCluster`` needs every GPU twice for a while; the incremental one needs a surge and
    the Gateway API; ``None`` ignores spec changes until the RayService is made anew."""

    step_percent: int = Field(default=25, ge=1, le=100)
    """Share of the traffic that moves at once, in percent (incremental only)."""

    interval_s: int = Field(default=60, ge=1)
    """Seconds between two steps (incremental only)."""

    max_surge_percent: int = Field(default=50, ge=1, le=100)
    """Replicas that may exist beyond 100 %, in percent (incremental only)."""

    @model_validator(mode="after")
    def _step_within_surge(self) -> Upgrade:
        if self.step_percent > self.max_surge_percent:
            raise ValueError(
                f"step_percent is {self.step_percent}, above max_surge_percent "
                f"({self.max_surge_percent})"
            )
        return self


class Head(_Profile):
    """The head pod: control only, no GPU and no replica."""

    cpu: int = Field(default=4, ge=1)
    """CPU cores."""

    memory_gib: int = Field(default=16, ge=5)
    """Below 5 GiB the dashboard and the GCS end in OOM kills (kuberay#4287)."""


class GatewayPods(_Profile):
    """Each pod of the gateway's group holds one gateway replica and Serve's proxy."""

    memory_gib: int = Field(default=4, ge=2)
    """Memory of one pod, in GiB. Its CPU follows the gateway's ``num_cpus``."""


class ClusterProfile(_Profile):
    """The settings of ``--cluster profile.yaml``."""

    namespace: _Name = "serve-app"
    """The namespace of the RayService and all that belongs to it."""

    cluster_name: str = Field(default="serve-app", min_length=1)
    """The EKS cluster's name; Karpenter finds subnets, security groups and its role by it."""

    image: _Image = "serve-app:0.1.0"
    """The image of this repo's Dockerfile, with its registry."""

    karpenter: Literal["self-managed", "auto-mode"] = "self-managed"
    """Who starts nodes. Decides the prefix of instance labels and the kind of NodeClass."""

    default_accelerator: str | None = None
    """The accelerator of models that name none in ``resources.accelerator_type``."""

    instance_types: list[str] = []
    """EC2 types that GPU pods may use; empty allows every type with the accelerator. Narrow
    types make a model span several machines: 4 GPUs a machine for TP 4 and PP 2."""

    capacity_types: list[Literal["reserved", "on-demand", "spot"]] = ["reserved", "on-demand"]
    """A spot machine goes with two minutes' notice, which is less than a long answer."""

    zones: list[str] = []
    """Availability zones to stay in; empty leaves the choice to Karpenter."""

    max_gpus: int = Field(default=16, ge=0)
    """The NodePool's limit. An upgrade without downtime needs room for two clusters."""

    service_account: _Name = "serve-app"
    """The pods' service account, by which they get their role in AWS."""

    node_role: str | None = None
    """IAM role of the nodes that Karpenter starts; None takes the name that Karpenter's own guide
    gives it, or in Auto Mode the one of EKS' console."""

    role_arn: str | None = None
    """IAM role for IRSA; leave it out with EKS Pod Identity, which needs no annotation."""

    hf_token: SecretKey | None = SecretKey(name="hf-token", key="token")
    """Where the hub's token for gated models is; None needs no Secret."""

    keys: SecretKey | None = None
    """Where the API keys' file is that the gateway's ``keys`` ask for."""

    usage_db: SecretKey | None = None
    """Where the URL is that the gateway's ``usage_db`` asks for."""

    otlp_headers: SecretKey | None = None
    """Where the headers for the gateway's ``otlp_endpoint`` are, as the variable
    ``OTEL_EXPORTER_OTLP_HEADERS`` has them: ``Authorization=Basic%20…``."""

    cache: Cache = Cache()
    """The volume for weights and compiled kernels."""

    redis: Redis | None = None
    """The store of the head's state; with None a lost head restarts every model."""

    ingress: Ingress = Ingress()
    """The load balancer."""

    client_cidrs: list[_Network] = Field(
        default=["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"], min_length=1
    )
    """Networks that may reach the endpoint: the cluster's VPC at least, where the load balancer
    and the API server stand (eksctl's is 192.168.0.0/16). Every private one by default; on a
    cluster of IPv6 also the VPC's IPv6 network."""

    upgrade: Upgrade = Upgrade()
    """How a changed cluster takes the place of the old one."""

    head: Head = Head()
    """The head pod's size."""

    gateway: GatewayPods = GatewayPods()
    """The gateway pods' size."""

    replacement_s: int = Field(default=900, ge=0)
    """Seconds that a replica's replacement may take when its machine is drained: a new machine,
    the image, the weights, the engine (6.5 minutes seen for 15 GiB on a fresh g6e.2xlarge)."""

    operator_namespace: _Name = "kuberay-system"
    """Where KubeRay's operator runs, which must reach the head."""

    monitoring_namespace: _Name = "monitoring"
    """Where Prometheus runs, which must reach every pod."""

    reserved_cpu_m: int = Field(default=KEPT_CPU_M, ge=0)
    """CPU that a node's DaemonSets take, in thousandths of a core (CNI, kube-proxy, device
    plugin, DCGM exporter, log shipper)."""

    reserved_memory_mib: int = Field(default=KEPT_MEMORY_MIB, ge=0)
    """Memory that a node's DaemonSets take, in MiB."""

    @property
    def instance_label_prefix(self) -> str:
        """The one difference between Karpenter's own labels and EKS Auto Mode's."""
        return "karpenter.k8s.aws" if self.karpenter == "self-managed" else "eks.amazonaws.com"


def load_profile(path: Path | None) -> ClusterProfile:
    """Read a profile, or take the defaults.

    Raises:
        ConfigError: the file and the key, in one line.
    """
    if path is None:
        return ClusterProfile()
    value = yaml_files.read(path)
    if not isinstance(value, dict | None):
        raise ConfigError(f"{path}: a profile is a mapping of settings, such as 'max_gpus: 16'")
    return parse(ClusterProfile, value, str(path))

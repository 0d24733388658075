"""Rules for pods: do they fit each other, their limits, and a machine?"""

from __future__ import annotations

import math
import re

from serve_app.errors import ConfigError
from serve_app.kuberay.render.profile import RAY_VERSION
from serve_app.kuberay.validate.manifests import (
    CAPACITY_TYPE,
    EFA,
    GPU,
    HOW_QUANTITIES_ARE,
    INSTANCE_TYPE,
    Document,
    Manifests,
    Pods,
    amount,
    get,
    items,
    mapping,
    pods_of,
    required_values,
    whole,
)
from serve_app.kuberay.validate.rule import Found, check, fail, warn
from serve_app.planner import hardware
from serve_app.planner.hardware import GIB, MIB, Instance, with_accelerator
from serve_app.planner.vllm import memory

HEAD_MEMORY = 5 * GIB
"""Least memory of a head, in bytes."""

KARPENTER_LABELS = {"capacity-type", "nodepool", "initialized", "registered"}
"""The labels that exist under ``karpenter.sh/``. Labels of machines have another prefix."""

_DAEMONS_CPU_M, _DAEMONS_MIB = 300, 512
"""The least that a node's DaemonSets take: CNI, kube-proxy, device plugin, log shipper."""

_WORKER_MEMORY = 4 * GIB
"""Bytes of host memory that one GPU's worker fills while it loads: CUDA, Python, a shard."""


@check("head node")
def head(service: Document) -> Found:
    for pods in (p for p in pods_of(service) if p.is_head):
        told = mapping(pods.group, "rayStartParams").get("num-cpus"), pods.told.get("CPU")
        if "0" not in told:
            at = f"{pods.where}.rayStartParams.num-cpus"
            yield fail(at, 'must be "0": replicas must not run on the head')
        if pods.memory is None or pods.memory < HEAD_MEMORY:
            yield fail(
                f"{pods.container_at}.resources.limits.memory",
                "must be 5Gi or more: below, the dashboard and the GCS end in OOM kills "
                "(kuberay#4287)",
            )
        if pods.gpus:
            yield fail(
                f"{pods.container_at}.resources",
                "asks for a GPU, which the head never uses",
                f"remove {GPU}",
            )
        if "serve" not in pods.ports:
            yield fail(
                f"{pods.container_at}.ports",
                "has no port named 'serve'; without it KubeRay makes no Serve Service",
            )
        if "spot" in pods.affinity(CAPACITY_TYPE):
            yield fail(f"{pods.spec_at}.affinity", "allows spot machines for the head")
    if not get(service, "spec.excludeHeadPodFromServeSvc"):
        yield warn(
            "spec.excludeHeadPodFromServeSvc",
            "is not true: clients' streams go through the head, and end with it",
        )


@check("versions")
def images(service: Document) -> Found:
    version = str(get(service, "spec.rayClusterConfig.rayVersion"))
    if version != RAY_VERSION:
        yield fail(
            "spec.rayClusterConfig.rayVersion",
            f"is '{version}', but this serve_app runs Ray {RAY_VERSION}",
            f"set it to {RAY_VERSION}",
        )
    seen: dict[str, str] = {}
    for pods in pods_of(service):
        image, at = str(pods.container.get("image") or ""), f"{pods.container_at}.image"
        name, _, tag = image.rpartition(":")
        if "@sha256:" not in image and (not name or "/" in tag or tag == "latest"):
            yield fail(at, f"is '{image}'", "name a fixed tag, or a digest")
        elif re.match(r"(.*/)?rayproject/ray(-llm|-ml)?:\d", image) and not tag.startswith(version):
            yield fail(at, f"is '{image}', but rayVersion is {version}")
        else:
            seen.setdefault(image, at)
    if len(seen) > 1:
        first, second = list(seen)[:2]
        said = f"is '{second}', the head's '{first}'"
        yield fail(seen[second], said, "one image for all Ray nodes")


@check("references")
def references(service: Document, manifests: Manifests) -> Found:
    accounts = manifests.names("ServiceAccount") or {"default"}
    claims = manifests.names("PersistentVolumeClaim")
    for pods in pods_of(service):
        account = pods.spec.get("serviceAccountName")
        if account and account not in accounts:
            yield fail(f"{pods.spec_at}.serviceAccountName", f"'{account}' is in no manifest")
        for index, volume in enumerate(items(pods.spec, "volumes")):
            claim = get(volume, "persistentVolumeClaim.claimName")
            if claim and claim not in claims:
                at = f"{pods.spec_at}.volumes[{index}].persistentVolumeClaim.claimName"
                yield fail(at, f"'{claim}' is in no manifest")


@check("shared memory")
def shared_memory(pods: Pods) -> Found:
    """Is /dev/shm there, large enough for the GPUs, and small enough for the pod's memory?"""
    gpus, limit = pods.gpus, pods.memory
    queues = memory.shm_bytes(gpus) if gpus > 1 else 0
    mounts = items(pods.container, "volumeMounts")
    mount = next((m for m in mounts if m.get("mountPath") == "/dev/shm"), None)
    if mount is None:
        if queues:
            yield fail(
                f"{pods.container_at}.volumeMounts",
                f"does not mount /dev/shm: the container has 64 MiB, vLLM's queues between {gpus} "
                f"GPUs take {queues / GIB:.1f} GiB",
                "mount an emptyDir with medium: Memory there",
            )
        return
    volumes = items(pods.spec, "volumes")
    named = ((i, v) for i, v in enumerate(volumes) if v.get("name") == mount.get("name"))
    index, volume = next(named, (0, None))
    if volume is None:
        said = f"names the volume '{mount.get('name')}', which is not there"
        yield fail(f"{pods.container_at}.volumeMounts", said)
        return
    at = f"{pods.spec_at}.volumes[{index}].emptyDir"
    if get(volume, "emptyDir.medium") != "Memory":
        yield fail(f"{at}.medium", "of /dev/shm must be Memory")
    size = amount(get(volume, "emptyDir.sizeLimit"))
    if size is None:
        yield fail(
            f"{at}.sizeLimit",
            "of /dev/shm is missing: half of the machine's memory is nobody's limit",
        )
        return
    store = whole(mapping(pods.group, "rayStartParams").get("object-store-memory"))
    if queues and size < queues + store:
        beside = f" beside Ray's object store of {store / GIB:.1f}" if store else ""
        yield fail(
            f"{at}.sizeLimit",
            f"of /dev/shm is {size / GIB:.1f} GiB, but vLLM's queues between {gpus} GPUs take "
            f"{queues / GIB:.1f}{beside}",
            f"set it to {math.ceil((2 * queues + store) / GIB)}Gi: NCCL's segments come on top",
        )
    if limit is None or (pods.is_head and limit < HEAD_MEMORY):
        return  # the finding about the limit covers it
    if size >= limit:
        said = "of /dev/shm is not below the pod's memory limit, which counts it"
        yield fail(f"{at}.sizeLimit", said)
    elif limit - size < _WORKER_MEMORY * gpus:
        yield fail(
            f"{pods.container_at}.resources.limits.memory",
            f"leaves {(limit - size) / GIB:.0f} GiB beside /dev/shm; {gpus} workers need "
            f"{_WORKER_MEMORY * gpus // GIB} GiB while they load",
        )


@check("resources")
def resources(pods: Pods) -> Found:
    """Does Ray believe that the pod has the resources that Kubernetes grants it?"""
    at = f"{pods.container_at}.resources"
    for field, amounts in (("limits", pods.limits), ("requests", pods.requests)):
        for key, given in amounts.items():
            if amount(given) is None:
                yield fail(f"{at}.{field}.{key}", f"is '{given}'", HOW_QUANTITIES_ARE)
    if "memory" not in pods.limits:
        yield fail(f"{at}.limits.memory", "is missing; KubeRay tells Ray the memory by it")
    for device in (GPU, EFA):
        if pods.requests.get(device) != pods.limits.get(device):
            yield fail(at, f"asks for {device} in requests and limits differently")
    told = pods.told.get("GPU")
    if told is not None and whole(told) != pods.gpus:
        said = f"tells Ray of {told} GPUs, but the pod has {pods.gpus}"
        yield fail(f"{pods.where}.resources.GPU", said)
    if pods.is_head or not pods.gpus:
        return
    if not pods.accelerator:
        yield fail(
            f"{pods.where}.resources",
            "does not name accelerator_type: the autoscaler cannot start the first pod for a "
            "model that asks for a GPU type (kuberay#863)",
            'add "accelerator_type:L40S": "1"',
        )
    if pods.cores < pods.gpus:
        said = f"is below {pods.gpus}: each GPU's worker keeps a core busy"
        yield fail(f"{at}.requests.cpu", said)


@check("machines")
def machines(pods: Pods, manifests: Manifests) -> Found:
    """Is there a machine for this pod, and a NodePool that starts it?"""
    at = pods.spec_at
    for key in mapping(pods.spec, "nodeSelector"):
        prefix, _, name = str(key).partition("/")
        if prefix == "karpenter.sh" and name not in KARPENTER_LABELS:
            yield fail(
                f"{at}.nodeSelector.{key}",
                "is no label of Karpenter's; instance labels start with karpenter.k8s.aws/ "
                "(EKS Auto Mode: eks.amazonaws.com/)",
            )
    for kind in pods.affinity(CAPACITY_TYPE):
        if kind not in ("spot", "on-demand", "reserved"):
            said = f"names the capacity type '{kind}'"
            yield fail(f"{at}.affinity", said, "write spot, on-demand or reserved")
    if pods.is_head or not pods.gpus:
        return
    if not any(t.get("key") == GPU for t in items(pods.spec, "tolerations")):
        yield fail(f"{at}.tolerations", f"has none for {GPU}, the taint of GPU nodes")
        return
    types = pods.affinity(INSTANCE_TYPE)
    known = [hardware.instances()[t] for t in types if t in hardware.instances()]
    for name in types:
        if name not in hardware.instances():
            yield fail(f"{at}.affinity", f"names '{name}', which is no EC2 type with a GPU")
    if pods.accelerator:
        try:
            right = with_accelerator(pods.accelerator, "accelerator_type")
        except ConfigError as error:
            yield fail(f"{pods.where}.resources", f"names an unknown GPU: {error}")
            return
        if wrong := [i.name for i in known if i not in right]:
            yield fail(f"{at}.affinity", f"names {wrong[0]}, which has no {pods.accelerator}")
            return
    misfits = [_misfit(instance, pods) for instance in known]
    if known and all(misfits):
        said = f"fits on none of its machines: {misfits[-1]}"
        yield fail(f"{pods.container_at}.resources", said)
    efa = whole(pods.limits.get(EFA))
    for instance in known:
        if efa > instance.efa:
            yield fail(
                f"{pods.container_at}.resources.limits",
                f"asks for {efa} EFA adapters, but {instance.name} has {instance.efa}",
            )
    yield from _pools(pods, types, manifests)


def _misfit(instance: Instance, pods: Pods) -> str:
    """Why the pod does not fit on the machine; empty if it does."""
    gpus = pods.gpus
    if gpus > instance.gpus:
        return f"{gpus} GPUs, but {instance.name} has {instance.gpus}"
    if instance.gpus % gpus:
        return f"{gpus} GPUs do not divide the {instance.gpus} of {instance.name}"
    together = instance.gpus // gpus
    asked = [mapping(container, "resources.requests") for container in pods.containers]
    cpu = sum(amount(a.get("cpu")) or 0 for a in asked)
    host = sum(amount(a.get("memory")) or 0 for a in asked)
    cpu_there = (instance.allocatable_cpu_m - _DAEMONS_CPU_M) / 1000
    host_there = (instance.allocatable_memory_mib - _DAEMONS_MIB) * MIB
    beside = "beside its DaemonSets"
    if cpu > cpu_there:
        return f"{cpu:g} cores, but {instance.name} gives {cpu_there:g} {beside}"
    if host > host_there:
        gives = f"{host_there / GIB:.1f} GiB {beside}"
        return f"{host / GIB:.1f} GiB, but {instance.name} gives {gives}"
    if cpu * together > cpu_there or host * together > host_there:
        return f"{together} such pods would use its {instance.gpus} GPUs, but do not fit on one"
    return ""


_OTHER_KARPENTER = {
    "karpenter.k8s.aws": "eks.amazonaws.com",
    "eks.amazonaws.com": "karpenter.k8s.aws",
}


def _pools(pods: Pods, types: list[str], manifests: Manifests) -> Found:
    """Does a NodePool start machines that this pod accepts?"""
    for pool in manifests.node_pools:
        owner = str(get(pool, "spec.template.spec.nodeClassRef.group"))
        for key in mapping(pods.spec, "nodeSelector"):
            if str(key).startswith(f"{_OTHER_KARPENTER.get(owner, '?')}/instance-"):
                yield fail(
                    f"{pods.spec_at}.nodeSelector.{key}",
                    f"is a label of the other Karpenter: the NodePools' class is of {owner}",
                )
                return
    # A rule of its own reports a pool with a type that does not exist.
    pools = [
        (pool, names)
        for pool in manifests.node_pools
        if (names := required_values(pool, INSTANCE_TYPE)) is not None
        and all(name in hardware.instances() for name in names)
    ]
    if not pools or not types:
        return
    refusals = [_refusal(pool, names, types, pods) for pool, names in pools]
    if all(refusals):
        yield fail(pods.spec_at, f"is taken by no NodePool: {refusals[0]}")


def _refusal(pool: Document, names: list[str], types: list[str], pods: Pods) -> str:
    """Why the pool starts no machine for the pod; empty if it does."""
    name = f"NodePool '{get(pool, 'metadata.name')}'"
    if not set(types) & set(names):
        return f"{name} has none of {', '.join(types)}"
    wanted, offered = pods.affinity(CAPACITY_TYPE), required_values(pool, CAPACITY_TYPE)
    if wanted and offered and not set(wanted) & set(offered):
        return f"{name} offers only {', '.join(offered)} machines"
    tolerations = items(pods.spec, "tolerations")
    for taint in items(pool, "spec.template.spec.taints"):
        if not any(_tolerates(toleration, taint) for toleration in tolerations):
            return f"the taint {taint.get('key')} of {name} is not tolerated"
    return ""


def _tolerates(toleration: Document, taint: Document) -> bool:
    if toleration.get("key") not in (None, taint.get("key")):
        return False
    if toleration.get("effect") not in (None, taint.get("effect")):
        return False
    return toleration.get("operator") == "Exists" or toleration.get("value") == taint.get("value")

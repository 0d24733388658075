"""Do the pods fit each other, their limits, and any machine?"""

from __future__ import annotations

import re

from serve_app.kuberay.validate.reading import (
    CAPACITY_TYPE,
    EFA,
    GPU,
    INSTANCE_TYPE,
    KARPENTER_LABELS,
    Bundle,
    Document,
    Found,
    Warn,
    accelerator_of,
    affinity_values,
    byte_count,
    container_of,
    containers,
    cores,
    get,
    gpus_of,
    groups_of,
    is_quantity,
    is_token,
    items,
    mapping,
    required_values,
    resources,
    whole,
)
from serve_app.planner import hardware
from serve_app.planner.hardware import Instance, with_accelerator

HEAD_MEMORY = 5 * 2**30
"""Bytes that a head needs at the least."""

_DAEMONS_CPU_M, _DAEMONS_MIB = 300, 512
"""What a node's DaemonSets take at the least: CNI, kube-proxy, device plugin, log shipper."""

_WORKER_MEMORY = 4 * 2**30
"""Bytes of host memory that one GPU's worker fills while it loads: CUDA, Python, a shard."""


def head(document: Document) -> Found:
    where = "spec.rayClusterConfig.headGroupSpec"
    head = mapping(document, "spec.rayClusterConfig.headGroupSpec")
    container = container_of(head)
    told = mapping(head, "rayStartParams").get("num-cpus"), mapping(head, "resources").get("CPU")
    if "0" not in told:
        yield f"{where}.rayStartParams.num-cpus", 'must be "0": replicas must not run on the head'
    memory = byte_count(get(container, "resources.limits.memory"))
    if memory is None or memory < HEAD_MEMORY:
        yield (
            f"{where}.template.spec.containers[0].resources.limits.memory",
            "must be 5Gi or more; the dashboard and the GCS end in OOM kills below (kuberay#4287)",
        )
    if gpus_of(head):
        yield (
            f"{where}.template.spec.containers[0].resources",
            "asks for a GPU, which the head never uses",
        )
    if "serve" not in {p.get("name") for p in items(container, "ports")}:
        yield (
            f"{where}.template.spec.containers[0].ports",
            "has no port named 'serve'; without it KubeRay makes no Serve Service",
        )
    if "spot" in affinity_values(head, CAPACITY_TYPE):
        yield f"{where}.template.spec.affinity", "allows spot machines for the head"
    if not get(document, "spec.excludeHeadPodFromServeSvc"):
        yield (
            "spec.excludeHeadPodFromServeSvc",
            Warn("is not true: clients' streams go through the head, and end with it"),
        )


def images(document: Document) -> Found:
    images: dict[str, str] = {}
    for where, group in groups_of(document):
        image = str(container_of(group).get("image") or "")
        path = f"{where}.template.spec.containers[0].image"
        name, _, tag = image.rpartition(":")
        version = str(get(document, "spec.rayClusterConfig.rayVersion"))
        if "@sha256:" not in image and (not name or "/" in tag or tag == "latest"):
            yield path, f"is '{image}'; name a fixed tag, or a digest"
        elif re.match(r"(.*/)?rayproject/ray(-llm|-ml)?:\d", image) and not tag.startswith(version):
            yield path, f"is '{image}', but rayVersion is {version}"
        else:
            images.setdefault(image, path)
    if len(images) > 1:
        first, second = list(images)[:2]
        yield images[second], f"is '{second}', the head's '{first}'; one image for all Ray nodes"


def references(document: Document, bundle: Bundle) -> Found:
    yield from _redis_password(document, bundle)
    for where, group in groups_of(document):
        spec = mapping(group, "template.spec")
        account = spec.get("serviceAccountName")
        if account and account not in bundle.names.get("ServiceAccount", {"default"}):
            yield f"{where}.template.spec.serviceAccountName", f"'{account}' is in no manifest"
        for index, volume in enumerate(items(spec, "volumes")):
            claim = get(volume, "persistentVolumeClaim.claimName")
            if claim and claim not in bundle.names.get("PersistentVolumeClaim", set()):
                yield (
                    f"{where}.template.spec.volumes[{index}].persistentVolumeClaim.claimName",
                    f"'{claim}' is in no manifest",
                )
        for index, env in enumerate(items(container_of(group), "env")):
            path = f"{where}.template.spec.containers[0].env[{index}]"
            secret = get(env, "valueFrom.secretKeyRef.name")
            if secret and bundle.secrets and secret not in bundle.secrets:
                yield f"{path}.valueFrom.secretKeyRef.name", f"'{secret}' is in no manifest"
            if is_token(str(env.get("name")), str(env.get("value") or "")):
                yield (
                    f"{path}.value",
                    f"puts the secret {env['name']} into the manifest; use valueFrom.secretKeyRef",
                )


def _redis_password(document: Document, bundle: Bundle) -> Found:
    where = "spec.rayClusterConfig.gcsFaultToleranceOptions.redisPassword"
    if get(document, f"{where}.value"):
        yield f"{where}.value", "puts a secret into the manifest; use valueFrom.secretKeyRef"
    name = get(document, f"{where}.valueFrom.secretKeyRef.name")
    if name and bundle.secrets and name not in bundle.secrets:
        yield f"{where}.valueFrom.secretKeyRef.name", f"'{name}' is in no manifest"


def pod(where: str, group: Document) -> Found:
    """Memory, shared memory and accelerators of one kind of pod."""
    container = container_of(group)
    path = f"{where}.template.spec.containers[0]"
    memory = byte_count(get(container, "resources.limits.memory"))
    if memory is None:
        yield f"{path}.resources.limits.memory", "is missing; KubeRay tells Ray the memory by it"
    mount = next(
        (m for m in items(container, "volumeMounts") if m.get("mountPath") == "/dev/shm"), None
    )
    if mount is not None:
        index, volume = next(
            (
                (i, v)
                for i, v in enumerate(items(group, "template.spec.volumes"))
                if v.get("name") == mount.get("name")
            ),
            (0, None),
        )
        volume_path = f"{where}.template.spec.volumes[{index}]"
        if volume is None:
            yield (
                f"{path}.volumeMounts",
                f"names the volume '{mount.get('name')}', which is not there",
            )
            return
        size = byte_count(get(volume, "emptyDir.sizeLimit"))
        if get(volume, "emptyDir.medium") != "Memory":
            yield f"{volume_path}.emptyDir.medium", "of /dev/shm must be Memory"
        if size is None:
            yield (
                f"{volume_path}.emptyDir.sizeLimit",
                "of /dev/shm is missing: half of the machine's memory is nobody's limit",
            )
        elif "groupName" not in group and (memory or 0) < HEAD_MEMORY:
            pass  # said of the head already
        elif memory is not None and size >= memory:
            yield (
                f"{volume_path}.emptyDir.sizeLimit",
                "of /dev/shm is not below the pod's memory limit, which counts it",
            )
        elif memory is not None and memory - size < _WORKER_MEMORY * gpus_of(group):
            yield (
                f"{path}.resources.limits.memory",
                f"leaves {(memory - size) / 2**30:.0f} GiB beside /dev/shm; {gpus_of(group)} "
                f"workers need {_WORKER_MEMORY * gpus_of(group) // 2**30} GiB while they load",
            )
        elif gpus_of(group) > 1 and size < 2 * 2**30 * gpus_of(group):
            yield (
                f"{volume_path}.emptyDir.sizeLimit",
                f"of /dev/shm is too small for {gpus_of(group)} GPUs: NCCL and vLLM need 2Gi for "
                "each",
            )
    elif gpus_of(group) > 1:
        yield (
            f"{path}.volumeMounts",
            "does not mount /dev/shm; tensor parallelism needs more than the default 64 MB",
        )
    limits, requests = resources(group, "limits"), resources(group, "requests")
    for field, amounts in (("limits", limits), ("requests", requests)):
        for key, amount in amounts.items():
            if not is_quantity(amount):
                yield f"{path}.resources.{field}.{key}", f"is '{amount}', which is no quantity"
                return
    for device in (GPU, EFA):
        if requests.get(device) != limits.get(device):
            yield f"{path}.resources", f"asks for {device} in requests and limits differently"
    told = mapping(group, "resources").get("GPU")
    if told is not None and whole(told) != gpus_of(group):
        yield (
            f"{where}.resources.GPU",
            f"tells Ray of {told} GPUs, but the pod has {gpus_of(group)}",
        )
    if (
        gpus_of(group)
        and "groupName" in group
        and not any(key.startswith("accelerator_type:") for key in mapping(group, "resources"))
    ):
        yield (
            f"{where}.resources",
            "does not name accelerator_type: the autoscaler cannot start the first pod for a "
            'model that asks for a GPU type; add "accelerator_type:L40S": "1" (kuberay#863)',
        )


def machines(where: str, group: Document, bundle: Bundle) -> Found:
    """Is there a machine for this pod, and a NodePool that makes it?"""
    path = f"{where}.template.spec"
    selector = mapping(group, "template.spec.nodeSelector")
    for key in selector:
        prefix, _, name = key.partition("/")
        if prefix == "karpenter.sh" and name not in KARPENTER_LABELS:
            yield (
                f"{path}.nodeSelector.{key}",
                "is no label of Karpenter's; instance labels start with karpenter.k8s.aws/ "
                "(EKS Auto Mode: eks.amazonaws.com/)",
            )
    for kind in affinity_values(group, CAPACITY_TYPE):
        if kind not in ("spot", "on-demand", "reserved"):
            yield f"{path}.affinity", f"names the capacity type '{kind}'; spot, on-demand, reserved"
    gpus = gpus_of(group)
    if not gpus or "groupName" not in group:
        return
    if not any(t.get("key") == GPU for t in items(group, "template.spec.tolerations")):
        yield f"{path}.tolerations", f"has none for {GPU}, the taint of GPU nodes"
        return
    if cores(container_of(group), "requests") < gpus:
        yield (
            f"{path}.containers[0].resources.requests.cpu",
            f"is below {gpus}: each GPU's worker keeps a core busy",
        )
    types = affinity_values(group, INSTANCE_TYPE)
    known = [hardware.instances()[t] for t in types if t in hardware.instances()]
    for name in types:
        if name not in hardware.instances():
            yield f"{path}.affinity", f"names '{name}', which is no EC2 type with a GPU"
    accelerator = accelerator_of(group)
    if accelerator and known:
        right = {i.name for i in with_accelerator(accelerator, where)}
        wrong = [i.name for i in known if i.name not in right]
        if wrong:
            yield f"{path}.affinity", f"names {wrong[0]}, which has no {accelerator}"
            return
    reasons = [(i, _misfit(i, group)) for i in known]
    if known and all(reason for _, reason in reasons):
        instance, reason = reasons[-1]
        yield f"{path}.containers[0].resources", f"fits on none of its machines: {reason}"
    efa = whole(resources(group, "limits").get(EFA))
    for instance in known:
        if efa > instance.efa:
            yield (
                f"{path}.containers[0].resources.limits",
                f"asks for {efa} EFA adapters, but {instance.name} has {instance.efa}",
            )
    yield from _pools(path, group, types, bundle)


def _misfit(instance: Instance, group: Document) -> str:
    """Why the pod does not fit on the machine, or nothing."""
    gpus = gpus_of(group)
    if gpus > instance.gpus:
        return f"{gpus} GPUs, but {instance.name} has {instance.gpus}"
    pods = instance.gpus // gpus
    cpu = sum(cores(c, "requests") for c in containers(group))
    memory = sum(byte_count(get(c, "resources.requests.memory")) or 0 for c in containers(group))
    if instance.gpus % gpus:
        return f"{gpus} GPUs do not divide the {instance.gpus} of {instance.name}"
    cpu_there = (instance.allocatable_cpu_m - _DAEMONS_CPU_M) / 1000
    memory_there = (instance.allocatable_memory_mib - _DAEMONS_MIB) * 2**20
    beside = "beside its DaemonSets"
    if cpu > cpu_there:
        return f"{cpu:g} cores, but {instance.name} gives {cpu_there:g} {beside}"
    if memory > memory_there:
        asked, gives = memory / 2**30, memory_there / 2**30
        return f"{asked:.1f} GiB, but {instance.name} gives {gives:.1f} GiB {beside}"
    if cpu * pods > cpu_there or memory * pods > memory_there:
        return f"{pods} such pods would use its {instance.gpus} GPUs, but do not fit on one"
    return ""


def _pools(path: str, group: Document, types: list[str], bundle: Bundle) -> Found:
    """Does a NodePool of the bundle make machines that this pod accepts?"""
    # A pool with a type that does not exist is told of on its own.
    pools = [
        p
        for p in bundle.node_pools
        if (names := required_values(p, INSTANCE_TYPE)) is not None
        and all(name in hardware.instances() for name in names)
    ]
    selector = mapping(group, "template.spec.nodeSelector")
    for pool in bundle.node_pools:
        owner = str(get(pool, "spec.template.spec.nodeClassRef.group"))
        other = {"karpenter.k8s.aws": "eks.amazonaws.com", "eks.amazonaws.com": "karpenter.k8s.aws"}
        for key in selector:
            if key.startswith(f"{other.get(owner, '?')}/instance-"):
                yield (
                    f"{path}.nodeSelector.{key}",
                    f"is a label of the other Karpenter: the NodePools' class is of {owner}",
                )
                return
    if not pools or not types:
        return
    tolerated = items(group, "template.spec.tolerations")
    reasons = []
    for pool in pools:
        name = get(pool, "metadata.name")
        common = set(types) & set(required_values(pool, INSTANCE_TYPE) or [])
        if not common:
            reasons.append(f"NodePool '{name}' has none of {', '.join(types)}")
            continue
        wanted = affinity_values(group, CAPACITY_TYPE)
        offered = required_values(pool, CAPACITY_TYPE)
        if wanted and offered and not set(wanted) & set(offered):
            reasons.append(f"NodePool '{name}' offers only {', '.join(offered)} machines")
            continue
        taints = items(pool, "spec.template.spec.taints")
        missing = [t for t in taints if not any(_tolerates(x, t) for x in tolerated)]
        if missing:
            reasons.append(f"the taint {missing[0].get('key')} of NodePool '{name}' not tolerated")
            continue
        return
    yield f"{path}", f"is taken by no NodePool: {reasons[0]}"


def _tolerates(toleration: Document, taint: Document) -> bool:
    if toleration.get("key") not in (None, taint.get("key")):
        return False
    if toleration.get("effect") not in (None, taint.get("effect")):
        return False
    return toleration.get("operator") == "Exists" or toleration.get("value") == taint.get("value")

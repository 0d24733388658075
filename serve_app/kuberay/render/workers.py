"""Worker groups, from the models: a pod's GPUs, its possible machines, and the number of pods.

One pod holds one replica, or one pipeline stage of it where a replica spans machines; or all
replicas that share its one GPU. Pods of the same shape form one worker group, whatever models they
serve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from serve_app.config.document import Fleet
from serve_app.config.settings import GatewayConfig, ModelConfig
from serve_app.errors import ConfigError
from serve_app.kuberay.render.profile import ClusterProfile
from serve_app.planner import hardware, pods, shares, swap, together
from serve_app.planner.hardware import Instance, with_accelerator

OBJECT_STORE_GIB = 1
"""Ray's object store in each pod. Ray's default is 30 % of memory; tokens never go there."""

SPARE = 1
"""Replicas that a group has room for beyond those that its models ask for. A draining pod counts
until it is gone, and waits for its replacement to run. Without room for the replacement both would
wait for the deadline."""

_SHM_PER_GPU_GIB = 4
"""/dev/shm for one tensor-parallel rank: NCCL's and vLLM's queues, with room to spare."""


@dataclass(frozen=True)
class WorkerShape:
    """The pods that one replica needs.

    ``instance_types`` are those that a pod fits on, the smallest first. ``pods_per_replica`` is
    above 1 for a replica that spans machines.
    """

    accelerator: str
    gpus_per_pod: int
    pods_per_replica: int
    instance_types: tuple[str, ...]


@dataclass
class WorkerGroup:
    """Pods of one kind. CPU in cores, memory in GiB."""

    name: str
    role: str
    """``gateway``, ``gpu`` or ``cpu``; a pod label, and a label of the Ray node."""

    cpu: int
    """Cores that Ray may give to actors."""

    memory_gib: int
    min_pods: int = 0
    max_pods: int = 0
    shm_gib: int = 1
    shape: WorkerShape | None = None

    @property
    def gpus(self) -> int:
        return self.shape.gpus_per_pod if self.shape else 0

    @property
    def efa(self) -> int:
        """A pod's EFA adapters: its share of the machine's if a replica spans machines, else 0."""
        if self.shape is None or self.shape.pods_per_replica == 1:
            return 0
        machine = hardware.instances()[self.shape.instance_types[0]]
        return machine.efa * self.gpus // machine.gpus

    @property
    def spans_machines(self) -> bool:
        return bool(self.shape and self.shape.pods_per_replica > 1)


def sizes_of(where: str, model: ModelConfig) -> tuple[int, int, int]:
    """The GPUs of a tensor-parallel group, a rank's groups (stages), and a replica's ranks.

    Raises:
        ConfigError: engine arguments that cannot be placed.
    """
    try:
        place = shares.placed(model)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return math.ceil({**place.shared, **place.stage}["GPU"]), place.stages, place.ranks


def shape_of(where: str, model: ModelConfig, profile: ClusterProfile) -> WorkerShape:
    """The pods that one replica of ``model`` needs.

    A replica stays on one machine if any allowed type has enough GPUs. Else every pipeline stage
    gets a machine, because tensor-parallel traffic must not leave a machine.

    Raises:
        ConfigError: no accelerator is named, or no allowed type can hold the model.
    """
    accelerator = model.resources.accelerator_type or profile.default_accelerator
    if accelerator is None:
        raise ConfigError(
            f"{where}: resources.accelerator_type is missing; name a GPU (L40S, H100 …) there, or "
            "default_accelerator in the cluster profile"
        )
    instances = with_accelerator(accelerator, where)
    if profile.instance_types:
        unknown = [name for name in profile.instance_types if name not in hardware.instances()]
        if unknown:
            raise ConfigError(f"{where}: instance_types: '{unknown[0]}' is no EC2 type with a GPU")
        instances = tuple(i for i in instances if i.name in profile.instance_types)
        if not instances:
            raise ConfigError(
                f"{where}: no instance type of the profile has an {accelerator} "
                f"(instance_types: {', '.join(profile.instance_types)})"
            )
    stage, pp, dp = sizes_of(where, model)
    largest = max(i.gpus for i in instances)
    # GPUs of one pod, the most first: the whole replica, a data-parallel rank, a stage.
    splits = ((stage * pp * dp, 1), (stage * pp, dp), (stage, pp * dp))
    gpus, of_replica = next((split for split in splits if split[0] <= largest), (0, 0))
    if not gpus:
        raise ConfigError(
            f"{where}: a replica takes {stage * pp * dp} GPUs ({stage} that must share a machine, "
            f"pipeline {pp}, data {dp}), but the largest {accelerator} machine has {largest}; set "
            f"engine.tensor_parallel_size to {largest} at most and engine.pipeline_parallel_size "
            "to the number of machines"
        )
    # A size that does not divide the machine's GPUs would leave some that nothing can use.
    whole = [i for i in instances if i.gpus % gpus == 0]
    if not whole:
        sizes = " or ".join(map(str, sorted({i.gpus for i in instances})))
        raise ConfigError(
            f"{where}: a pod with {gpus} GPUs leaves some of a machine with {accelerator} that "
            f"nothing can use: it has {sizes}; choose engine.tensor_parallel_size so that it "
            "divides them"
        )
    fitting = tuple(
        i for i in whole
        if pods.fits(i, gpus, [model], profile.reserved_cpu_m, profile.reserved_memory_mib)
    )  # fmt: skip
    if not fitting:
        cores = pods.cpus(model, gpus)
        raise ConfigError(
            f"{where}: no {accelerator} machine holds a pod with {gpus} GPU{'s' * (gpus > 1)}, "
            f"{cores} cores and {pods.memory_gib(model, gpus, cores)} GiB; {_knobs(model)}"
        )
    return WorkerShape(accelerator, gpus, of_replica, tuple(i.name for i in fitting))


def _knobs(model: ModelConfig) -> str:
    """What to do about a pod that is larger than its GPUs make it."""
    if group := model.resources.swap_group:
        return f"take models out of swap group '{group}'"
    knobs = "resources.num_cpus or resources.memory_gib"
    return f"lower {knobs}" if model.frontends == "auto" else f"lower frontends, {knobs}"


def groups_of(fleet: Fleet, profile: ClusterProfile) -> list[WorkerGroup]:
    """Every worker group of the RayService, in a stable order: gateway, CPU, then GPU shapes.

    New shapes come last: appending a group is the only change of groups that KubeRay makes in
    place.

    Raises:
        ConfigError: a model that fits on no machine, or gateways without a number.
    """
    groups: list[WorkerGroup] = []
    if fleet.gateway is not None:
        groups.append(_gateway_group(str(fleet.path), fleet.gateway, profile))
    on_cpu = {n: m for n, m in _by_pod(fleet).items() if m.resources.device == "cpu"}
    if on_cpu:
        groups.append(_cpu_group(on_cpu))
    alike: dict[tuple[str, int, int], list[tuple[str, WorkerShape]]] = {}
    for name, model in _by_pod(fleet).items():
        if name not in on_cpu:
            shape = shape_of(f"{fleet.path}: application '{name}'", model, profile)
            key = (shape.accelerator, shape.gpus_per_pod, shape.pods_per_replica)
            alike.setdefault(key, []).append((name, shape))
    groups += [_gpu_group(members, fleet, profile) for members in alike.values()]
    return groups


def _by_pod(fleet: Fleet) -> dict[str, ModelConfig]:
    """The models; of those of a swap group, which have one pod, the first with all they need."""
    found = {n: m for n, m in fleet.models.items() if not m.resources.swap_group}
    for members in swap.groups(fleet.models).values():
        found[next(iter(members))] = pods.of_group(members)
    return {name: found[name] for name in fleet.models if name in found}


def _gpu_group(
    members: list[tuple[str, WorkerShape]], fleet: Fleet, profile: ClusterProfile
) -> WorkerGroup:
    """The group for models of one pod shape, on machines that all of them fit on."""
    shape = members[0][1]
    instances = hardware.instances()
    least, most = (_shared(members, fleet, which) for which in (0, 1))
    types = tuple(
        t
        for t in shape.instance_types
        if all(t in m.instance_types for _, m in members)
        and all(_holds(instances[t], pod, fleet, profile) for pod in most)
    )
    if not types and most:
        fullest = max(most, key=lambda pod: len(pod.parts))
        names = ", ".join(part.name for part in fullest.parts)
        raise ConfigError(
            f"{fleet.path}: no {shape.accelerator} machine has cores and memory for what shares "
            f"its GPU: {names}; lower resources.num_cpus or memory_gib, or give larger parts"
        )
    if not types:
        names = ", ".join(f"'{name}'" for name, _ in members)
        raise ConfigError(f"{fleet.path}: no {shape.accelerator} machine fits each of {names}")
    if shape.pods_per_replica > 1:
        # The machines of a replica that spans several must be alike.
        types = types[:1]
    shape = replace(shape, instance_types=types)
    cpu, memory = pods.share(
        hardware.instances()[types[0]],
        shape.gpus_per_pod,
        profile.reserved_cpu_m,
        profile.reserved_memory_mib,
    )
    name = f"{shape.accelerator.lower()}-x{shape.gpus_per_pod}"
    group = WorkerGroup(
        name=f"{name}-{shape.pods_per_replica}nodes" if shape.pods_per_replica > 1 else name,
        role="gpu",
        cpu=cpu,
        memory_gib=memory,
        shm_gib=OBJECT_STORE_GIB + _SHM_PER_GPU_GIB * shape.gpus_per_pod,
        shape=shape,
    )
    of_pod = _by_pod(fleet)
    for name, _ in members:
        if of_pod[name].resources.part_of_gpu:
            continue
        fewest, largest = of_pod[name].replica_range
        group.min_pods += fewest * shape.pods_per_replica
        group.max_pods += largest * shape.pods_per_replica
    group.min_pods += len(least)
    group.max_pods += at_most(most)
    group.max_pods += SPARE * shape.pods_per_replica
    return group


def _shared(
    members: list[tuple[str, WorkerShape]], fleet: Fleet, which: int
) -> list[together.Shared]:
    """The GPUs of the models with parts of one, at their fewest (0) or most (1) replicas."""
    return packed(
        (fleet.models[name], name, fleet.models[name].replica_range[which]) for name, _ in members
    )


def packed(models: Iterable[tuple[ModelConfig, str, int]]) -> list[together.Shared]:
    """The GPUs that so many replicas of these models share; models with whole ones need none."""
    parts: list[together.Part] = []
    for model, name, replicas in models:
        if setting := model.resources.part_of_gpu:
            parts += [together.Part(name, shares.about(model), setting)] * replicas
    return together.packed(parts)


def at_most(shared: list[together.Shared]) -> int:
    """The most pods that Serve uses for these parts.

    It takes pods in turn, and a new one only where none has room: then any two hold more than one
    GPU's worth together.
    """
    parts = [part.fraction for gpu in shared for part in gpu.parts]
    return max(len(shared), min(len(parts), math.ceil(round(2 * sum(parts), 4)) - 1))


def _holds(instance: Instance, pod: together.Shared, fleet: Fleet, profile: ClusterProfile) -> bool:
    """Whether a pod on the machine has cores and memory for all replicas that share its GPU."""
    models = [fleet.models[part.name] for part in pod.parts]
    return pods.fits(instance, 1, models, profile.reserved_cpu_m, profile.reserved_memory_mib)


def _gateway_group(where: str, gateway: GatewayConfig, profile: ClusterProfile) -> WorkerGroup:
    try:
        count = gateway.pods
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    cores = math.ceil(gateway.num_cpus) or 1
    return WorkerGroup(
        name="gateway",
        role="gateway",
        cpu=cores,
        memory_gib=profile.gateway.memory_gib,
        min_pods=count,
        max_pods=count + SPARE,
        shm_gib=OBJECT_STORE_GIB + 1,
    )


def _cpu_group(models: dict[str, ModelConfig]) -> WorkerGroup:
    """One group of CPU pods, each large enough for the most demanding model."""
    least = sum(model.replica_range[0] for model in models.values())
    most = sum(model.replica_range[1] for model in models.values())
    cores = max(pods.own_cpus(model) for model in models.values())
    memory = max(
        math.ceil(model.resources.memory_gib or 8) + pods.front_ends_gib(model, cores, 0)
        for model in models.values()
    )
    return WorkerGroup(
        name="cpu",
        role="cpu",
        cpu=max(4, cores + 1),
        memory_gib=memory + pods.BASE_GIB,
        min_pods=least,
        max_pods=most + SPARE,
        shm_gib=OBJECT_STORE_GIB + 1,
    )

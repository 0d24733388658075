"""Where a model's GPUs come from: one placement-group bundle for each pipeline stage.

vLLM's tensor-parallel ranks communicate at every layer, so they must share a node. Its pipeline
stages may be on different nodes. Ray has no placement strategy for that, but Ray never splits a
bundle, its unit of placement, between nodes. So a replica asks for one bundle of
``tensor_parallel_size`` GPUs for each stage, with the strategy PACK: all stages go to one node if
one has room, else to as few as possible, and no tensor-parallel group spans nodes. Ray reserves all
bundles or none, in the order of the requests. Until then the placement group is pending, which is
what a cluster autoscaler acts on.

A replica with a part of a GPU has no placement group: its own actor takes the fraction, and Ray
fills a node's GPUs one after the other.

vLLM itself expects bundles of one GPU; :mod:`serve_app.replica.executor` makes it take ours.
Alternatives and measurements: docs/decisions-placement.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from serve_app.config.engine_args import SIZES
from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError

STAGES_ENV = "SERVE_APP_STAGE_BUNDLES"
"""Environment variable of an engine: the bundle index of each stage, in order (``0,2,1``)."""

_IN_PROCESS = ("mp", "uni")
_EPSILON = 0.001  # Ray's convention for "on a node that has this resource"


SWAP_GROUP_UTILIZATION = 0.85
"""``gpu_memory_utilization`` of a member of a swap group, where it says none: vLLM's default leaves
no room for what those that sleep keep on the GPU."""


@dataclass(frozen=True)
class Placement:
    """The resources that each replica of one model reserves, and Serve's options for them.

    ``head`` is a replica's first bundle, in which the replica itself and pipeline stage 0 run;
    ``stage`` is each of the ``stages - 1`` others. Resources have Ray's names; memory is in bytes.
    """

    head: Mapping[str, float]
    stage: Mapping[str, float]
    stages: int = 1
    ranks: int = 1
    """Data-parallel ranks: a gang of as many replicas, placed and restarted together."""

    in_process: bool = False
    """Whether the replica's own process tree uses the GPUs (vLLM's ``mp`` or ``uni`` executor)."""

    shared: Mapping[str, float] = field(default_factory=dict)
    """What a replica shares with the others of its swap group; not in its own bundles."""

    engine_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Engine arguments that the placement implies, where the config does not set them."""

    @property
    def bundles(self) -> list[dict[str, float]]:
        """One replica's bundles, stage 0 first."""
        return [dict(self.head), *(dict(self.stage) for _ in range(self.stages - 1))]

    @property
    def uses_group(self) -> bool:
        """Whether a replica needs a placement group. Else its actor holds the resources."""
        return bool(self.stage.get("GPU")) and not self.in_process

    @property
    def alone(self) -> Placement:
        """The placement if no other model shared its GPU."""
        return replace(self, head={**self.head, **self.shared})

    def options(self) -> dict[str, Any]:
        """Options for ``serve.deployment(...).options(**)``."""
        actor: dict[str, Any] = {
            "num_cpus": self.head.get("CPU", 0),
            "num_gpus": 0 if self.uses_group else self.head.get("GPU", 0),
        }
        if "memory" in self.head:
            actor["memory"] = self.head["memory"]
        types = {name: amount for name, amount in self.head.items() if name.startswith(TYPE)}
        if types and not self.uses_group:
            actor["resources"] = types
        options: dict[str, Any] = {"ray_actor_options": actor}
        if self.uses_group:
            options["placement_group_bundles"] = self.bundles
        if self.ranks > 1:
            options["gang_scheduling_config"] = {
                "gang_size": self.ranks,
                "gang_placement_strategy": "PACK",
                "runtime_failure_policy": "RESTART_GANG",
            }
        elif self.uses_group:
            options["placement_group_strategy"] = "PACK"
        return options

    def __str__(self) -> str:
        """The needed resources, to be put into a sentence."""
        gpus = self.head.get("GPU", 0)
        groups = self.ranks * self.stages
        text = f"{gpus:g}{type_of(self.head)} GPU{'s' * (gpus > 1)}"
        if 0 < gpus < 1:
            text = f"{gpus:g} of {a_gpu(self.head)}"
        if not gpus:
            text = "a node"
        elif groups == 1:
            text += " on one node"
        else:
            text = f"{groups} groups of {text}, each group on one node"
        rest = [f"{self.head['CPU']:g} CPU"] if self.head.get("CPU") else []
        if "memory" in self.head:
            rest.append(f"{self.head['memory'] / 2**30:g} GiB of memory")
        return f"{text} with {' and '.join(rest)}" if rest else text


TYPE = "accelerator_type:"
"""Prefix of the resource by which Ray marks a node's type of GPU."""


def type_of(resources: Mapping[str, float]) -> str:
    """The type of GPU with a space before it, or an empty string."""
    return next((f" {name[len(TYPE) :]}" for name in resources if name.startswith(TYPE)), "")


def a_gpu(resources: Mapping[str, float]) -> str:
    """One GPU of the type, with its article."""
    kind = type_of(resources)
    article = "an" if kind[1:2] in {*"AHLR"} else "a"
    return f"{article}{kind} GPU"


def of(config: ModelConfig, share: float | None = None) -> Placement:
    """The placement that a model's engine arguments and resources ask for.

    Args:
        share: the fraction of a GPU that ``gpu_memory_gib`` is, by
            :func:`serve_app.planner.shares.fraction`. Without it the whole GPU stands for it.

    Raises:
        ConfigError: an executor or a data-parallel mode for which there is no placement.
    """
    engine = config.engine
    _refuse_other_launchers(engine)
    if "VLLM_RAY_BUNDLE_INDICES" in config.env:
        raise ConfigError("env.VLLM_RAY_BUNDLE_INDICES is not yours to set: Ray places the ranks")
    resources = config.resources
    stages = config.pipeline_parallel_size
    per_stage = config.tensor_parallel_size * int(engine.get("prefill_context_parallel_size") or 1)
    ranks = int(engine.get("data_parallel_size") or 1)
    if resources.swap_group:
        _refuse_in_swap_group(config)
    own: dict[str, float] = {"CPU": resources.num_cpus} if resources.num_cpus else {}
    if resources.memory_gib:
        own["memory"] = int(resources.memory_gib * 2**30)
    if resources.device == "cpu":
        if engine.get("distributed_executor_backend") == "ray":
            raise ConfigError(
                "engine.distributed_executor_backend is 'ray', which vLLM cannot do on CPUs; "
                "remove it"
            )
        backend = {"distributed_executor_backend": "mp"} if stages * per_stage > 1 else {}
        shared = {"CPU": _EPSILON} if resources.swap_group else {}
        return Placement(
            own, {}, ranks=ranks, in_process=True, shared=shared, engine_defaults=backend
        )
    type_of_node: dict[str, float] = {}
    if resources.accelerator_type:
        # Not the node label ray.io/accelerator-type: a cluster autoscaler that scales a worker
        # group up from zero reads the group's resources.
        type_of_node[TYPE + resources.accelerator_type] = _EPSILON
    if resources.swap_group:
        return Placement(
            own,
            {},
            in_process=True,
            shared={"GPU": 1.0, **type_of_node},
            engine_defaults={
                "distributed_executor_backend": "uni",
                "enable_sleep_mode": True,
                "gpu_memory_utilization": SWAP_GROUP_UTILIZATION,
            },
        )
    if resources.part_of_gpu:
        part = {"GPU": share or resources.gpu_share or 1.0, **type_of_node}
        return Placement(
            own | part,
            part,
            in_process=True,
            engine_defaults={"distributed_executor_backend": "uni"},
        )
    if engine.get("distributed_executor_backend") in _IN_PROCESS:
        world = {"GPU": float(stages * per_stage), **type_of_node}
        return Placement(own | world, world, ranks=ranks, in_process=True)
    stage = {"GPU": float(per_stage), **type_of_node}
    return Placement(
        own | stage,
        stage,
        stages=stages,
        ranks=ranks,
        engine_defaults={"distributed_executor_backend": "ray"},
    )


def _refuse_in_swap_group(config: ModelConfig) -> None:
    """What a model that shares its GPU in a swap group cannot have."""
    engine, group = config.engine, config.resources.swap_group
    for name in SIZES:
        if int(engine.get(name) or 1) > 1:
            raise ConfigError(
                f"engine.{name} is {engine[name]}, but the models of a swap group ('{group}') "
                "share one GPU; remove it, or remove resources.swap_group"
            )
    if engine.get("distributed_executor_backend") not in (None, "uni"):
        raise ConfigError(
            "engine.distributed_executor_backend is not yours to set in a swap group: the engine's "
            "own process must have the GPU; remove it"
        )
    if engine.get("enable_sleep_mode") is False:
        raise ConfigError(
            "engine.enable_sleep_mode is false, but the models of a swap group sleep; remove it"
        )
    if config.adapters or engine.get("enable_lora"):
        # They come and go while the model sleeps, when its memory is not there to be written.
        raise ConfigError("a model of a swap group cannot have adapters; remove one of the two")
    _, most = config.replica_range
    if most > 1:
        setting = "autoscaling.max_replicas" if config.autoscaling else "replicas"
        raise ConfigError(
            f"{setting} is {most}, but a model of a swap group ('{group}') has one replica: a "
            "second one would be on the same GPU; set it to 1"
        )


def _refuse_other_launchers(engine: Mapping[str, Any]) -> None:
    backend = engine.get("distributed_executor_backend")
    if backend not in (None, "ray", *_IN_PROCESS):
        raise ConfigError(
            f"engine.distributed_executor_backend is '{backend}', but a replica can run "
            "'ray' (its GPUs may be on several nodes), 'mp' or 'uni' (all on the replica's node)"
        )
    for name in (
        "data_parallel_size_local",
        "data_parallel_hybrid_lb",
        "data_parallel_external_lb",
    ):
        if engine.get(name):
            raise ConfigError(
                f"engine.{name} is not yours to set: each data-parallel rank is a replica of its "
                "own, which the gateway balances; set data_parallel_size only"
            )
    if engine.get("data_parallel_backend") not in (None, "mp"):
        raise ConfigError(
            "engine.data_parallel_backend is not yours to set: Serve places the data-parallel "
            "ranks as one gang; remove it"
        )


# Inside a replica: which bundle is which rank's.


def by_node(nodes: Sequence[str]) -> list[int]:
    """Positions grouped by node, nodes in the order of their first position.

    ``["a", "b", "a"]`` gives ``[0, 2, 1]``. Neighbouring pipeline stages (and data-parallel
    ranks) then share a node where they can, and position 0 stays first.
    """
    first: dict[str, int] = {}
    for position, node in enumerate(nodes):
        first.setdefault(node, position)
    return sorted(range(len(nodes)), key=lambda position: first[nodes[position]])


def stage_bundles(nodes: Sequence[str], stages: int, member: int = 0) -> list[int]:
    """A replica's bundle indices in the order of its pipeline stages.

    Args:
        nodes: the node of each bundle of the placement group.
        stages: bundles that each replica has.
        member: the replica's position in its gang; its first bundle is the one it runs in.
    """
    mine = range(member * stages, (member + 1) * stages)
    return [mine[position] for position in by_node([nodes[bundle] for bundle in mine])]


def data_parallel_rank(nodes: Sequence[str], stages: int, member: int) -> int:
    """vLLM's rank of a gang's member, so that ranks on one node are consecutive."""
    return by_node(nodes[::stages]).index(member)

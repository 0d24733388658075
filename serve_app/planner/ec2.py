"""The EC2 machines for a planned replica."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from serve_app.config import yaml_files
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.planner import hardware, pods
from serve_app.planner.choose import Choice
from serve_app.planner.hardware import Instance
from serve_app.planner.vllm.memory import Plan
from serve_app.planner.vllm.sharding import Parallelism


@dataclass(frozen=True)
class Machines:
    """EC2 machines for one replica. ``price`` is USD per hour for all of them, if known."""

    instance: Instance
    count: int
    stranded_gpus: int
    """GPUs of these machines that the replica leaves idle."""
    price: float | None


@dataclass(frozen=True)
class RefusedInstance:
    name: str
    reason: str


def machines(
    found: Plan, config: ModelConfig, prices: dict[str, float] | None = None
) -> tuple[list[Machines], list[RefusedInstance]]:
    """The EC2 machines that a replica runs on, best first, and why others do not.

    Best is cheapest where prices are given, else fewest idle GPUs, then fewest machines.
    """
    parallel = found.parallel
    layout = {
        "tensor_parallel_size": parallel.tensor,
        "pipeline_parallel_size": parallel.pipeline,
        "data_parallel_size": parallel.data,
    }
    config = config.model_copy(update={"engine": config.engine | layout})
    good: list[Machines] = []
    refused: list[RefusedInstance] = []
    for instance in hardware.instances().values():
        if instance.gpu is not found.gpu:
            continue
        if instance.gpus < parallel.tensor:
            refused.append(
                RefusedInstance(
                    instance.name,
                    f"{instance.gpus} GPU{'s' * (instance.gpus > 1)}: a tensor-parallel group of "
                    f"{parallel.tensor} would span machines",
                )
            )
            continue
        # A machine holds whole tensor-parallel groups.
        groups_per_node = instance.gpus // parallel.tensor
        groups = parallel.pipeline * parallel.data
        nodes = math.ceil(groups / groups_per_node)
        if nodes > 1 and not instance.efa and parallel.pipeline > 1:
            refused.append(
                RefusedInstance(instance.name, "spans machines, but the type has no EFA")
            )
            continue
        gpus = _of_pod(parallel, instance)
        if not pods.fits(instance, gpus, [config]):
            cores, gib = pods.share(instance, gpus)
            takes = pods.cpus(config, gpus), pods.memory_gib(config, gpus, cores)
            refused.append(
                RefusedInstance(
                    instance.name,
                    f"a pod with {gpus} GPU{'s' * (gpus > 1)} takes {takes[0]} cores and "
                    f"{takes[1]} GiB, and there are {cores} and {gib}",
                )
            )
            continue
        price = prices.get(instance.name) if prices else None
        stranded = nodes * instance.gpus - parallel.gpus
        good.append(Machines(instance, nodes, stranded, price * nodes if price else None))
    good.sort(
        key=lambda m: (
            m.price if m.price is not None else math.inf,
            m.stranded_gpus,
            m.count,
            m.instance.allocatable_memory_mib,
        )
    )
    return good, refused


def _of_pod(parallel: Parallelism, instance: Instance) -> int:
    """The GPUs of a pod there: the whole replica's, a data-parallel rank's, or a stage's."""
    rank = parallel.tensor * parallel.pipeline
    return next(it for it in (parallel.gpus, rank, parallel.tensor) if it <= instance.gpus)


def read_prices(path: Path) -> dict[str, float]:
    """USD per hour by instance type, from a YAML or JSON mapping.

    Raises:
        UserError: unreadable, or a price that is not a positive number.
    """
    value = yaml_files.read(path)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: must be a mapping of instance type to USD per hour")
    for name, price in value.items():
        if isinstance(price, bool) or not isinstance(price, (int, float)) or price <= 0:
            raise UserError(f"{path}: the price of '{name}' is {price!r}, not a positive number")
    return {str(name): float(price) for name, price in value.items()}


def cheapest(choices: list[Choice], config: ModelConfig, prices: dict[str, float]) -> Choice | None:
    """The GPU type on which a replica costs least; None where none fits."""

    def price(choice: Choice) -> float:
        assert choice.plan is not None
        good, _ = machines(choice.plan, config, prices)
        return min((m.price for m in good if m.price is not None), default=math.inf)

    return min((it for it in choices if it.plan), key=price, default=None)

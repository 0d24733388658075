"""What vLLM moves from a GPU into pinned host memory: weights, and KV cache that is no longer read.

``vllm/config/offload.py`` has the settings; ``model_executor/offloader/uva.py`` and ``prefetch.py``
what they do. A GPU holds no less than the layers' weights without those that were moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.planner.hardware import GIB
from serve_app.planner.model.names import layer_of


@dataclass(frozen=True)
class Offload:
    """The settings. ``group`` is 0 where no layers are moved as a whole."""

    weights: int = 0
    """Bytes of weights of each GPU."""
    only: tuple[str, ...] = ()
    """Segments of the names that may be moved; all if empty."""
    group: int = 0
    of_group: int = 1
    ahead: int = 1
    """Layers that are fetched ahead, each into a buffer on the GPU."""
    kv_cache: int = 0
    """Bytes of each engine, over its GPUs."""


def of(arguments: Mapping[str, Any]) -> Offload:
    """What a config's engine arguments ask for."""
    get = arguments.get
    prefetch = int(get("offload_group_size") or 0) if get("offload_backend") != "uva" else 0
    only = get("offload_params" if prefetch else "cpu_offload_params") or ()
    native = (get("kv_offloading_backend") or "native") == "native"  # else another process's
    return Offload(
        weights=0 if prefetch else int(float(get("cpu_offload_gb") or 0) * GIB),
        only=(only,) if isinstance(only, str) else tuple(sorted(map(str, only))),
        group=prefetch,
        of_group=int(get("offload_num_in_group") or 1),
        ahead=int(get("offload_prefetch_step") or 1),
        kv_cache=int(float(get("kv_offloading_size") or 0) * GIB) if native else 0,
    )


def moved(parameters: Mapping[str, int], wanted: Offload) -> tuple[int, int]:
    """Bytes of one GPU's ``parameters`` that go into host memory, and those that leave the GPU.

    Only layers are moved. Parameter after parameter goes until ``weights`` is reached, so the last
    may go beyond it (uva.py:88).
    """
    eligible = [
        (layer, size)
        for name, size in parameters.items()
        if (layer := layer_of(name)) is not None and _may_go(name, wanted.only)
    ]
    if wanted.group:
        return _layers(eligible, wanted)
    host = 0
    for _, size in sorted(eligible, key=lambda one: one[0]):
        if host >= wanted.weights:
            break
        host += size
    return host, host


def _layers(eligible: Iterable[tuple[int, int]], wanted: Offload) -> tuple[int, int]:
    """The last ``of_group`` layers of each group; the GPU keeps ``ahead`` buffers of a layer."""
    by_layer: dict[int, int] = {}
    for layer, size in eligible:
        by_layer[layer] = by_layer.get(layer, 0) + size
    first = min(by_layer, default=0)
    gone = [
        size
        for layer, size in by_layer.items()
        if (layer - first) % wanted.group >= wanted.group - wanted.of_group
    ]
    host = sum(gone)
    return host, max(0, host - wanted.ahead * max(gone, default=0))


def _may_go(name: str, only: tuple[str, ...]) -> bool:
    return not only or any(f".{segment}." in f".{name}." for segment in only)


def asked(arguments: Mapping[str, Any], gpus: int, engines: int = 1) -> int:
    """The most bytes of host memory that a pod of so many GPUs and engines may pin."""
    wanted = of(arguments)
    return gpus * wanted.weights + engines * wanted.kv_cache

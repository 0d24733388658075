"""How many front ends a replica has: processes that take requests, render them and stream answers.

An explicit ``frontends`` wins. ``auto`` is the smallest of three: what the engine's expected rate
needs (:func:`rate`), what the node's cores allow (:func:`allowed`), and :data:`MOST`. It is 1 where
one process is never what limits: on a CPU, for models that pool, and in a data-parallel gang, each
rank of which has a front end already. It is also 1 where the rate cannot be told.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from serve_app.config.environment import environment
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.planner import choose, hardware, shares
from serve_app.planner.hardware import Instance
from serve_app.planner.loading import load_model
from serve_app.planner.model import runner
from serve_app.planner.vllm import defaults
from serve_app.planner.vllm.memory import FRONT_END_BYTES, Plan

MOST = 4
"""The most that ``auto`` gives. On one H100, the fastest engine measured, a fourth process raised
28,700 tokens/s to 34,600, and vLLM's Rust front end, which does not limit there, had 42,400."""

TOKENS_PER_S = 10_000
"""Tokens per second that ``auto`` gives one process to stream. One alone ended at 18,100, two at
14,400 each, four at 8,700 each (1B shape, 256 clients, H100, 2026-11-26): beyond this they wait."""

REQUESTS = 256
"""Requests at once that the rate is expected for, where ``max_num_seqs`` and the KV cache allow as
many. With more the arithmetic takes over from the reading: an H100 does 295 operations for each
byte that it reads, and a request takes one for each byte of 16-bit weights."""

LENGTH = 640
"""Tokens of each of them in the KV cache: 512 of the prompt, 128 of the answer, as measured."""

STEP_S = 3.7e-3
"""Seconds of a step beside its reading. With the Rust front end a step of the 1B shape took 256 /
42,400 s = 6.0 ms, of which reading 2.5 GB of weights and 5.4 GB of KV cache explain 2.3. The
prefill of 512 tokens for every 128 that are streamed is in it."""

EXCHANGE_S = 30e-6
"""Seconds of one exchange between the GPUs of a tensor-parallel group, two to a layer. An estimate:
the activations of 256 tokens are some megabytes."""


@dataclass(frozen=True)
class Node:
    """What shares a replica's machine or pod: CPU cores, as the OS counts them, and GPUs."""

    cores: float
    gpus: int

    def __str__(self) -> str:
        return f"{self.cores:g} cores, {self.gpus} GPU{'s' * (self.gpus != 1)}"


@dataclass(frozen=True)
class FrontEnds:
    """The number for one replica, and the reason in words to be put behind it."""

    count: int
    why: str

    @property
    def host_bytes(self) -> int:
        """Host memory of those beyond the first."""
        return (self.count - 1) * FRONT_END_BYTES


def on_machine(instance: Instance) -> Node:
    """An EC2 machine as a node, without what its kubelet keeps."""
    return Node(instance.allocatable_cpu_m / 1000, instance.gpus)


def how_many(config: ModelConfig, node: Node, accelerator: str | None = None) -> FrontEnds:
    """The front ends of a replica on ``node``, for the replica itself. Never raises.

    Reads the model's metadata, from the hub if they are not on this machine: call it where the
    environment of :func:`serve_app.config.environment.environment` is set.

    Args:
        accelerator: the node's type of GPU by Ray's name; None takes the config's.
    """
    try:
        return _estimated(config, node, accelerator or config.resources.accelerator_type)
    except UserError as error:
        return FrontEnds(1, f"the rate is not known ({error})")
    except Exception as error:  # an estimate must not keep an engine from starting
        return FrontEnds(1, f"the rate is not known ({type(error).__name__}: {error})")


def _estimated(config: ModelConfig, node: Node, accelerator: str | None) -> FrontEnds:
    given = _given(config) or _pooling(config)
    if given is not None:
        return given
    most = allowed(config, node)
    if most == 1:
        return FrontEnds(1, _cores(config, node, most))
    if accelerator is None:
        return FrontEnds(1, "the rate is not known, because the type of GPU is not")
    gpu, _ = hardware.find(accelerator)
    plan = choose.plan_on(load_model(config), choose.arguments_of(config), gpu)
    return on_plan(config, plan, node)


def on_plan(config: ModelConfig, plan: Plan, node: Node | None) -> FrontEnds:
    """The front ends of a planned replica; ``node`` is None where the machine is not known."""
    given = _given(config) or _pooling(config, shape_pools=plan.engine.pooling)
    if given is not None:
        return given
    if not plan.gpu.bandwidth:
        return FrontEnds(1, f"the rate is not known, because {plan.gpu.name}'s bandwidth is not")
    expected = rate(plan)
    needed = min(MOST, math.ceil(expected / TOKENS_PER_S))
    most = allowed(config, node, plan.parallel.tensor * plan.parallel.pipeline)
    if most < needed:
        return FrontEnds(most, _cores(config, node, most))
    return FrontEnds(
        needed,
        f"about {round(expected, -2):,.0f} tokens/s of {_requests(plan):.0f} requests",
    )


def most_on(config: ModelConfig, node: Node) -> int:
    """The most that a replica on ``node`` may have, by its config alone, whatever its model."""
    given = _given(config)
    return given.count if given is not None else allowed(config, node)


def rate(plan: Plan) -> float:
    """Tokens per second that the engine is expected to stream.

    A step gives each request a token. It takes the time to read one GPU's weights and KV cache
    (pipeline stages one after the other), the exchanges between GPUs, and :data:`STEP_S`.
    """
    parallel, requests = plan.parallel, _requests(plan)
    read = sum(stage.weights for stage in plan.stages)
    read += int(requests * LENGTH * plan.kv_bytes_per_token * parallel.pipeline)
    exchanges = 2 * plan.model.shape.num_hidden_layers if parallel.tensor > 1 else 0
    step = read / plan.gpu.bandwidth + exchanges * EXCHANGE_S + parallel.pipeline * STEP_S
    return requests / step


def allowed(config: ModelConfig, node: Node | None, gpus: int | None = None) -> int:
    """What the cores leave for front ends: 1 at least, :data:`MOST` at most.

    A replica has the cores of its GPUs' share of the node, less one for each GPU's worker, one for
    EngineCore, and one for Ray and the proxies. A ``num_cpus`` that is set is a bound too.

    Args:
        gpus: GPUs of the replica; None takes the config's.
    """
    bounds = [float(MOST)]
    if node is not None:
        bounds.append(cores_left(config, node, gpus))
    if _sets_num_cpus(config):
        bounds.append(config.resources.num_cpus)
    return max(1, math.floor(min(bounds)))


def cores_left(config: ModelConfig, node: Node, gpus: int | None = None) -> float:
    """The cores of ``node`` that one replica's front ends may keep busy; 0 or less if none."""
    parallel = defaults.parallelism(config.engine)
    of_replica = gpus or parallel.tensor * parallel.pipeline
    if config.resources.device == "cpu" or not node.gpus:
        return node.cores - 2
    if config.resources.part_of_gpu:  # EngineCore is the worker
        return node.cores * shares.about(config) / node.gpus - 2
    here = min(of_replica, node.gpus)  # other pipeline stages may be elsewhere
    return node.cores * here / node.gpus - here - 2


def _given(config: ModelConfig) -> FrontEnds | None:
    """The number that the config alone tells; None where it takes the model and the node."""
    if config.frontends != "auto":
        return FrontEnds(config.frontends, "as set")
    if config.resources.device == "cpu":
        return FrontEnds(1, "on a CPU the engine is what limits")
    if defaults.parallelism(config.engine).data > 1:
        return FrontEnds(1, "each data-parallel rank has its own")
    if config.engine.get("runner") == "pooling":
        return FrontEnds(1, "the model does not write text")
    return None


def _pooling(config: ModelConfig, *, shape_pools: bool = False) -> FrontEnds | None:
    if shape_pools or runner.pools(config.model, config.engine, os.environ | environment(config)):
        return FrontEnds(1, "the model does not write text")
    return None


def _requests(plan: Plan) -> float:
    """Requests at once, at most :data:`REQUESTS`."""
    most = min(REQUESTS, plan.engine.max_num_seqs)
    if not plan.fits:  # by an estimate: the engine may start all the same
        return most
    return max(1.0, min(most, plan.concurrency(min(LENGTH, plan.engine.max_model_len))))


def _sets_num_cpus(config: ModelConfig) -> bool:
    return "num_cpus" in config.resources.model_fields_set


def _cores(config: ModelConfig, node: Node | None, most: int) -> str:
    """Why the cores leave ``most``."""
    if _sets_num_cpus(config) and config.resources.num_cpus < most + 1:
        return f"resources.num_cpus is {config.resources.num_cpus:g}"
    assert node is not None
    return f"the node has {node}"

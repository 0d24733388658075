"""A model's Serve application: ``import_path: serve_app.model:app``."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import ray
from ray.serve import Application

from serve_app.cluster import autoscaling, capacity, serve, swap_actor
from serve_app.cluster.placement import Placement
from serve_app.config.document import MODEL_IMPORT_PATH
from serve_app.config.environment import environment
from serve_app.config.settings import ModelConfig, ids_of, parse
from serve_app.errors import ConfigError
from serve_app.planner import hardware, shares
from serve_app.planner.model import metadata
from serve_app.planner.vllm import defaults, parallelism
from serve_app.replica.server import ModelServer

logger = logging.getLogger("ray.serve")

# Serve never sees the requests, so Serve's cap must not limit them.
_UNBOUNDED = 1_000_000


def app(args: dict[str, Any]) -> Application:
    """Build a model's application from its ``args`` (see :class:`ModelConfig`).

    Raises:
        ConfigError: what is wrong with the settings, in one sentence.
    """
    try:
        config = parse(ModelConfig, args, "args")
        hardware.refuse_misnamed(config.resources.accelerator_type)
        _refuse_sizes(config)
        place = shares.placed(config, capacity.types_of_gpu)
        capacity.refuse_impossible(place.alone)
        _refuse_ids_of_others(args, config)
        options = _deployment_options(config, place)
    except ConfigError:
        # Serve shows `traceback.format_exc()` as the application's status. The frames tell the user
        # nothing. This process only builds this application, so the change affects nothing else.
        sys.tracebacklimit = 0
        raise
    deployment: Any = ModelServer
    return deployment.options(**options).bind(config.model_dump(exclude_unset=True))


def _refuse_sizes(config: ModelConfig) -> None:
    """Refuse parallel sizes that the model cannot be split into, before GPUs are reserved.

    If the model's ``config.json`` is not on this node, vLLM refuses them at the start.
    """
    if config.engine.keys() & metadata.OTHER_CONFIG:
        return
    shape = metadata.shape_at_hand(config.model, os.environ | environment(config))
    if shape is not None:
        parallelism.refuse(shape, defaults.parallelism(config.engine))


def _refuse_ids_of_others(args: dict[str, Any], config: ModelConfig) -> None:
    """Refuse an alias that another application of this cluster answers to.

    A builder is not told its own application's name, so it finds itself by its args.
    """
    claimed = ids_of("", config)[1:]
    report = serve.report() if claimed else None
    if report is None:
        return
    deployed = {
        name: application.args
        for name, application in serve.applications(report).items()
        if application.import_path == MODEL_IMPORT_PATH
    }
    myself = next((name for name, others in deployed.items() if others == args), None)
    for name, others_args in deployed.items():
        if name == myself:
            continue
        others = _claims(name, others_args)
        for id in claimed:
            if id in others:
                raise ConfigError(
                    f"the model id '{id}' belongs to both '{myself or 'this application'}' and "
                    f"'{name}'; change it in one of them"
                )


def _claims(name: str, args: dict[str, Any]) -> list[str]:
    try:
        return ids_of(name, parse(ModelConfig, args, name))
    except ConfigError:  # an invalid application, which Serve reports all the same
        return [name]


def _deployment_options(config: ModelConfig, place: Placement) -> dict[str, Any]:
    options: dict[str, Any] = {
        **place.options(),
        **autoscaling.deployment_options(config),
        "max_ongoing_requests": _UNBOUNDED,
        # With Serve's default of 20 a 70B would load for hours before Serve reports why it fails.
        "max_constructor_retry_count": 3,
        # Serve kills the replica after this time; the replica drains within it.
        "graceful_shutdown_timeout_s": config.graceful_shutdown_timeout_s + 15,
    }
    if (group := config.resources.swap_group) and ray.is_initialized():
        id = swap_actor.reserve(group, place.shared)
        actor = options["ray_actor_options"]
        actor["resources"] = actor.get("resources", {}) | swap_actor.part(
            id, gpu="GPU" in place.shared
        )
    if config.env:
        options["ray_actor_options"]["runtime_env"] = serve.runtime_env(config.env)
    if config.adapters:
        # A user_config in the config's own `deployments` replaces this one.
        options["user_config"] = {"adapters": [a.model_dump() for a in config.adapters]}
    return options

"""Serve's controller with replicas that are played: so that a thousand fit on one machine.

Serve calls :func:`install` in its controller (``RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH``). From
then on each replica of a model is a name, and one actor, :class:`Players`, answers for all of them:
that they run, that they are well, and where they listen. All else is Serve's own: the state of
each deployment, the control loop, the long poll, the report, the gateways and the proxy. Models are
built by their real builder, in that actor too: Serve's task for it would start a process for each.

It replaces two names in Ray 2.60's private modules, in this benchmark's controller alone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import ray
from ray.serve._private import application_state, deployment_state

from serve_app.config.document import DEPLOYMENT, MODEL_IMPORT_PATH

FIRST_PORT_ENV = "SERVE_APP_SCALE_FIRST_PORT"
"""The port of the first replica's front end; the others follow."""

_NAME, _NAMESPACE = "players", "scale"


def install() -> None:
    """Called by Serve, in its controller, before it has any replica."""
    real = deployment_state.ActorReplicaWrapper

    class Wrapper(real):  # type: ignore[misc, valid-type]
        def start(self, *args: Any, **kwargs: Any) -> Any:
            request = super().start(*args, **kwargs)
            if self.deployment_name == DEPLOYMENT:
                request.actor_def = _Created(self)
                request.placement_group_bundles = None
            return request

    deployment_state.ActorReplicaWrapper = Wrapper
    application_state.build_serve_application = _Build(application_state.build_serve_application)


class Players:
    """All replicas of all models."""

    def __init__(self) -> None:
        self._ports: dict[str, int] = {}

    async def is_allocated(self, id: str) -> tuple[Any, ...]:
        context = ray.get_runtime_context()
        return (
            os.getpid(),
            context.get_actor_id(),
            context.get_worker_id(),
            context.get_node_id(),
            ray.util.get_node_ip_address(),
            "",
            f"/serve/replica_{id}.log",
        )

    async def ready(self, id: str, model: str, version: Any, *given: Any) -> tuple[Any, ...]:
        """What ``initialize_and_get_metadata`` of a replica of Ray 2.60 returns."""
        config, rank, gang = given
        first = int(os.environ[FIRST_PORT_ENV])
        port = self._ports.setdefault(id, first + len(self._ports))
        metadata = {
            "host": "127.0.0.1",
            "port": port,
            "ports": [port],
            "ids": [model, f"alias-of-{model}"],
            "max_model_len": 8192,
            "about": {"takes": ["chat", "completions", "tools"]},
        }
        return config, version, 1.0, 0, None, None, None, rank, None, [], False, gang, metadata

    async def check_health(self) -> None:
        """All is well."""

    async def build(self, *args: Any) -> Any:
        built: Any = application_state.build_serve_application
        return await asyncio.to_thread(built._function, *args)


def players() -> Any:
    """The actor; made when it is first asked for."""
    remote: Any = ray.remote(Players)
    return remote.options(
        name=_NAME,
        namespace=_NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_concurrency=1000,
    ).remote()


class _Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class _Created:
    """Stands for a replica's actor class, and for the actor that is made of it."""

    def __init__(self, wrapper: Any) -> None:
        actor, id = players(), wrapper.replica_id.unique_id
        self.is_allocated = _Method(lambda: actor.is_allocated.remote(id))
        self.initialize_and_get_metadata = self.reconfigure = _Method(
            lambda *given: actor.ready.remote(id, wrapper.app_name, wrapper.version, *given)
        )
        self.check_health = _Method(lambda: actor.check_health.remote())

    def options(self, **options: Any) -> _Created:
        return self

    def remote(self, *args: Any) -> _Created:
        return self


class _Build:
    """Stands for the task that builds an application."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def options(self, **options: Any) -> Any:
        real = self._real.options(**options)
        return _Method(
            lambda path, *args: (
                players().build.remote(path, *args)
                if path == MODEL_IMPORT_PATH
                else real.remote(path, *args)
            )
        )

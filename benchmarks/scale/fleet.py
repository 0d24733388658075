"""A fleet that does not exist: as Serve's controller would report it, and where it would listen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve_app.config.document import DEPLOYMENT, MODEL_IMPORT_PATH
from serve_app.gateway.replicas import Address


@dataclass(frozen=True)
class Fleet:
    """So many models with so many replicas together, each replica a port of this machine."""

    models: int
    replicas: int
    first_port: int = 0

    @property
    def names(self) -> list[str]:
        return [f"model-{number}" for number in range(self.models)]

    def places(self, model: str) -> dict[str, Address]:
        """Where a model's replicas listen, by id."""
        number = int(model.removeprefix("model-"))
        of = self.replicas / self.models
        numbers = range(round(number * of), round((number + 1) * of))
        return {f"{n:08x}": ("127.0.0.1", self.first_port + n) for n in numbers}

    def report(self) -> dict[str, Any]:
        """What ``get_serve_instance_details`` of Ray 2.60 returns, of the applications alone."""
        return {"applications": {name: self._application(name) for name in self.names}}

    def _application(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "route_prefix": None,
            "docs_path": None,
            "status": "RUNNING",
            "message": "",
            "last_deployed_time_s": 1.7e9,
            "deployed_app_config": application(name, len(self.places(name))),
            "source": "declarative",
            "external_scaler_enabled": False,
            "deployment_topology": None,
            "deployments": {
                DEPLOYMENT: {
                    "name": DEPLOYMENT,
                    "status": "HEALTHY",
                    "status_trigger": "CONFIG_UPDATE_COMPLETED",
                    "message": "",
                    "deployment_config": _SERVES,
                    "target_num_replicas": len(self.places(name)),
                    "required_resources": {"CPU": 1},
                    "replicas": [_replica(name, id) for id in self.places(name)],
                }
            },
        }


_SERVES = {
    "max_ongoing_requests": 1_000_000,
    "max_queued_requests": -1,
    "backpressure_config": {"status_code": 503, "retry_after_s": None},
    "user_config": None,
    "graceful_shutdown_wait_loop_s": 2.0,
    "graceful_shutdown_timeout_s": 615.0,
    "health_check_period_s": 5.0,
    "health_check_timeout_s": 30.0,
    "ray_actor_options": {"num_cpus": 0.0, "num_gpus": 0.0},
    "request_router_config": {
        "request_router_class": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
        "request_router_kwargs": {},
        "request_routing_stats_period_s": 10.0,
        "request_routing_stats_timeout_s": 30.0,
        "initial_backoff_s": 0.025,
        "backoff_multiplier": 2.0,
        "max_backoff_s": 0.5,
    },
    "rolling_update_percentage": 0.2,
    "max_surge_percent": 0,
}
"""Of each deployment, as Serve tells it."""


def application(name: str, replicas: int) -> dict[str, Any]:
    """A model as a config file has it: with about as many settings as those in ``configs/``."""
    return {
        "name": name,
        "route_prefix": None,
        "import_path": MODEL_IMPORT_PATH,
        "args": {
            "model": "/models/smollm2-135m-instruct",
            "served_as": [f"alias-of-{name}"],
            "engine": {
                "max_model_len": 8192,
                "max_num_seqs": 64,
                "gpu_memory_utilization": 0.9,
                "tensor_parallel_size": 1,
            },
            "resources": {"device": "cpu", "num_cpus": 0},
            "replicas": replicas,
        },
    }


def _replica(model: str, id: str) -> dict[str, Any]:
    return {
        "node_id": "c0ffee" * 9,
        "node_ip": "10.0.0.1",
        "node_instance_id": "i-0123456789abcdef0",
        "actor_id": "a" * 32,
        "worker_id": "b" * 56,
        "log_file_path": f"/serve/replica_{model}_{DEPLOYMENT}_{id}.log",
        "replica_id": id,
        "state": "RUNNING",
        "pid": 4242,
        "actor_name": f"SERVE_REPLICA::{model}#{DEPLOYMENT}#{id}",
        "start_time_s": 1.7e9,
    }

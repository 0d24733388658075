"""What is read from the report of Serve's controller, and the pinned Ray's words for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.serve._private import constants, deployment_state, replica
from ray.serve._private.common import ReplicaState
from ray.serve.schema import (
    ApplicationDetails,
    ApplicationStatus,
    DeploymentDetails,
    ReplicaDetails,
    ServeInstanceDetails,
)

from serve_app import gateway
from serve_app.cluster import serve
from serve_app.replica.server import ModelServer


def application(**changes: Any) -> dict[str, Any]:
    starting = {"replica_id": "r", "state": ReplicaState.STARTING, "start_time_s": 2.0}
    return {
        "status": ApplicationStatus.DEPLOYING,
        "message": "",
        "last_deployed_time_s": 1.0,
        "deployed_app_config": {"import_path": "a:b", "args": {"x": 1}},
        "deployments": {"D": {"message": "", "replicas": [starting]}},
    } | changes


def read(**applications: Any) -> dict[str, serve.Application]:
    return serve.applications({"applications": applications})


def test_an_application_is_read_with_its_replicas() -> None:
    [found] = read(m=application()).values()
    assert (found.name, found.status, found.message) == ("m", "DEPLOYING", "")
    assert (found.import_path, found.args, found.deployed_at) == ("a:b", {"x": 1}, 1.0)
    assert found.replicas == (serve.ReplicaStatus("r", "STARTING", None, 2.0),)


def test_one_that_no_config_file_deployed_has_neither_an_import_path_nor_args() -> None:
    [found] = read(m=application(deployed_app_config=None, deployments=None)).values()
    assert (found.import_path, found.args, found.replicas) == (None, {}, ())


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        {},
        application(deployments={"D": {}}),
        application(deployments=[1]),
        application(deployed_app_config=5),
        application(last_deployed_time_s="yesterday"),
    ],
    ids=str,
)
def test_one_that_cannot_be_read_costs_only_itself(
    nonsense: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert read(bad=nonsense, good=application()).keys() == {"good"}
    assert "application 'bad'" in caplog.text


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("", ""),
        ("it is\n  so\n", "so"),
        ("Traceback:\n  x\nserve_app.errors.UserError: a\nlong one", "a long one"),
        (f"Deployment 'D' has 1 replicas that {serve.SLOW_START} 30s to initialize.", ""),
    ],
)
def test_a_message_is_one_line_and_that_a_start_takes_a_while_is_none(
    message: str, said: str
) -> None:
    [found] = read(m=application(message=message)).values()
    assert found.message == said


# --- the pinned Ray ------------------------------------------------------------------------------


def test_serve_says_of_a_slow_start_what_is_looked_for() -> None:
    """Of one that waits for a node, and of one that loads."""
    assert Path(deployment_state.__file__).read_text().count(serve.SLOW_START) == 2


def test_the_report_still_has_the_fields_that_are_read() -> None:
    """The details themselves are asked of a real controller in test_placement_cluster.py."""
    assert {"applications", "http_options"} <= ServeInstanceDetails.model_fields.keys()
    assert application().keys() <= ApplicationDetails.model_fields.keys()
    assert {"message", "replicas"} <= DeploymentDetails.model_fields.keys()
    read = {"replica_id", "state", "node_id", "start_time_s"}
    assert read <= ReplicaDetails.model_fields.keys()
    assert {"STARTING", "RUNNING", "STOPPING"} <= set(ReplicaState)
    known = {"NOT_STARTED", "DEPLOYING", "RUNNING", "DEPLOY_FAILED", "DELETING"}
    assert known <= set(ApplicationStatus)


@pytest.mark.parametrize("hook", ["record_autoscaling_stats", "record_replica_metadata"])
def test_serve_still_asks_a_replica_for_its_load_and_its_place(hook: str) -> None:
    """Without a word it asks nothing of one that has no such method."""
    code = Path(replica.__file__).read_text() + Path(constants.__file__).read_text()
    assert f'"{hook}"' in code
    deployment: Any = ModelServer
    assert hasattr(deployment.func_or_class, hook)


def test_serve_still_reads_the_variable_that_keeps_a_gateway_in_one_thread() -> None:
    name = "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"
    deployment: Any = gateway.app({})._bound_deployment
    assert deployment.ray_actor_options["runtime_env"]["env_vars"][name] == "0"
    assert f'get_env_bool(\n    "{name}"' in Path(constants.__file__).read_text()

"""What a change finds when others act between its looks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="needs the extra 'eks'")

from click.testing import Result
from deploying import CONFIG, NAME, SPACE, answers, config, later
from kube_api import KubeAPI
from operator_model import Operator, running

from serve_app.errors import UserError
from serve_app.kuberay.live import deploy
from serve_app.kuberay.live.api_server import Forbidden


def test_bounds_reach_a_cluster_that_the_operator_made_meanwhile(
    api: KubeAPI,
    operator: Operator,
    run: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the spec before: at the preview there was none yet."""
    run("deploy", str(CONFIG), "--no-wait")
    preview = deploy.preview

    def slow(*args: Any, **options: Any) -> deploy.Preview:
        found = preview(*args, **options)
        operator.settle()
        return found

    monkeypatch.setattr(deploy, "preview", slow)
    more = config(tmp_path, ("max_replicas: 2", "max_replicas: 3"))
    output = run("deploy", more, "--no-wait").output
    assert "worker group 'h100-x4': maxReplicas 3 → 4" in output.partition("applied")[2]
    (cluster,) = api.all("rayclusters")
    assert [g["maxReplicas"] for g in cluster["spec"]["workerGroupSpecs"]] == [3, 4]


def test_bounds_reach_a_cluster_that_the_operator_made_after_the_first_look(
    api: KubeAPI,
    operator: Operator,
    run: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its cache lags: it may make one of the spec before after the apply."""
    answers(api)
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    more = config(tmp_path, ("max_replicas: 2", "max_replicas: 3"))
    settle = deploy.settle
    monkeypatch.setattr(deploy, "settle", lambda *_: monkeypatch.setattr(deploy, "settle", settle))
    with running(operator):
        output = run("deploy", more, "--timeout", "30").output
    assert output.rstrip().endswith("ready: every model answers")
    (cluster,) = api.all("rayclusters")
    assert [g["maxReplicas"] for g in cluster["spec"]["workerGroupSpecs"]] == [3, 4]


def test_bounds_do_not_arrive_unknown(
    api: KubeAPI, operator: Operator, run: Callable[..., Result], tmp_path: Path
) -> None:
    """Who may not list RayClusters cannot know, and is not told that all is ready."""
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    api.forbidden.add(("list", "rayclusters"))
    engine = config(tmp_path, ("max_num_seqs: 256", "max_num_seqs: 128"))
    assert run("deploy", engine, "--no-wait").exit_code == 0
    with pytest.raises(Forbidden, match="not allowed to list RayCluster"):
        run("deploy", config(tmp_path, ("max_replicas: 2", "max_replicas: 3")), "--no-wait")


@pytest.mark.parametrize("command", ["deploy", "diff", "rollback"])
def test_nothing_is_applied_to_what_is_being_deleted(
    api: KubeAPI, operator: Operator, run: Callable[..., Result], command: str
) -> None:
    run("deploy", str(CONFIG), "--no-wait")
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    api.delete("rayservices", SPACE, NAME)
    before = api.get("rayservices", SPACE, NAME)
    of = NAME if command == "rollback" else str(CONFIG)
    how = ("--to", "1", "--no-wait") if command == "rollback" else ()
    with pytest.raises(UserError, match=f"{NAME} is being deleted, .*; deploy again when"):
        run(command, of, *how)
    assert api.get("rayservices", SPACE, NAME) == before
    assert "  it is being deleted\n" in run("status", NAME).output


def test_what_is_deleted_meanwhile_ends_the_wait(
    api: KubeAPI, operator: Operator, run: Callable[..., Result]
) -> None:
    """While its pods drain it is still there, and its models may run."""
    later(api, lambda: api.delete("rayservices", SPACE, NAME))
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    with pytest.raises(UserError, match=f"somebody deletes {NAME}"):
        run("deploy", str(CONFIG), "--timeout", "30")

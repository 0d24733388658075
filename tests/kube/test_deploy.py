"""deploy, status, diff, rollback and logs against an API server over HTTP (kube_api.py)."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from controllers import Refused, cluster_of_pods, delete_cluster, evict
from deploying import (
    BIGGER,
    CONFIG,
    GATEWAY_API,
    GROUPS,
    NAME,
    NOPE,
    OPERATORS,
    RUNNING,
    SMALL,
    SPACE,
    answers,
    config,
    deployed,
    edited,
    later,
    node,
    owners,
    pod,
    pool,
    service,
    set_status,
    started,
)
from kube_api import KubeAPI
from operator_model import Operator, running, wanted

from serve_app.config.document import DEPLOYMENT
from serve_app.errors import UserError
from serve_app.kuberay import cli
from serve_app.kuberay.live import follow, reasons, revisions
from serve_app.kuberay.live.api_server import APIServer
from serve_app.kuberay.live.change import Change
from serve_app.kuberay.live.podlogs import readable
from serve_app.kuberay.live.target import Target
from serve_app.replica.no_route import NoRoute

# --- deploy -------------------------------------------------------------------------------------


def test_a_first_deployment_is_applied_watched_and_every_model_asked(
    api: KubeAPI, operator: Operator, run: Callable[..., Result]
) -> None:
    asked = answers(api)
    operator.outcome = lambda application: ("DEPLOYING", "loading weights")
    operator.machines.unready.add("h100-x4")
    later(api, operator.settle, operator.heal, operator.settle)
    result = run("deploy", str(CONFIG))
    out = result.output
    assert result.exit_code == 0, out
    assert f"llama70b in serve-app on {api.url}: this creates the RayService (4 GPUs)" in out
    assert "warning: h100-x4 needs 4 more GPUs, but 0 can be had" in out
    assert "--force" not in out  # nothing is in the way of a first deployment
    assert "applied RayService llama70b" in out and "revision 1; back with" in out
    assert "next llama-3.3-70b: DEPLOYING: loading weights" in out
    assert "h100-x4 pods: 1 running" in out
    assert out.rstrip().endswith("ready: every model answers")
    # The model was asked by a real request through the Service; the gateway is no model.
    body = {"model": "llama-3.3-70b", "prompt": "ready?", "max_tokens": 1}
    assert asked == [("llama70b-serve-svc:serve", "/v1/completions", body)]
    kinds = {kind for kind, _, _ in api.objects}
    assert {"rayservices", "ingresses", "poddisruptionbudgets", "networkpolicies"} <= kinds


def test_one_model_that_does_not_run_is_not_ready(
    api: KubeAPI, operator: Operator, run: Callable[..., Result], tmp_path: Path
) -> None:
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    operator.outcome = lambda application: (
        ("DEPLOYING", "loading weights") if "engine" in application["args"] else ("RUNNING", "")
    )
    changed = config(tmp_path, ("max_num_seqs: 256", "max_num_seqs: 128"))
    later(api, operator.settle)
    with pytest.raises(
        UserError, match=r"is not ready after 2 s: llama-3.3-70b: DEPLOYING: loading weights"
    ):
        run("deploy", changed, "--timeout", "2")
    # KubeRay says Ready as soon as there is one endpoint.
    assert "Ready: yes (NonZeroServeEndpoints)" in run("status", NAME).output


def test_a_model_that_runs_but_does_not_answer_is_an_error(
    api: KubeAPI, run: Callable[..., Result]
) -> None:
    deployed(api, run)
    api.proxy = lambda *_: (503, '{"error": {"message": "no replica"}}')
    with pytest.raises(UserError, match=r"llama-3.3-70b answers HTTP 503: .*no replica"):
        run("status", NAME)


def no_route(model: str, path: str, tasks: list[str], routes: list[str]) -> tuple[int, str]:
    """What a model server says of a route that it has not."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path}
    asyncio.run(NoRoute(model, tasks, routes)(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], sent[1]["body"].decode()


@pytest.mark.parametrize(
    ("tasks", "routes", "asked_for"),
    [
        (["embed"], ["/v1/embeddings", "/pooling"], ["/v1/completions", "/pooling"]),
        (["transcription"], ["/v1/audio/transcriptions"], ["/v1/completions", "/pooling"]),
    ],
)
def test_a_model_that_completes_nothing_is_asked_what_it_answers(
    api: KubeAPI,
    run: Callable[..., Result],
    tasks: list[str],
    routes: list[str],
    asked_for: list[str],
) -> None:
    """vLLM takes many a model for an embedding model by itself, whatever the config says."""
    deployed(api, run)
    asked: list[str] = []

    def proxy(method: str, name: str, path: str, body: Any) -> tuple[int, str]:
        asked.append(path)
        return (200, "{}") if path in routes else no_route("m", path, tasks, routes)

    api.proxy = proxy
    assert run("status", NAME).output.rstrip().endswith("ready: every model answers")
    assert asked == asked_for


def test_a_model_server_of_an_older_image_is_understood(
    api: KubeAPI, run: Callable[..., Result]
) -> None:
    """Its 404 was FastAPI's, which the gateway puts into the envelope without a code."""
    deployed(api, run)
    none = json.dumps({"error": {"message": "Not Found (POST /v1/completions)", "code": None}})
    api.proxy = lambda method, name, path, body: (200, "{}") if path == "/pooling" else (404, none)
    assert run("status", NAME).output.rstrip().endswith("ready: every model answers")


def test_a_model_that_the_gateway_does_not_know_is_an_error(
    api: KubeAPI, run: Callable[..., Result]
) -> None:
    deployed(api, run)
    unknown = {"error": {"message": "The model 'm' does not exist", "code": "model_not_found"}}
    api.proxy = lambda *_: (404, json.dumps(unknown))
    with pytest.raises(UserError, match=r"llama-3.3-70b answers HTTP 404: .*does not exist"):
        run("status", NAME)


def test_statuses_of_the_spec_before_do_not_count(
    api: KubeAPI, operator: Operator, run: Callable[..., Result], tmp_path: Path
) -> None:
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    changed = config(tmp_path, ("max_num_seqs: 256", "max_num_seqs: 128"))
    # The operator has not read the change yet: RUNNING is the old models'.
    with pytest.raises(UserError, match="is not ready after 1 s"):
        run("deploy", changed, "--timeout", "1")
    operator.settle()
    assert run("deploy", changed).output.rstrip().endswith("every model answers")


def test_a_failing_application_ends_the_wait_with_its_reason_and_the_pods(
    api: KubeAPI, run: Callable[..., Result]
) -> None:
    message = "Traceback …\n  File x\nValueError: max_model_len 99999 is too large\n"
    crashed = pod(
        "llama70b-gpu-1",
        "gpu",
        phase="Running",
        containerStatuses=[
            {
                "name": "ray-worker",
                "state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}},
            }
        ],
    )
    api.store("pods", crashed)
    failed = {"llama-3.3-70b": "DEPLOY_FAILED", "gateway": "RUNNING"}
    later(api, lambda: set_status(api, failed, message=message))
    with pytest.raises(UserError) as caught:
        run("deploy", str(CONFIG))
    text = str(caught.value)
    assert "application 'llama-3.3-70b': ValueError: max_model_len 99999 is too large" in text
    assert "pod llama70b-gpu-1: OOMKilled: container ray-worker ended with 137" in text
    assert "raise resources.memory_gib" in text and "\n" not in text


def test_the_reason_of_a_failed_update_is_that_of_its_deployment(
    api: KubeAPI, operator: Operator, run: Callable[..., Result], tmp_path: Path
) -> None:
    """As real Serve says it."""
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    run("deploy", config(tmp_path, NOPE), "--no-wait")
    operator.settle()
    line = "llama-3.3-70b: DEPLOY_FAILED: '/nope' is neither a folder nor a hub id"
    assert line in run("status", NAME).output


def test_the_failure_that_a_change_mends_is_not_that_of_the_change(
    operator: Operator, run: Callable[..., Result], tmp_path: Path
) -> None:
    """The operator reports the new generation a reconcile before the statuses of its spec."""
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    run("deploy", config(tmp_path, NOPE), "--no-wait")
    operator.settle()
    with running(operator):
        output = run("deploy", str(CONFIG)).output
    assert output.rstrip().endswith("ready: every model answers")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A config whose spec the operator refuses, by a rule that we do not have."""
    monkeypatch.setattr(
        wanted,
        "invalid",
        lambda service: "a new rule" if "max_num_seqs: 13" in str(service["spec"]) else None,
    )
    return config(tmp_path, ("max_num_seqs: 256", "max_num_seqs: 13"))


def test_a_spec_that_the_operator_refuses_ends_the_wait(
    operator: Operator, run: Callable[..., Result], refused: str
) -> None:
    with (
        running(operator),
        pytest.raises(UserError, match="refuses llama70b: a new rule"),
    ):
        run("deploy", refused)
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    # The refusal of an update has the generation of the spec before.
    with (
        running(operator),
        pytest.raises(UserError, match="refuses llama70b: a new rule"),
    ):
        run("deploy", refused)
    assert "refuses the current spec, or has not read it yet: a new" in run("status", NAME).output


def test_the_refusal_of_a_spec_is_not_that_of_its_correction(
    api: KubeAPI, operator: Operator, run: Callable[..., Result], refused: str
) -> None:
    """While the operator has not looked, it still reports the refusal."""
    for applied in (str(CONFIG), refused):
        run("deploy", applied, "--no-wait")
        operator.settle()
    later(api, lambda: time.sleep(2), operator.settle)
    assert run("deploy", str(CONFIG)).output.rstrip().endswith("ready: every model answers")


def test_what_keeps_everything_waiting_comes_first(
    api: KubeAPI, run: Callable[..., Result]
) -> None:
    deployed(api, run)
    document = service(api)
    api.change("rayservices", SPACE, NAME, spec=document["spec"] | {"suspend": True})
    with pytest.raises(UserError, match=r"is not ready after 1 s: it is suspended \(spec.suspend"):
        run("deploy", str(CONFIG), "--timeout", "1")
    api.change("rayservices", SPACE, NAME, spec=document["spec"] | {"suspend": False})
    assert "the operator has not taken up the current spec yet" in run("status", NAME).output


def test_models_of_which_nothing_is_reported_may_serve(
    operator: Operator, run: Callable[..., Result], image: Callable[[str], tuple[str, ...]]
) -> None:
    """So it is while a second cluster starts, and while the head is away."""
    run(*image("1"))
    operator.settle()
    operator.machines.gpus = 4
    run(*image("2"))
    operator.settle()
    output = run("status", NAME).output
    assert "  llama-3.3-70b: not reported" in output
    assert "next llama-3.3-70b: DEPLOYING" in output
    assert "NOT_STARTED" not in output


def test_an_api_server_that_is_away_for_seconds_ends_nothing(
    api: KubeAPI, operator: Operator, run: Callable[..., Result]
) -> None:
    def go_away() -> None:
        api.away_until = time.monotonic() + 3

    later(api, go_away, operator.settle)
    output = run("deploy", str(CONFIG)).output
    assert "cannot be reached; check the kubeconfig's server and the network; the deployment" in (
        output
    )
    assert output.rstrip().endswith("ready: every model answers")


def test_a_service_without_an_endpoint_is_asked_again(
    api: KubeAPI, operator: Operator, run: Callable[..., Result]
) -> None:
    """After a switch the operator turns it before the new gateways are Ready."""
    operator.machines.unready.add("gateway")

    def become_ready() -> None:
        while not asked():
            time.sleep(0.05)
        operator.heal()
        operator.settle()

    def asked() -> int:
        return sum("/proxy/v1/completions" in path for _, path in api.requests)

    later(api, operator.settle, become_ready)
    assert run("deploy", str(CONFIG)).output.rstrip().endswith("ready: every model answers")
    assert asked() > 1


def test_warnings_are_those_of_this_service_the_latest_last(
    api: KubeAPI, run: Callable[..., Result]
) -> None:
    deployed(api, run)
    set_status(api, {"llama-3.3-70b": "DEPLOYING"})
    api.store("pods", pod("llama70b-gpu-1", "gpu", phase="Pending"))
    ready = [{"type": "Ready", "status": "True"}]
    api.store("pods", pod("llama70b-gpu-2", "gpu", conditions=ready))
    events = [
        ("Pod", "llama70b-gpu-1", {"lastTimestamp": "2026-11-26T10:00:02Z"}),
        ("RayService", NAME, {"eventTime": "2026-11-26T10:00:01.000000Z"}),
        (
            "RayCluster",
            "llama70b-abcde",
            {
                "eventTime": "2026-11-26T09:00:00.000000Z",
                "series": {"lastObservedTime": "2026-11-26T10:00:03.000000Z"},
            },
        ),
        ("RayService", f"{NAME}-2node", {"lastTimestamp": "2026-11-26T10:00:04Z"}),
        ("Pod", "llama70b-gpu-0", {"lastTimestamp": "2026-11-26T10:00:05Z"}),  # long gone
        ("PodDisruptionBudget", f"{NAME}-gpu", {"lastTimestamp": "2026-11-26T10:00:06Z"}),
        ("Pod", "llama70b-gpu-2", {"lastTimestamp": "2026-11-26T10:00:07Z"}),  # Ready by now
        ("RayService", NAME, {"lastTimestamp": "2026-11-20T10:00:08Z"}),  # before the deployment
    ]
    for number, (kind, name, times) in enumerate(events):
        event = {
            "metadata": {"name": f"e{number}", "namespace": SPACE},
            "type": "Warning",
            "reason": "Why",
            "message": f"number {number}",
            "involvedObject": {"kind": kind, "name": name},
        }
        api.store("events", event | times)
    shown = re.findall(r"Why: number (\d)", run("status", NAME).output)
    assert shown == ["1", "0", "2"]


def test_a_timed_out_initialization_is_final(api: KubeAPI, run: Callable[..., Result]) -> None:
    run("deploy", str(CONFIG), "--no-wait")
    set_status(api, {}, message="30m", conditions={"Ready": ("False", "InitializingTimeout")})
    with pytest.raises(UserError, match="failed: InitializingTimeout: 30m"):
        run("deploy", str(CONFIG))


def test_pods_without_a_machine_are_explained(api: KubeAPI, run: Callable[..., Result]) -> None:
    run("deploy", str(CONFIG), "--no-wait")
    set_status(api, {"llama-3.3-70b": "DEPLOYING", "gateway": "RUNNING"})
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    }
    api.store("pods", pod("llama70b-gpu-1", "gpu", phase="Pending", conditions=[condition]))
    api.store(
        "events",
        {
            "metadata": {"name": "e1", "namespace": SPACE},
            "type": "Warning",
            "reason": "FailedToCreateRayCluster",
            "message": "quota exceeded",
            "eventTime": "2099-01-01T00:00:00.000000Z",
            "involvedObject": {"kind": "RayService", "name": NAME},
        },
    )
    result = run("status", NAME)
    assert result.exit_code == 1
    assert "gpu pods: 1 waiting for a machine" in result.output
    assert "! pod llama70b-gpu-1: Unschedulable: 0/3 nodes are available" in result.output
    assert "! RayService llama70b: FailedToCreateRayCluster: quota exceeded" in result.output


def test_the_same_again_changes_nothing(api: KubeAPI, run: Callable[..., Result]) -> None:
    deployed(api, run)
    before = service(api)["metadata"]["generation"]
    result = run("deploy", str(CONFIG), "--no-wait")
    assert "this changes nothing" in result.output and "revision 1;" in result.output
    assert service(api)["metadata"]["generation"] == before


def test_in_another_namespace_the_way_back_names_it(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("namespace: other\n")
    result = run("deploy", str(CONFIG), "--no-wait", "--cluster", str(profile))
    assert "back with: serve-app rollback llama70b -n other" in result.output


def test_advice_in_another_namespace_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kubeconfig: Path
) -> None:
    server = APIServer.connect(kubeconfig, None)
    target = Target(server, NAME, "other")
    monkeypatch.setattr(reasons, "explain", lambda target: ["no machine", "no volume"])
    said = follow._with_reasons(target, "it waits")
    assert said == "it waits; no machine (and 1 more: serve-app status llama70b -n other)"

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "follow", stopped)
    cli._wait(target, 1, Change("none", []), {})
    assert "goes on: serve-app status llama70b -n other" in capsys.readouterr().out
    assert Target(server, NAME, "serve-app").address == "llama70b"


def test_dry_run_changes_nothing(api: KubeAPI, run: Callable[..., Result]) -> None:
    before = set(api.objects)
    result = run("deploy", str(CONFIG), "--dry-run")
    assert "creates the RayService" in result.output
    assert set(api.objects) == before


def test_ctrl_c_detaches(api: KubeAPI, kubeconfig: Path) -> None:
    process = started("deploy", str(CONFIG), "--kubeconfig", str(kubeconfig))
    assert process.stdout is not None
    for line in process.stdout:
        if "NOT_STARTED" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(10) == 0, rest
    assert "no longer watching; the deployment goes on: serve-app status llama70b" in rest
    assert service(api)["metadata"]["name"] == NAME


@pytest.mark.parametrize(
    ("at", "says"),
    [
        ("dryRun=All", "stopped deploying llama70b: nothing was applied"),
        ("Strict", "stopped deploying llama70b: part of it is applied; run it again for the rest"),
    ],
    ids=["at the trial", "at the second object"],
)
def test_ctrl_c_before_all_is_applied_says_how_far_it_came(
    api: KubeAPI, kubeconfig: Path, at: str, says: str
) -> None:
    api.delay_s = 0.05  # time to interrupt it in
    process = started("deploy", str(CONFIG), "--kubeconfig", str(kubeconfig))
    applied = 0
    while process.poll() is None:
        writes = [path for method, path in api.requests if method == "PATCH"]
        trial = [path for path in writes if "dryRun=All" in path]
        applied = len(writes) - len(trial)
        if trial if at == "dryRun=All" else applied > 1:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    rest = process.stdout.read()
    assert process.wait(10) != 0
    assert says in rest, rest
    if at == "dryRun=All":
        assert api.get("rayservices", SPACE, NAME) is None


def test_what_runs_has_a_revision_wherever_a_deployment_is_interrupted(
    api: KubeAPI, run: Callable[..., Result]
) -> None:
    run("deploy", str(CONFIG), "--no-wait")
    writes = [path for method, path in api.requests if method != "GET" and "dryRun" not in path]
    after = writes[next(i for i, path in enumerate(writes) if "/rayservices/" in path) + 1]
    assert after.partition("?")[0].endswith("/controllerrevisions")
    assert "poddisruptionbudgets" in "".join(writes[writes.index(after) :])


# --- what a change would do ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            [("max_num_seqs: 256", "max_num_seqs: 128")],
            [
                "changes the running cluster in place",
                "application 'llama-3.3-70b' is deployed anew: args.engine.max_num_seqs 256 → 128",
            ],
        ),
        (
            [("max_replicas: 2", "max_replicas: 3")],
            ["in place", "worker group 'h100-x4': maxReplicas 3 → 4"],
        ),
        (
            [("min_replicas: 1", "min_replicas: 2")],
            ["in place (4 GPUs)", "worker group 'h100-x4': minReplicas 1 → 2"],
        ),
        (
            [("    replicas: 2\n", "    replicas: 2\n    num_cpus: 3\n")],
            ["starts a second cluster beside the running one", "workerGroupSpecs[0]"],
        ),
        ([("# Llama 3.3 70B", "# Our Llama 3.3 70B")], ["in place", "comments or order"]),
    ],
    ids=["engine", "max replicas", "min replicas", "pod size", "comment"],
)
def test_diff_tells_the_kind_of_change(
    api: KubeAPI,
    run: Callable[..., Result],
    tmp_path: Path,
    changes: list[tuple[str, str]],
    says: list[str],
) -> None:
    deployed(api, run)
    result = run("diff", config(tmp_path, *changes))
    assert result.exit_code == 1
    for text in says:
        assert text in result.output
    assert "+++ new RayService/llama70b" in result.output


def test_a_change_of_image_shows_both_where_they_differ(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    image = "123456789012.dkr.ecr.us-east-1.amazonaws.com/serve-app"
    profile = tmp_path / "profile.yaml"
    profile.write_text(f"image: {image}:0.1.0\n")
    run("deploy", str(CONFIG), "--no-wait", "--cluster", str(profile))
    profile.write_text(f"image: {image}:0.2.0\n")
    output = run("diff", str(CONFIG), "--cluster", str(profile)).output
    assert "image …aws.com/serve-app:0.1.0 → …aws.com/serve-app:0.2.0\n" in output


def test_a_group_that_goes_is_named(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    run("deploy", config(tmp_path, ("- name: gateway", SMALL)), "--no-wait")
    set_status(api, RUNNING)
    result = run("diff", str(CONFIG))
    change = result.output[result.output.index("\nthis ") :]
    assert "starts a second cluster beside the running one" in change
    assert "  worker group 'l4-x1' is removed\n" in change
    assert "workerGroupSpecs" not in change


def test_diff_of_the_same_is_empty(api: KubeAPI, run: Callable[..., Result]) -> None:
    deployed(api, run)
    result = run("diff", str(CONFIG))
    assert (result.exit_code, result.output) == (0, "this changes nothing\n")


def test_a_model_of_a_new_shape_is_appended_in_place(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    deployed(api, run)
    output = run("diff", config(tmp_path, ("- name: gateway", SMALL))).output
    assert "changes the running cluster in place (1 GPUs)" in output
    assert "application 'small' is added" in output
    assert "worker group 'l4-x1' is added" in output


@pytest.mark.parametrize(
    "other",
    [
        ("nodes", node(8, unschedulable=True)),
        ("nodes", node(8, ready="Unknown")),
        ("nodes", node(8, kind="g6e.48xlarge")),
        ("nodes", node(8) | {"spec": {"taints": [{"key": "mine", "effect": "NoSchedule"}]}}),
        ("nodepools", pool(64, 0, "g6e.48xlarge", "g6.48xlarge")),
    ],
    ids=["cordoned", "dead", "another kind", "another's", "a pool of another kind"],
)
def test_gpus_that_the_pods_cannot_get_do_not_count(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path, other: tuple[str, dict[str, Any]]
) -> None:
    deployed(api, run)
    api.store(*other)
    with pytest.raises(
        UserError, match=r"h100-x4 needs 4 more GPUs, but 0 can be had \(0 idle on nodes, 0 within"
    ):
        run("deploy", config(tmp_path, BIGGER), "--no-wait")
    api.store("nodes", node(4, "n2"))
    output = run("deploy", config(tmp_path, BIGGER), "--no-wait").output
    assert "h100-x4 needs 4 more GPUs; 4 idle on nodes, 0 within the NodePools' limits" in output


def test_a_gpu_is_promised_to_one_group_only(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    two = SMALL.replace("- name: gateway", "") + SMALL.replace("small", "other").replace(
        "accelerator_type: L4}", "accelerator_type: L4}, engine: {tensor_parallel_size: 4}"
    )
    api.store("nodes", node(4, kind="g6.12xlarge"))
    output = run("deploy", config(tmp_path, ("- name: gateway", two)), "--no-wait").output
    assert "l4-x1 needs 1 more GPUs; 4 idle on nodes" in output
    assert "l4-x4 needs 4 more GPUs, but 3 can be had (3 idle on nodes" in output


def test_a_new_cluster_without_gpus_for_two_is_refused(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    deployed(api, run)
    api.store("nodes", node(8))
    busy = pod("llama70b-gpu-1", "gpu", phase="Running")
    requests = {"resources": {"requests": {"nvidia.com/gpu": "6"}}}
    busy["spec"] = {"nodeName": "n1", "containers": [requests]}
    api.store("pods", busy)
    bigger = config(tmp_path, BIGGER)
    with pytest.raises(UserError, match=r"but 2 can be had \(2 idle.*there is no NodePool"):
        run("deploy", bigger, "--no-wait")
    api.store("nodepools", pool(8, 8))
    with pytest.raises(UserError, match="raise the NodePool"):
        run("deploy", bigger, "--no-wait")
    generation = service(api)["metadata"]["generation"]
    api.store("nodepools", pool(16, 8))
    output = run("deploy", bigger, "--no-wait").output
    assert "needs 4 more GPUs; 2 idle on nodes, 8 within the NodePools' limits" in output
    assert service(api)["metadata"]["generation"] == generation + 1


def test_who_may_not_see_nodes_is_told_so(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    deployed(api, run)
    api.forbidden.add(("list", "nodes"))
    bigger = config(tmp_path, BIGGER)
    assert "cannot tell if they exist" in run("deploy", bigger, "--no-wait").output


def test_a_change_that_kuberay_ignores_is_refused(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("upgrade: {strategy: None}\n".replace("None", "'None'"))
    run("deploy", str(CONFIG), "--no-wait", "--cluster", str(profile))
    set_status(api, RUNNING)
    bigger = config(tmp_path, BIGGER)
    with pytest.raises(UserError, match="KubeRay would ignore the change"):
        run("deploy", bigger, "--no-wait", "--cluster", str(profile))


# --- who owns which field -----------------------------------------------------------------------


def without_scale_strategy(api: KubeAPI, run: Callable[..., Result]) -> dict[str, Any]:
    """A RayService of the first version, deployed; returns what was applied."""
    run("deploy", str(CONFIG), "--no-wait")
    revision = api.objects["controllerrevisions", SPACE, f"{NAME}-r1"]
    old: dict[str, Any] = copy.deepcopy(revision["data"])
    for group in old["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        group.pop("scaleStrategy", None)
    api.remove("rayservices", SPACE, NAME)
    code, _ = api.apply("rayservices", old, "serve-app", force=False, dry_run=False)
    assert code == 201
    return old


def test_a_rayservice_of_an_older_version_is_deployed_without_force(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    without_scale_strategy(api, run)
    for adopted in (False, True):  # before and after the operator wrote the empty field in
        assert bool(service(api)["metadata"].get("finalizers")) == adopted
        result = run("diff", str(CONFIG))
        assert (result.exit_code, result.output) == (0, "this changes nothing\n")
        set_status(api, RUNNING)
    run("deploy", str(CONFIG), "--no-wait")
    grown = config(tmp_path, ("max_replicas: 2", "max_replicas: 3"))
    output = run("deploy", grown, "--no-wait").output
    assert "in place" in output and "maxReplicas 3 → 4" in output
    assert owners(api)[GROUPS] == {("serve-app", "Apply")}


def test_a_change_of_somebody_else_is_not_taken_over_with_the_operators(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    without_scale_strategy(api, run)
    set_status(api, RUNNING)
    edited(api, "kubectl-edit", rayClusterDeletionDelaySeconds=5)
    grown = config(tmp_path, ("max_replicas: 2", "max_replicas: 3"))
    with pytest.raises(UserError, match=r'2 conflicts: .*"kubectl-edit".*DeletionDelay'):
        run("deploy", grown, "--no-wait")
    assert owners(api)[GROUPS] == {OPERATORS}


# --- drains -------------------------------------------------------------------------------------

FIRST, SECOND, THIRD = "llama70b-abcde", "llama70b-fghij", "llama70b-klmno"


def drained(api: KubeAPI, cluster: str) -> list[str]:
    """Drain every machine of a cluster at once: the pods that may go."""
    gone = []
    for plural, space, name in list(api.objects):
        if plural == "pods" and name.startswith(cluster):
            try:
                evict(api, space, name)
                gone.append(name.removeprefix(f"{cluster}-"))
            except Refused as refused:
                assert refused.args[0] == 429, refused
    return gone


def test_a_drain_takes_one_pod_of_a_group_at_a_time_and_ends(
    api: KubeAPI, operator: Operator, run: Callable[..., Result]
) -> None:
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    (cluster,) = [document["metadata"]["name"] for document in api.all("rayclusters")]

    def gone() -> list[str]:
        return sorted(name.partition("-worker")[0] for name in drained(api, cluster))

    # Two gateways are always there. One model pod is: it must be able to go.
    assert gone() == ["gateway", "h100-x4"]
    assert gone() == []
    # Once they have gone and their replacements are Ready, the next may go.
    operator.settle()
    assert gone() == ["gateway", "h100-x4"]


def test_a_budget_of_an_older_version_is_mended_by_a_deployment(
    api: KubeAPI, run: Callable[..., Result]
) -> None:
    deployed(api, run)
    key = ("poddisruptionbudgets", SPACE, "llama70b-h100-x4")
    old = copy.deepcopy(api.objects[key])
    old["spec"] = {"selector": old["spec"]["selector"], "maxUnavailable": 1}
    api.remove(*key)
    api.apply(key[0], old, "serve-app", force=False, dry_run=False)
    run("deploy", str(CONFIG), "--no-wait")
    assert "maxUnavailable" not in api.objects[key]["spec"]
    cluster_of_pods(api, service(api), FIRST)
    assert "h100-x4-0" in drained(api, FIRST)


ONE_OF_EACH = ["gateway-0", "h100-x4-0"]
"""What may go of a cluster of two gateways and one model pod: the head, without Redis, may not."""


def test_while_an_upgrade_has_two_clusters_each_keeps_its_own_pods(
    api: KubeAPI, run: Callable[..., Result], image: Callable[[str], tuple[str, ...]]
) -> None:
    """Over labels common to both, three of four gateways and one of two heads could go."""
    run(*image("1"))
    set_status(api, RUNNING)
    cluster_of_pods(api, service(api), FIRST)
    output = run(*image("2")).output
    assert f"applied PodDisruptionBudget {FIRST}-gateway" in output
    cluster_of_pods(api, service(api), SECOND)
    assert drained(api, FIRST) == ONE_OF_EACH
    assert drained(api, SECOND) == ONE_OF_EACH


def test_a_rollback_into_a_third_cluster_keeps_the_pods_of_all(
    api: KubeAPI, run: Callable[..., Result], image: Callable[[str], tuple[str, ...]]
) -> None:
    run(*image("1"))
    set_status(api, RUNNING)
    for tag, cluster in (("2", FIRST), ("3", SECOND)):
        cluster_of_pods(api, service(api), cluster)
        run(*image(tag))
    cluster_of_pods(api, service(api), THIRD)
    run("rollback", NAME, "--no-wait")
    for cluster in (FIRST, SECOND, THIRD):
        assert drained(api, cluster) == ONE_OF_EACH


def test_after_an_upgrade_the_rendered_budgets_are_enough_again(
    api: KubeAPI,
    run: Callable[..., Result],
    image: Callable[[str], tuple[str, ...]],
    tmp_path: Path,
) -> None:
    run(*image("1"))
    set_status(api, RUNNING)
    cluster_of_pods(api, service(api), FIRST)
    run(*image("2"))
    cluster_of_pods(api, service(api), SECOND)
    set_status(api, RUNNING, active=SECOND)
    # In place, while the old cluster is still there: no pod may come under two budgets.
    more = config(tmp_path, ("    replicas: 2\n", "    replicas: 2\n    request_timeout_s: 800\n"))
    command, _, *options = image("2")
    run(command, more, *options)
    assert drained(api, FIRST) == ONE_OF_EACH
    delete_cluster(api, SPACE, FIRST)
    run(command, more, *options)
    budgets = {key[2]: o for key, o in api.objects.items() if key[0] == "poddisruptionbudgets"}
    assert set(budgets) == {f"{NAME}-gateway", f"{NAME}-h100-x4", f"{NAME}-head"}
    assert all("matchExpressions" not in b["spec"]["selector"] for b in budgets.values())
    assert drained(api, SECOND) == ONE_OF_EACH


def test_who_may_not_list_clusters_is_told_what_it_costs(
    api: KubeAPI, run: Callable[..., Result], image: Callable[[str], tuple[str, ...]]
) -> None:
    run(*image("1"))
    set_status(api, RUNNING)
    cluster_of_pods(api, service(api), FIRST)
    api.forbidden.add(("list", "rayclusters"))
    output = run(*image("2")).output
    assert "not allowed to list RayCluster" in output
    assert "the budgets count the pods of both clusters together" in output
    assert "applied PodDisruptionBudget llama70b-gateway" in output


# --- rollback and logs --------------------------------------------------------------------------


def test_rollback_applies_the_revision_before(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    deployed(api, run)
    original = service(api)["spec"]["serveConfigV2"]
    run("deploy", config(tmp_path, ("max_num_seqs: 256", "max_num_seqs: 1")), "--no-wait")
    assert service(api)["spec"]["serveConfigV2"] != original
    result = run("rollback", NAME, "--no-wait")
    assert "args.engine.max_num_seqs 1 → 256" in result.output and "revision 3" in result.output
    assert service(api)["spec"]["serveConfigV2"] == original
    revisions = [o for (kind, _, _), o in api.objects.items() if kind == "controllerrevisions"]
    assert sorted(r["revision"] for r in revisions) == [1, 2, 3]


def test_old_revisions_are_dropped(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revisions, "KEEP", 2)
    for count in range(1, 5):
        changed = config(tmp_path, ("max_num_seqs: 256", f"max_num_seqs: {count}"))
        run("deploy", changed, "--no-wait")
    kept = [
        o["revision"] for (kind, _, _), o in api.objects.items() if kind == "controllerrevisions"
    ]
    assert sorted(kept) == [3, 4]


def test_ten_revisions_are_kept(api: KubeAPI, kubeconfig: Path) -> None:
    target = Target(APIServer.connect(kubeconfig), NAME, SPACE)
    for count in range(1, 13):
        assert revisions.record(target, {"spec": {"count": count}}) == count
        kept = [revision["revision"] for revision in revisions.history(target)]
        assert kept == list(range(max(1, count - 9), count + 1))


def test_rollback_takes_nothing_of_others_unasked(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    deployed(api, run)
    run("deploy", config(tmp_path, ("max_num_seqs: 256", "max_num_seqs: 128")), "--no-wait")
    edited(api, "kubectl-edit", rayClusterDeletionDelaySeconds=5)
    with pytest.raises(UserError, match='conflict with "kubectl-edit"'):
        run("rollback", NAME, "--no-wait")
    run("rollback", NAME, "--no-wait", "--force")
    assert service(api)["spec"]["rayClusterDeletionDelaySeconds"] == 960


def test_rollback_without_history_and_to_an_unknown_revision(
    api: KubeAPI, run: Callable[..., Result]
) -> None:
    deployed(api, run)
    with pytest.raises(UserError, match="llama70b has no earlier revision"):
        run("rollback", NAME)
    with pytest.raises(UserError, match=r"llama70b has no revision 7 \(known: 1\)"):
        run("rollback", NAME, "--to", "7")


def test_logs_are_those_of_the_model(api: KubeAPI, run: Callable[..., Result]) -> None:
    def line(file: str, text: str) -> str:
        return json.dumps({"file": f"/tmp/ray/session_latest/logs/serve/{file}", "log": text})

    api.store("pods", pod("llama70b-head", "head"))
    api.store("pods", pod("llama70b-gpu-1", "gpu"))
    api.logs["llama70b-gpu-1", "logs"] = [
        line("replica_llama-3.3-70b_ModelServer_ab.log", "loading"),
        line("replica_other_ModelServer_cd.log", "not mine"),
    ]
    api.logs["llama70b-gpu-1", "ray-worker previous"] = ["Killed"]
    # The head has no log yet: no error beside a pod that has one.
    assert run("logs", NAME, "llama-3.3-70b").output == "llama70b-gpu-1: loading\n"
    assert "llama70b-gpu-1: not mine\n" in run("logs", NAME).output
    assert run("logs", NAME, "--previous").output == "llama70b-gpu-1: Killed\n"
    deployed(api, run)
    with pytest.raises(UserError, match="llama70b has no model 'llama-70b'; did you mean"):
        run("logs", NAME, "llama-70b")
    with pytest.raises(UserError, match="other has no pods in namespace serve-app"):
        run("logs", "other")


def test_logs_of_a_model_are_not_those_of_one_whose_name_begins_alike() -> None:
    """File names are Ray Serve's own: this fails where an upgrade changes them."""
    from ray.serve._private.common import ServeComponentType
    from ray.serve._private.utils import get_component_file_name

    def line(application: str) -> str:
        name = get_component_file_name(
            component_name=f"{application}_{DEPLOYMENT}",
            component_id="k3x9a1bc",
            component_type=ServeComponentType.REPLICA,
            suffix=".log",
        )
        return json.dumps({"file": f"/tmp/ray/session_latest/logs/serve/{name}", "log": name})

    for model in ("a", "a_b", "a_ModelServer", "x_replica_a", "org/a"):
        assert readable(line(model), model) is not None, model
        for other in {"a", "a_b", "a_ModelServer", "a_ModelServer_b", "x_replica_a"} - {model}:
            assert readable(line(other), model) is None, (model, other)


# --- what goes wrong on the way -----------------------------------------------------------------


def test_no_kubeconfig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kubernetes.config import kube_config

    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UserError, match="no kubeconfig and not inside a cluster; run aws eks"):
        APIServer.connect()
    with pytest.raises(UserError, match="mine: no such kubeconfig"):
        APIServer.connect(tmp_path / "mine")


def test_an_unknown_context(kubeconfig: Path) -> None:
    with pytest.raises(UserError, match=r"has no context 'there'; did you mean 'here'\?"):
        APIServer.connect(kubeconfig, "there")


def test_a_credential_plugin_that_fails_is_told(
    kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kubernetes package would log it, and go on as system:anonymous."""
    config = yaml.safe_load(kubeconfig.read_text())
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "no-such-aws"}
    config["users"][0]["user"] = {"exec": plugin | {"interactiveMode": "Never"}}
    kubeconfig.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"credentials failed \(.*no-such-aws.*aws sso login"):
        APIServer.connect(kubeconfig)
    assert "no-such-aws" not in "".join(capsys.readouterr())


def test_a_cluster_without_kuberay(api: KubeAPI, run: Callable[..., Result]) -> None:
    del api.resources["ray.io/v1"]
    with pytest.raises(UserError, match=r"no kind RayService; install KubeRay's operator"):
        run("deploy", str(CONFIG))


def test_refused_credentials(api: KubeAPI, tmp_path: Path) -> None:
    path = api.kubeconfig(tmp_path / "k", token="old")
    with pytest.raises(UserError, match="refuses these credentials"):
        APIServer.connect(path).get("RayService", NAME, SPACE)


def test_forbidden_says_what_may_not_be_done(api: KubeAPI, run: Callable[..., Result]) -> None:
    api.forbidden.add(("patch", "ingresses"))
    with pytest.raises(
        UserError, match=r"not allowed to apply Ingress llama70b: ingresses is forb"
    ):
        run("deploy", str(CONFIG))


def test_forbidden_proxy_leaves_the_answer_open(api: KubeAPI, run: Callable[..., Result]) -> None:
    deployed(api, run)
    api.forbidden.add(("get", "proxy"))
    result = run("status", NAME)
    assert result.exit_code == 0
    assert "every model is RUNNING (not allowed to reach services" in result.output


def test_a_conflict_names_the_field_and_its_owner(api: KubeAPI, run: Callable[..., Result]) -> None:
    deployed(api, run)
    edited(api, "kubectl-edit", rayClusterDeletionDelaySeconds=5)
    with pytest.raises(
        UserError,
        match=r'1 conflict: conflict with "kubectl-edit" using ray.io/v1: '
        r"\.spec\.rayClusterDeletionDelaySeconds \(--force takes it over\)",
    ):
        run("deploy", str(CONFIG), "--no-wait")
    assert service(api)["spec"]["rayClusterDeletionDelaySeconds"] == 5
    run("deploy", str(CONFIG), "--no-wait", "--force")
    assert service(api)["spec"]["rayClusterDeletionDelaySeconds"] == 960


def test_a_namespace_that_is_not_there_yet_is_made(
    api: KubeAPI, run: Callable[..., Result]
) -> None:
    api.remove("namespaces", "", SPACE)
    run("deploy", str(CONFIG), "--dry-run")
    assert api.get("namespaces", "", SPACE) is None
    run("deploy", str(CONFIG), "--no-wait")
    assert service(api)["metadata"]["namespace"] == SPACE


@pytest.mark.parametrize("missing", ["gatewayclasses", "targetgroupconfigurations"])
def test_without_the_namespace_a_missing_kind_is_found_before_anything_is_made(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path, missing: str
) -> None:
    api.remove("namespaces", "", SPACE)
    for version, kinds in GATEWAY_API.items():
        api.resources[version] = {k: v for k, v in kinds.items() if k != missing}
    profile = tmp_path / "profile.yaml"
    profile.write_text("upgrade: {strategy: NewClusterWithIncrementalUpgrade}\n")
    kind = next(kinds[missing][0] for kinds in GATEWAY_API.values() if missing in kinds)
    with pytest.raises(UserError, match=f"no kind {kind}; install the AWS Load Balancer Contr"):
        run("deploy", str(CONFIG), "--cluster", str(profile), "--no-wait")
    assert api.objects == {}


def test_without_the_namespace_what_needs_none_is_tried_before_anything_is_made(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path
) -> None:
    api.remove("namespaces", "", SPACE)
    api.resources |= GATEWAY_API
    api.forbidden.add(("patch", "gatewayclasses"))
    profile = tmp_path / "profile.yaml"
    profile.write_text("upgrade: {strategy: NewClusterWithIncrementalUpgrade}\n")
    with pytest.raises(UserError, match="not allowed to apply GatewayClass serve-app-alb"):
        run("deploy", str(CONFIG), "--cluster", str(profile), "--no-wait")
    assert api.objects == {}
    api.forbidden.clear()
    run("deploy", str(CONFIG), "--cluster", str(profile), "--no-wait")
    assert service(api)["metadata"]["namespace"] == SPACE


def test_an_address_that_nobody_listens_on(api: KubeAPI, tmp_path: Path) -> None:
    path = api.kubeconfig(tmp_path / "k", server="http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"API server http://127.0.0.1:9: it cannot be reached"):
        APIServer.connect(path).get("RayService", NAME, SPACE)


def test_a_server_that_does_not_answer_in_time(
    api: KubeAPI, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = APIServer.connect(kubeconfig)
    api.delay_s = 2.0
    with pytest.raises(UserError, match="it does not answer in time"):
        server._send("GET", "/api/v1/nodes", timeout_s=0.2)


def test_an_answer_that_is_no_api_servers(api: KubeAPI, kubeconfig: Path) -> None:
    api.proxy = lambda *_: (200, "<html>sign in</html>")
    server = APIServer.connect(kubeconfig)
    with pytest.raises(UserError, match="did not answer as an API server does"):
        server._checked("get", "Pod", "x", 200, "<html>sign in</html>")


def test_a_deleted_rayservice_ends_the_wait(api: KubeAPI, run: Callable[..., Result]) -> None:
    later(api, lambda: api.remove("rayservices", SPACE, NAME))
    with pytest.raises(UserError, match=r"was deleted while|no RayService llama70b in namespace"):
        run("deploy", str(CONFIG))


def test_an_expired_watch_starts_anew(api: KubeAPI, run: Callable[..., Result]) -> None:
    answers(api)
    api.expired_below = 10**9
    later(api, lambda: set_status(api, RUNNING))
    assert "ready: every model answers" in run("deploy", str(CONFIG), "--timeout", "20").output


def test_the_apis_are_asked_by_server_side_apply_only(
    api: KubeAPI, run: Callable[..., Result]
) -> None:
    run("deploy", str(CONFIG), "--no-wait")
    writes = [(m, p) for m, p in api.requests if m not in ("GET",)]
    applied = [p for m, p in writes if m == "PATCH"]
    assert all("fieldManager=serve-app" in p and "fieldValidation=Strict" in p for p in applied)
    dry = [p for p in applied if "dryRun=All" in p]
    assert len(dry) * 2 == len(applied)  # each once for trial, once in earnest
    assert [re.sub(r"\?.*", "", p) for m, p in writes if m == "POST"] == [
        f"/apis/apps/v1/namespaces/{SPACE}/controllerrevisions"
    ]

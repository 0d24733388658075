"""The autoscaling policy, alone and inside what Serve puts around it, on simulated engines."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import (
    DeploymentID,
    ReplicaID,
    ReplicaMetricReport,
    TimeStampedValue,
)
from ray.serve.config import AutoscalingConfig

from benchmarks.autoscaling_trace import Moment, simulate
from serve_app.cluster.autoscaling import (
    LoadPolicy,
    deployment_options,
    engine_load,
    replicas_for,
    total_load,
)
from serve_app.config.settings import Autoscaling, ModelConfig
from serve_app.replica import load as load_module
from serve_app.replica.load import EngineLoad, Limits, PreemptionWatch, preemption_warning
from serve_app.replica.recorder import Recorder


def context(*, target: int, running: int, queued: float = 0.0, **metrics: float) -> Any:
    """What Serve's controller would show the policy; ``metrics`` hold for every replica."""
    return SimpleNamespace(
        target_num_replicas=target,
        current_num_replicas=running,
        total_queued_requests=queued,
        aggregated_metrics={
            name: dict.fromkeys(range(running), value) for name, value in metrics.items()
        },
    )


def decide(policy: LoadPolicy, **kwargs: Any) -> int:
    return policy(context(**kwargs))[0]


# The policy alone


def test_fewer_only_where_every_replica_has_told_what_it_does() -> None:
    policy = LoadPolicy(target_load=0.5)
    idle = context(target=3, running=3, capacity=10.0)
    assert policy(idle)[0] == 0
    del idle.aggregated_metrics["capacity"][1]
    assert policy(idle)[0] == 3


def test_what_is_in_the_front_end_says_nothing_of_its_kv_cache() -> None:
    seen = context(target=1, running=1, in_front_end=15.0, kv_cache_usage=0.5, capacity=256.0)
    seen.aggregated_metrics["running"] = {0: 1.0}
    assert LoadPolicy(target_load=0.7)(seen)[0] == 1


@pytest.mark.parametrize(
    ("running", "waiting", "usage", "load"),
    [
        (0, 0, 0.0, 0.0),
        (32, 0, 0.0, 0.5),
        (64, 64, 0.0, 2.0),
        (8, 0, 0.9, 0.9),  # few requests, but they fill the KV cache
        (8, 8, 1.0, 2.0),  # and as many again wait for it
        (0, 16, 0.0, 0.25),  # nothing runs yet
    ],
)
def test_the_load_of_an_engine(running: int, waiting: int, usage: float, load: float) -> None:
    assert engine_load(running, waiting, 64, usage) == pytest.approx(load)


def test_requests_at_the_gateway_count_by_the_mean_capacity() -> None:
    metrics = {"capacity": {"a": 10.0, "b": 30.0}, "running": {"a": 5.0, "b": 15.0}}
    assert total_load(metrics, queued=20) == pytest.approx(0.5 + 0.5 + 1.0)


def test_replicas_that_have_not_reported_add_nothing() -> None:
    assert total_load({}, queued=5) == 0.0
    assert total_load({"capacity": {"a": 0.0}}, queued=0) == 0.0


def test_exactly_the_target_needs_no_further_replica() -> None:
    assert replicas_for(2 * 0.7, 0.7) == 2
    assert replicas_for(2 * 0.7 + 0.01, 0.7) == 3


def test_more_load_adds_and_less_load_removes_only_below_the_slack() -> None:
    policy = LoadPolicy(target_load=0.7, slack=0.2)
    assert decide(policy, target=2, running=2, capacity=100.0, waiting=0.0) == 0
    assert decide(policy, target=2, running=2, capacity=100.0, waiting=80.0) == 3
    assert decide(policy, target=2, running=2, capacity=100.0, waiting=34.0) == 2  # 0.68 on one
    assert decide(policy, target=2, running=2, capacity=100.0, waiting=27.0) == 1  # 0.54 on one


def test_any_load_at_all_keeps_one_replica() -> None:
    assert decide(LoadPolicy(0.7), target=1, running=1, capacity=1024.0, waiting=0.01) == 1


def test_many_waiting_requests_wake_one_replica() -> None:
    policy = LoadPolicy(0.7)
    assert decide(policy, target=0, running=0, queued=50) == 1
    assert decide(policy, target=0, running=0) == 0


def test_replicas_that_are_all_still_starting_are_left_alone() -> None:
    assert decide(LoadPolicy(0.7), target=3, running=0) == 3
    assert decide(LoadPolicy(0.7), target=3, running=0, queued=500) == 3


def test_replicas_that_run_but_do_not_report_are_left_alone() -> None:
    assert decide(LoadPolicy(0.7), target=2, running=2) == 2
    assert decide(LoadPolicy(0.7), target=2, running=2, capacity=0.0) == 2


# Inside Serve


def test_the_options_are_ones_that_serve_takes() -> None:
    model = ModelConfig(
        model="m", autoscaling=Autoscaling(min_replicas=0, max_replicas=3, target_load=0.5)
    )

    @serve.deployment
    class Deployment:
        pass

    built: Any = Deployment.options(**deployment_options(model))
    config = built._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas) == (0, 3)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy.target_load == 0.5


def test_a_fixed_number_of_replicas_is_a_number_of_gangs() -> None:
    assert deployment_options(ModelConfig(model="m")) == {"num_replicas": 1}
    model = ModelConfig(model="m", replicas=2, engine={"data_parallel_size": 4})
    assert deployment_options(model) == {"num_replicas": 8}


def test_bounds_count_ranks_too() -> None:
    autoscaling = Autoscaling(min_replicas=1, max_replicas=3, initial_replicas=2)
    model = ModelConfig(model="m", engine={"data_parallel_size": 4}, autoscaling=autoscaling)
    config = deployment_options(model)["autoscaling_config"]
    assert [config[f"{name}_replicas"] for name in ("min", "initial", "max")] == [4, 8, 12]


def test_autoscaling_works_where_vllm_does_not_log_its_statistics() -> None:
    """It keeps them for our stat logger all the same: tests/vllm/test_statistics.py."""
    model = ModelConfig(
        model="m", engine={"disable_log_stats": True}, autoscaling=Autoscaling(max_replicas=2)
    )
    assert deployment_options(model)["autoscaling_config"]["max_replicas"] == 2


def test_the_policy_travels_by_value() -> None:
    """Serve's controller may run in an environment that has no serve_app."""
    autoscaling = Autoscaling(max_replicas=2)
    options = deployment_options(ModelConfig(model="m", autoscaling=autoscaling))
    policy = AutoscalingConfig(**options["autoscaling_config"]).policy
    code = (
        "import sys; sys.modules['serve_app'] = None\n"
        "import pickle, types\n"
        f"cls = pickle.loads({policy.get_serialized_policy_def()!r})\n"
        "context = types.SimpleNamespace(target_num_replicas=1, current_num_replicas=1,\n"
        "    total_queued_requests=0.0,\n"
        "    aggregated_metrics={'capacity': {0: 10.0}, 'waiting': {0: 14.0}})\n"
        "print(cls(target_load=0.7)(context)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"


def test_serve_shows_the_policy_what_replicas_report() -> None:
    """``record_autoscaling_stats`` arrives under the names that the policy reads."""
    load = EngineLoad("m")
    load.attach(vllm_config(max_num_seqs=10))
    load.record(step(running=10, waiting=4), None)
    deployment = DeploymentID(name="ModelServer", app_name="m")
    replica = ReplicaID("r", deployment)
    state = DeploymentAutoscalingState(deployment)
    state._config = AutoscalingConfig(max_replicas=5)
    state.update_running_replica_ids([replica])
    now = time.time()
    series = {name: [TimeStampedValue(now - 1, value)] for name, value in load.stats().items()}
    state.record_request_metrics_for_replica(
        ReplicaMetricReport(replica_id=replica, timestamp=now, metrics=series)
    )
    assert LoadPolicy(0.7)(state.get_autoscaling_context(1))[0] == 2


# On simulated engines: a capacity of 32 requests, 10 s for each, 60 s to start a replica


def changes(moments: list[Moment]) -> int:
    targets = [moment.target for moment in moments]
    return sum(a != b for a, b in itertools.pairwise(targets))


def last(moments: list[Moment], seconds: float) -> list[Moment]:
    return [moment for moment in moments if moment.time >= moments[-1].time - seconds]


@pytest.mark.parametrize("load", [0.3, 0.69, 0.7, 0.71, 1.37, 1.4, 1.43, 2.5])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_steady_load_settles_and_stays(load: float, noise: float) -> None:
    settings = Autoscaling(max_replicas=8, initial_replicas=4)
    moments = simulate(lambda _: 3.2 * load, 3600, settings, noise=noise)
    assert changes(last(moments, 2400)) <= 1  # and that one is not taken back
    needed = replicas_for(load, 0.7)
    assert needed <= moments[-1].target <= needed + 1


def test_a_step_is_answered_within_seconds_and_in_full() -> None:
    settings = Autoscaling(max_replicas=8)
    moments = simulate(lambda t: 1.6 if t < 300 else 11.2, 1800, settings)
    assert all(moment.target == 1 for moment in moments if moment.time < 300)
    soon = next(moment for moment in moments if moment.time >= 300 + 10 + 15)
    assert soon.target >= 5
    assert moments[-1].target >= 5
    assert moments[-1].waiting == 0


def test_load_that_grows_and_falls_is_followed_one_way_at_a_time() -> None:
    settings = Autoscaling(max_replicas=8)
    moments = simulate(lambda t: 12 * max(0.0, 1 - abs(t - 1500) / 1500), 4200, settings)
    targets = [moment.target for moment in moments]
    peak = targets.index(max(targets))
    assert targets[:peak] == sorted(targets[:peak])
    assert targets[peak:] == sorted(targets[peak:], reverse=True)
    assert targets[-1] == 1
    assert max(targets) >= 5


def test_going_down_takes_the_downscale_delay() -> None:
    settings = Autoscaling(max_replicas=8, initial_replicas=4, downscale_delay_s=300)
    moments = simulate(lambda _: 1.0, 900, settings)
    first_less = next(moment.time for moment in moments if moment.target < 4)
    assert first_less >= 300


def test_a_burst_shorter_than_the_delay_changes_nothing() -> None:
    settings = Autoscaling(max_replicas=8, upscale_delay_s=30)
    moments = simulate(lambda t: 6.0 if 300 <= t < 315 else 0.5, 900, settings)
    assert changes(moments) == 0


def test_idle_goes_to_zero_and_a_request_wakes_one_replica() -> None:
    settings = Autoscaling(
        min_replicas=0, max_replicas=4, initial_replicas=1, downscale_delay_s=120
    )
    moments = simulate(lambda t: 1.0 if t < 100 or t >= 600 else 0.0, 900, settings, start_s=30)
    cold = [moment for moment in moments if 400 <= moment.time < 600]
    assert all(moment.target == 0 for moment in cold)
    waking = [moment for moment in moments if 600 <= moment.time < 630]
    assert all(moment.target == 1 for moment in waking)
    assert last(moments, 10)[-1].waiting == 0


def test_a_full_kv_cache_counts_where_the_number_of_requests_does_not() -> None:
    settings = Autoscaling(max_replicas=8)
    trace = {"capacity": 256, "kv_capacity": 8}
    moments = simulate(lambda t: 0.4 if t < 300 else 1.6, 1500, settings, **trace)
    assert moments[-1].target >= 3  # 16 requests at once, 8 to an engine
    assert moments[-1].waiting == 0


def test_the_bounds_hold() -> None:
    settings = Autoscaling(min_replicas=2, max_replicas=3)
    moments = simulate(lambda t: 50.0 if t < 300 else 0.0, 1500, settings)
    assert {moment.target for moment in moments} == {2, 3}


# What an engine reports


def vllm_config(max_num_seqs: int = 256) -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=8192),
        model_config=SimpleNamespace(max_model_len=32768),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
        cache_config=SimpleNamespace(
            gpu_memory_utilization=0.9, kv_cache_size_tokens=120_000, enable_prefix_caching=True
        ),
    )


def step(running: int = 0, waiting: int = 0, skipped: int = 0, usage: float = 0.0) -> Any:
    return SimpleNamespace(
        num_running_reqs=running,
        num_waiting_reqs=waiting,
        num_skipped_waiting_reqs=skipped,
        kv_cache_usage=usage,
    )


def iteration(tokens: int = 0, preempted: int = 0, finished: int = 0) -> Any:
    return SimpleNamespace(
        num_generation_tokens=tokens,
        num_preempted_reqs=preempted,
        finished_requests=[None] * finished,
    )


def test_an_engine_reports_its_latest_step_and_its_rates() -> None:
    now = [100.0]
    load = EngineLoad("m", clock=lambda: now[0])
    assert load.attach(vllm_config(max_num_seqs=64), 0) is load
    load.record(step(running=3, waiting=1, skipped=2, usage=0.25), iteration(tokens=40))
    load.record(None, iteration(tokens=60, preempted=1))
    now[0] += 2
    assert load.stats() == {
        "running": 3,
        "waiting": 3,
        "in_front_end": 0,
        "capacity": 64,
        "kv_cache_usage": 0.25,
        "preemptions": 1,
        "tokens_per_s": 50.0,
    }
    assert load.stats(answering=9)["in_front_end"] == 3
    assert load.stats(answering=2)["in_front_end"] == 0  # one request may be several to the engine
    load.record(step(), None)
    now[0] += 2
    assert load.stats()["tokens_per_s"] == 0.0
    assert load.stats()["running"] == 0


def test_an_engine_that_has_not_started_reports_no_capacity() -> None:
    assert EngineLoad("m").stats()["capacity"] == 0


def test_the_first_request_of_an_engine_is_done_once_it_is_finished() -> None:
    load = EngineLoad("m")
    load.record(step(running=1), iteration(tokens=1))
    assert not load.first_request_done
    load.record(step(), iteration(finished=1))
    load.record(step(running=1), iteration(tokens=1))
    assert load.first_request_done


def test_it_is_what_vllm_calls() -> None:
    vllm = importlib.util.find_spec("vllm")  # importing it takes seconds
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(vllm.origin).parent / "v1/metrics/loggers.py").read_text()
    base = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "StatLoggerBase"
    )
    wanted = {node.name for node in base.body if isinstance(node, ast.FunctionDef)}
    assert {"record", "log"} <= wanted
    assert wanted <= set(dir(EngineLoad)) and wanted <= set(dir(Recorder))


def test_preemptions_warn_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(load_module.logger, "warning", warnings.append)
    now = [0.0]
    load = EngineLoad("m", clock=lambda: now[0])
    load.attach(vllm_config())
    for _ in range(2000):
        now[0] += 0.5
        load.record(step(running=40), iteration(preempted=1))
    assert len(warnings) == 2  # in 1000 s
    assert "m: 10 requests were preempted" in warnings[0]


def test_few_preemptions_are_not_worth_a_warning() -> None:
    watch = PreemptionWatch(many=10, window_s=60)
    assert all(watch.add(1, now=10.0 * tick) == 0 for tick in range(500))


def test_the_warning_has_the_models_numbers_and_the_remedies() -> None:
    text = preemption_warning("llama", 37, 12, Limits.of(vllm_config()))
    assert "\n" not in text
    for part in (
        "llama: 37 requests",
        "120,000 tokens, 3.7 requests of max_model_len",
        "raise gpu_memory_utilization (0.9) to 0.95",
        "lower max_num_seqs (256) to 12",
        "lower max_num_batched_tokens (8192)",
        "raise tensor_parallel_size (2)",
        "lower max_model_len (32768)",
    ):
        assert part in text
    text = preemption_warning("m", 37, 12, Limits.of(vllm_config(), "gpu_share"))
    assert "best first: give it a larger part of the GPU (resources.gpu_share), lower max" in text
    assert "gpu_memory_utilization" not in text and "tensor_parallel_size" not in text
    full = Limits(256, 8192, 4096, 1, gpu_memory_utilization=0.97)
    assert "gpu_memory_utilization" not in preemption_warning("m", 10, 256, full)

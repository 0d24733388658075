"""Serve settings that cut or ignore what a user meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.processes import REPO
from ray.serve.schema import HTTPOptionsSchema

from serve_app.config import keys
from serve_app.config.document import Fleet, load, parse_document
from serve_app.config.notices import HTTP_OPTIONS, ignored_by_running_serve, notices


def fleet_of(
    model: dict[str, Any] | None = None, gateway: dict[str, Any] | None = None, **document: Any
) -> Fleet:
    """A model that drains for 600 s, a gateway that does for 600 s, and these overrides."""
    applications: list[dict[str, Any]] = [
        {
            "name": "m",
            "route_prefix": None,
            "import_path": "serve_app.model:app",
            "args": {"model": "org/model"},
        },
        {"name": "gateway", "route_prefix": "/", "import_path": "serve_app.gateway:app"},
    ]
    if model is not None:
        applications[0]["deployments"] = [{"name": "ModelServer", **model}]
    if gateway is not None:
        applications[1]["deployments"] = [{"name": "Gateway", **gateway}]
    return parse_document({"applications": applications, **document}, Path("c.yaml"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"http_options": {"request_timeout_s": 30}},
            "http_options.request_timeout_s is 30: Serve ends every answer after that many seconds,"
            " a stream without an error event or [DONE]",
        ),
        (
            {"http_options": {"request_timout_s": 30}},
            "http_options.request_timout_s is no option of Serve, which ignores it; did you mean "
            "'request_timeout_s'?",
        ),
        ({"http_options": {"cors": True}}, "which ignores it; remove it"),
        ({"proxy_location": "Disabled"}, "no node opens the OpenAI endpoint"),
        (
            {"model": {"autoscaling_config": {"max_replicas": 4}}},
            "application 'm': deployments: autoscaling_config takes the place of what the model's "
            "args come to; set args.autoscaling, ",
        ),
        ({"model": {"ray_actor_options": {"num_cpus": 4}}}, "set args.resources"),
        ({"model": {"max_ongoing_requests": 5}}, "max_ongoing_requests has no effect"),
        (
            {"model": {"graceful_shutdown_timeout_s": 20}},
            "graceful_shutdown_timeout_s is 20: Serve kills a stopping replica then, in the middle "
            "of requests that have 600 s to finish",
        ),
        ({"model": {"health_check_timeout_s": 2}}, "health_check_timeout_s is 2, below Serve's 30"),
        (
            {"gateway": {"max_ongoing_requests": 5}},
            "application 'gateway': deployments: max_ongoing_requests is 5: further requests",
        ),
        ({"gateway": {"max_queued_requests": 0}}, "max_queued_requests is 0: Serve answers"),
        ({"gateway": {"graceful_shutdown_timeout_s": 20}}, "that have 600 s to finish"),
        ({"gateway": {"ray_actor_options": {"num_cpus": 2}}}, "set args.num_cpus"),
    ],
)
def test_what_cuts_or_ignores_what_was_meant_is_said(changed: dict[str, Any], said: str) -> None:
    [sentence] = notices(fleet_of(**changed))
    assert said in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    "harmless",
    [
        {"http_options": {"request_timeout_s": -1, "keep_alive_timeout_s": 30}},
        {"http_options": {"request_timeout_s": None}},
        {"model": {"user_config": {"adapters": []}, "graceful_shutdown_timeout_s": 700}},
        {"model": {"health_check_timeout_s": 60, "max_replicas_per_node": 1, "num_replicas": 2}},
        {"gateway": {"max_queued_requests": -1, "autoscaling_config": {"max_replicas": 3}}},
        {"gateway": {"logging_config": {"enable_access_log": True}}, "proxy_location": "HeadOnly"},
    ],
)
def test_what_does_as_it_says_needs_no_word(harmless: dict[str, Any]) -> None:
    assert notices(fleet_of(**harmless)) == []


def with_keys(tmp_path: Path, *entries: dict[str, Any]) -> Fleet:
    """A model with an alias and two adapters, one of them live, and these keys."""
    file = tmp_path / "keys.yaml"
    named = [{"name": f"k{n}", "hash": keys.new()[1], **it} for n, it in enumerate(entries)]
    file.write_text(yaml.safe_dump(named))
    lora = {"name": "poet", "path": "/poet"}
    model = {"model": "org/m", "served_as": ["org/m"], "adapters": [lora]}
    live = [{"name": "ModelServer", "user_config": {"adapters": [lora | {"name": "live"}]}}]
    applications = [
        {"name": "m", "route_prefix": None, "import_path": "serve_app.model:app", "args": model,
         "deployments": live},
        {"name": "gateway", "route_prefix": "/", "import_path": "serve_app.gateway:app",
         "args": {"keys": {"file": str(file)}}},
    ]  # fmt: skip
    return parse_document({"applications": applications}, Path("c.yaml"))


def test_a_key_with_limits_for_what_it_may_not_use_is_said(tmp_path: Path) -> None:
    limits = {"requests_per_minute": 1}
    fleet = with_keys(
        tmp_path,
        {"models": ["m"], "model_limits": {"org/m": limits, "live": limits}},
        {"model_limits": {"m": limits, "mm": limits}},
        {"models": ["org/*", "live", "nothing*"]},
        {"model_limits": {"mm": limits}},
    )
    where = tmp_path / "keys.yaml"
    assert notices(fleet) == [
        f"{where}: key k0: model_limits has 'live', which the key may not use; add it to its "
        "models",
        f"{where}: key k1 (and 1 more): model_limits has 'mm', but there is no such model here"
        "; did you mean 'm'?",
        f"{where}: key k2: models has 'nothing*', but there is no such model here",
    ]


def test_many_keys_for_other_models_are_not_a_line_each(tmp_path: Path) -> None:
    fleet = with_keys(tmp_path, *({"models": [f"other-{n}"]} for n in range(9)))
    said = notices(fleet)
    assert len(said) == 6
    assert said[-1] == f"{tmp_path / 'keys.yaml'}: 4 more of its models are not in this config"


def test_keys_that_cannot_be_read_here_are_no_notice(tmp_path: Path) -> None:
    fleet = with_keys(tmp_path, {})
    (tmp_path / "keys.yaml").unlink()
    assert notices(fleet) == []


def test_prompts_in_traces_without_a_receiver_are_said() -> None:
    document = fleet_of().document
    document["applications"][1]["args"] = {"trace_content": True}
    [sentence] = notices(parse_document(document, Path("c.yaml")))
    assert sentence.startswith("the gateway's trace_content has no effect without otlp_endpoint")
    document["applications"][1]["args"]["otlp_endpoint"] = "http://localhost:4318"
    assert notices(parse_document(document, Path("c.yaml"))) == []


@pytest.mark.parametrize(
    ("fallback", "said"),
    [
        (
            ["smal"],
            "fallback skips 'smal', which is no model of this config; did you mean 'small'?",
        ),
        (["small", "org/small", "law"], None),
        (["zebra"], "fallback skips 'zebra', which is no model of this config"),
    ],
)
def test_a_fallback_that_is_not_there_is_said(fallback: list[str], said: str | None) -> None:
    document = fleet_of().document
    document["applications"][0]["args"]["fallback"] = fallback
    small = {"model": "org/small", "served_as": ["org/small"], "engine": {"enable_lora": True}}
    adapters = {"adapters": [{"name": "law", "path": "/law"}]}
    document["applications"].append(
        {
            "name": "small",
            "route_prefix": None,
            "import_path": "serve_app.model:app",
            "args": small,
            "deployments": [{"name": "ModelServer", "user_config": adapters}],
        }
    )
    expected = [f"application 'm': {said}"] if said else []
    assert notices(parse_document(document, Path("c.yaml"))) == expected


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_configs_need_no_word(path: Path) -> None:
    assert notices(load(path)) == []


def test_http_options_that_a_running_serve_ignores_are_said() -> None:
    fleet = fleet_of(http_options={"host": "127.0.0.1", "port": 8000, "keep_alive_timeout_s": 9})
    running = {"host": "0.0.0.0", "port": 8000, "root_path": "/x"}
    [sentence] = ignored_by_running_serve(fleet, running)
    assert "http_options.host ('0.0.0.0' there), http_options.keep_alive_timeout_s (" in sentence
    assert "port" not in sentence
    assert ignored_by_running_serve(fleet, fleet.document["http_options"]) == []


def test_serve_has_the_http_options_that_are_listed() -> None:
    assert HTTPOptionsSchema.model_validate({"prot": 1}).model_dump() == HTTP_OPTIONS

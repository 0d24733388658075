"""Notices about valid settings that cut off or ignore something that the user meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from serve_app.config import keys
from serve_app.config.document import GATEWAY_IMPORT_PATH, MODEL_IMPORT_PATH, Fleet, answering
from serve_app.config.settings import ids_of
from serve_app.errors import ConfigError, did_you_mean

HTTP_OPTIONS: dict[str, Any] = {
    "host": "0.0.0.0",
    "port": 8000,
    "root_path": "",
    "request_timeout_s": None,
    "keep_alive_timeout_s": 90,
    "ssl_keyfile": None,
    "ssl_certfile": None,
    "ssl_keyfile_password": None,
    "ssl_ca_certs": None,
}
"""Serve 2.60's ``HTTPOptionsSchema`` with its defaults; Serve drops every other key silently."""

_SHUT_DOWN = "set what it has, or shut it down first (serve shutdown)"

HEALTH_CHECK_TIMEOUT_S = 30.0
"""Seconds that Serve waits by default for the answer to one health check."""

_ASKED_OTHERWISE = {
    "autoscaling_config": "args.autoscaling, whose policy reads the engine's load: Serve's counts "
    "requests that go through Serve, and those of a model do not",
    "ray_actor_options": "args.resources and args.env",
    "placement_group_bundles": "args.resources and engine's parallel sizes",
}
"""Overrides of a model's deployment that replace its ``args``, and the settings to use instead."""

_PAST_SERVE = ("max_ongoing_requests", "max_queued_requests", "request_router_config")
"""Overrides without effect on a model, because the gateway's requests bypass Serve."""


def notices(fleet: Fleet) -> list[str]:
    """One sentence for each setting that does not do what it seems to."""
    return [
        *_of_http(fleet),
        *_of_deployments(fleet),
        *_of_traces(fleet),
        *_of_keys(fleet),
        *_of_fallbacks(fleet),
    ]


def ignored_by_running_serve(
    fleet: Fleet, running: Mapping[str, Any], again: str | None = None
) -> list[str]:
    """One sentence where the config's ``http_options`` differ from ``running``.

    ``running`` are the options of the Serve that runs already, which keeps them. Options that it
    was not given are left out. ``again`` says what to do about it, if not
    ``serve shutdown``.
    """
    options = fleet.http_options
    there = HTTP_OPTIONS | dict(running)
    differ = [key for key in options if key in HTTP_OPTIONS and options[key] != there[key]]
    if not differ:
        return []
    keys = ", ".join(f"http_options.{key} ({there[key]!r} there)" for key in differ)
    return [f"the Serve that runs already ignores {keys}; {again or _SHUT_DOWN}"]


def _of_http(fleet: Fleet) -> Iterator[str]:
    for key in fleet.http_options:
        if key not in HTTP_OPTIONS:
            hint = did_you_mean(str(key), HTTP_OPTIONS) or "; remove it"
            yield f"http_options.{key} is no option of Serve, which ignores it{hint}"
    limit = _number(fleet.http_options.get("request_timeout_s"))
    if limit is not None and limit >= 0:  # below 0 means no limit to Serve
        yield (
            f"http_options.request_timeout_s is {limit:g}: Serve ends every answer after that many "
            "seconds, a stream without an error event or [DONE]; remove it, and bound the silence "
            "of a replica with the gateway's args.request_timeout_s"
        )
    if fleet.document.get("proxy_location") == "Disabled":
        yield "proxy_location is Disabled: no node opens the OpenAI endpoint; set EveryNode"


def _of_deployments(fleet: Fleet) -> Iterator[str]:
    for application in fleet.document["applications"]:
        for override in application.get("deployments") or []:
            where = f"application '{application['name']}': deployments:"
            if application["import_path"] == MODEL_IMPORT_PATH:
                drain = fleet.models[application["name"]].graceful_shutdown_timeout_s
                found = [*_of_model(override), *_of_both(override, drain)]
            elif application["import_path"] == GATEWAY_IMPORT_PATH and fleet.gateway:
                drain = fleet.gateway.graceful_shutdown_timeout_s
                found = [*_of_gateway(override), *_of_both(override, drain)]
            else:
                continue  # not ours
            yield from (f"{where} {sentence}" for sentence in found)


def _of_model(override: Mapping[str, Any]) -> Iterator[str]:
    for key, instead in _ASKED_OTHERWISE.items():
        if key in override:
            yield f"{key} takes the place of what the model's args come to; set {instead}"
    for key in _PAST_SERVE:
        if key in override:
            yield (
                f"{key} has no effect, because the gateway sends a model's requests past Serve; "
                "engine.max_num_seqs is what one replica runs at once"
            )


def _of_gateway(override: Mapping[str, Any]) -> Iterator[str]:
    if (most := override.get("max_ongoing_requests")) is not None:
        yield (
            f"max_ongoing_requests is {most}: further requests to a gateway process wait in Serve, "
            "without a limit in time and before the gateway has seen them; remove it"
        )
    queued = _number(override.get("max_queued_requests"))
    if queued is not None and queued >= 0:  # Serve's -1 is no limit
        yield (
            f"max_queued_requests is {queued:g}: Serve answers what goes "
            "beyond with 503 and plain text, not with an OpenAI error; remove it"
        )
    if "ray_actor_options" in override:
        yield (
            "ray_actor_options takes the place of what the gateway's args come to; set "
            "args.num_cpus"
        )


def _of_both(override: Mapping[str, Any], drain_s: float) -> Iterator[str]:
    patience = _number(override.get("graceful_shutdown_timeout_s"))
    if patience is not None and patience < drain_s:
        yield (
            f"graceful_shutdown_timeout_s is {patience:g}: Serve kills a stopping replica then, in "
            f"the middle of requests that have {drain_s:g} s to finish; set "
            "args.graceful_shutdown_timeout_s instead"
        )
    answer = _number(override.get("health_check_timeout_s"))
    if answer is not None and answer < HEALTH_CHECK_TIMEOUT_S:
        yield (
            f"health_check_timeout_s is {answer:g}, below Serve's {HEALTH_CHECK_TIMEOUT_S:g}: "
            "a replica that is only busy is then replaced, and its requests are lost; remove it"
        )


def _of_traces(fleet: Fleet) -> Iterator[str]:
    gateway = fleet.gateway
    if gateway and gateway.trace_content and not gateway.otlp_endpoint:
        yield (
            "the gateway's trace_content has no effect without otlp_endpoint, which names the "
            "receiver of traces; set that, or remove trace_content"
        )


def _of_fallbacks(fleet: Fleet) -> Iterator[str]:
    """Fallbacks that are not there; another config of the same cluster may have them."""
    models = answering(fleet)
    known = [id for name, model in models.items() for id in ids_of(name, model)]
    for name, model in models.items():
        for id in model.fallback:
            if id not in known:
                yield (
                    f"application '{name}': fallback skips '{id}', which is no model of this "
                    f"config{did_you_mean(id, known)}"
                )


_MOST_OF_KEYS = 5


def _of_keys(fleet: Fleet) -> Iterator[str]:
    """Models that the keys name and that this config has not, or not for that key."""
    source = fleet.gateway.keys if fleet.gateway else None
    try:
        found = keys.read(source) if source else []
    except ConfigError:  # whoever needs them here says so
        return
    models: list[set[str]] = []
    for name, model in answering(fleet).items():
        models += [{name, *model.served_as}, *({a.name} for a in model.adapters)]
    names: dict[str, list[str]] = {}
    for key in found:
        for problem in keys.out_of_reach(key, models):
            names.setdefault(problem, []).append(key.name)
    where = source and (source.file or source.secret_env)
    for problem, of in list(names.items())[:_MOST_OF_KEYS]:
        others = f" (and {len(of) - 1} more)" if len(of) > 1 else ""
        yield f"{where}: key {of[0]}{others}: {problem}"
    if len(names) > _MOST_OF_KEYS:
        yield f"{where}: {len(names) - _MOST_OF_KEYS} more of its models are not in this config"


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)

"""What a block or a span of YAML in the documentation is, and whether our parsers take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from serve_app.config import document, engine_args, keys
from serve_app.config.settings import GatewayConfig, ModelConfig, parse
from serve_app.kuberay.render.profile import ClusterProfile
from serve_app.kuberay.validate.judge import judge, refuse_errors

OTHERS = {
    "model_list": "LiteLLM's config; tests of `serve-app convert` have it",
    "litellm_settings": "LiteLLM's config",
    "llm_configs": "Ray Serve LLM's config; tests of `serve-app convert` have it",
    "services": "Docker's compose file",
    "jobs": "a workflow of GitHub's",
    "scrape_configs": "Prometheus'",
    "repos": "pre-commit's",
}
"""The first key of a file that is not ours, with whose it is."""

_GATEWAY = {
    "name": "gateway",
    "route_prefix": "/",
    "import_path": document.GATEWAY_IMPORT_PATH,
}
_SETTINGS: tuple[type[BaseModel], ...] = (ModelConfig, GatewayConfig, ClusterProfile)


class NotOurs(AssertionError):
    """A key that neither a config, nor settings, nor a profile has."""


def check(text: str, *, span: bool = False) -> None:
    """Parse a block as what it is: a config or a part of it, a profile, manifests.

    A ``span`` may have ``…`` for its values; then only its keys are looked at.

    Raises:
        NotOurs: no parser is for it.
        UserError: its parser refuses it.
        yaml.YAMLError: it is no YAML.
    """
    for value in yaml.safe_load_all(text):
        if isinstance(value, dict) and not OTHERS.keys() & value.keys():
            _check_mapping(value, loose=span and "…" in text, span=span)
        elif isinstance(value, list) and all(isinstance(v, dict) for v in value):
            if any("hash" in entry for entry in value):
                keys.parse_all([e | {"hash": keys.digest(b"")} for e in value], "fragment")
            else:
                _check_applications(value)


def _check_mapping(value: dict[str, Any], *, loose: bool, span: bool) -> None:
    if {"apiVersion", "kind"} <= value.keys():
        refuse_errors(judge([value], None))
        return
    if "applications" in value:
        document.parse_document(value, Path("fragment"))
        return
    if _taken(value, loose) or (span and _nested(value)):
        return
    if len(value) > 1:
        # Lines of two files, each of which says whose it is.
        for key, one in value.items():
            _check_mapping({key: one}, loose=loose, span=span)
        return
    raise NotOurs(
        f"'{next(iter(value))}' is no key of a config, of its settings or of a profile; if it "
        "belongs to a program of others, add it to tests/docs/fragments.py"
    )


def _taken(value: dict[str, Any], loose: bool) -> bool:
    """Whether something of ours has all of these keys; its parser then has taken the values."""
    given = value.keys()
    if given <= set(document._DOCUMENT_KEYS):
        document.parse_document({"applications": [_GATEWAY], **value}, Path("fragment"))
        return True
    for kind in _SETTINGS:
        if given <= kind.model_fields.keys():
            if not loose:
                parse(kind, ({"model": "org/model"} if kind is ModelConfig else {}) | value, "here")
            return True
    if given <= engine_args.table().keys():
        if not loose:
            engine_args.check(value)
        return True
    if given <= set(document._APPLICATION_KEYS):
        if not loose:
            _check_applications([value])
        return True
    return given <= set(document._DEPLOYMENT_KEYS)


def _nested(value: dict[str, Any]) -> bool:
    """Whether a setting of a sentence belongs into ``autoscaling``, ``upgrade`` or the like."""
    for kind in _kinds():
        if value.keys() <= kind.model_fields.keys():
            parse(kind, value, "here")
            return True
    return False


def _check_applications(applications: list[dict[str, Any]]) -> None:
    """A list of applications, or of what an application has a list of."""
    if all("import_path" in application for application in applications):
        document.parse_document({"applications": applications}, Path("fragment"))
        return
    base = {"name": "m", "route_prefix": None, "import_path": document.MODEL_IMPORT_PATH}
    for application in applications:
        whole = {"args": {"model": "org/model"}, **base, **application}
        if "name" in application and not application.keys() - set(document._DEPLOYMENT_KEYS):
            whole = {**base, "args": {"model": "org/model"}, "deployments": [application]}
        document.parse_document({"applications": [whole]}, Path("fragment"))


def setting_names() -> set[str]:
    """Every name of a setting: of ours, of Serve's files, of profiles, and of vLLM's arguments."""
    found = {*document._DOCUMENT_KEYS, *document._APPLICATION_KEYS, *document._DEPLOYMENT_KEYS}
    found |= {name for kind in _kinds() for name in kind.model_fields}
    return found | engine_args.table().keys()


def _kinds() -> list[type[BaseModel]]:
    """Every model of settings: those of whole files, and those within them."""
    found: list[type[BaseModel]] = []
    waiting = list(_SETTINGS)
    while waiting:
        kind = waiting.pop()
        found.append(kind)
        for field in kind.model_fields.values():
            waiting += _models_in(field.annotation)
    return found


def is_setting(path: str) -> bool:
    """Whether a dotted path, such as ``resources.memory_gib``, leads to a setting.

    It may start at a model's or the gateway's application, at their ``args``, or at a profile.
    """
    first, *rest = path.removeprefix("args.").split(".")
    if first == "http_options":
        return True  # Serve's own, which `serve-app run` compares with the installed Serve
    if first == "engine":
        return not rest or rest[0] in engine_args.table()
    if first == "env":
        return True
    if first in document._APPLICATION_KEYS and not rest:
        return True
    if first == "gateway" and _leads(GatewayConfig, rest):
        return True
    return any(_leads(kind, [first, *rest]) for kind in _SETTINGS)


def _leads(kind: type[BaseModel], path: list[str]) -> bool:
    if not path:
        return True
    field = kind.model_fields.get(path[0])
    if field is None:
        return False
    inner = _models_in(field.annotation)
    return len(path) == 1 or any(_leads(one, path[1:]) for one in inner)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    inner = getattr(annotation, "__args__", ())
    if inner:
        return [kind for one in inner for kind in _models_in(one)]
    ours = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if ours else []

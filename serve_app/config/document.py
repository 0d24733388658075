"""The Serve config file: its models and its gateway, read and checked.

``serve run``, ``serve deploy`` and a RayService's ``serveConfigV2`` take the same file unchanged.
Each model is one application whose ``args`` are a :class:`ModelConfig`. The gateway is one more
application, with :class:`GatewayConfig`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve_app.addresses import ANY_IPV6
from serve_app.config import foreign, placeholders, yaml_files
from serve_app.config.settings import (
    GatewayConfig,
    LiveConfig,
    ModelConfig,
    Resources,
    ids_of,
    parse,
)
from serve_app.errors import ConfigError, did_you_mean

MODEL_IMPORT_PATH = "serve_app.model:app"
GATEWAY_IMPORT_PATH = "serve_app.gateway:app"
DEPLOYMENT = "ModelServer"
"""Name of the one deployment in a model's application."""

GATEWAY_DEPLOYMENT = "Gateway"
"""Name of the one deployment in the gateway's application."""

RUN_ID = "SERVE_APP_RUN_ID"
"""Environment variable with the id of a ``serve-app run``, which its GET /ready repeats."""

OPERATOR_HASH = "SERVE_APP_OPERATOR_HASH"
"""Environment variable with the hash of a key that ``serve-app run`` makes for itself and for the
commands beside it. It is an admin's, and ends with the run."""

USAGE_DB = "SERVE_APP_USAGE_DB"
"""Environment variable with the URL of the gateway's ``usage_db`` where its args name none. Empty:
none."""

API_KEY = "SERVE_APP_API_KEY"
"""Environment variable with the key that commands send to a server of which they have none."""


@dataclass(frozen=True)
class Fleet:
    """A config file that has been read and checked.

    ``models`` holds each model's settings by its application's name, in the file's order;
    ``document`` is the file's content, as Serve takes it, without ``x-`` keys.
    """

    path: Path
    document: dict[str, Any]
    models: dict[str, ModelConfig]
    gateway: GatewayConfig | None

    @property
    def http_options(self) -> dict[str, Any]:
        """The file's ``http_options``."""
        return self.document.get("http_options") or {}

    @property
    def port(self) -> int:
        """The port of the OpenAI endpoint (Serve's default is 8000)."""
        return int(self.http_options.get("port") or 8000)

    @property
    def host(self) -> str:
        """The OpenAI endpoint's address to listen on (Serve's default for files is 0.0.0.0)."""
        return str(self.http_options.get("host") or "0.0.0.0")

    @property
    def on_ipv6(self) -> bool:
        """Whether the endpoint listens on IPv6, as in clusters whose pods have IPv6 addresses."""
        return self.host == ANY_IPV6

    def require_gateway(self) -> None:
        """Raise ConfigError if no client could reach a model."""
        if self.gateway is None:
            raise ConfigError(
                f"{self.path}: there is no gateway; add an application with "
                f"import_path {GATEWAY_IMPORT_PATH} and route_prefix /"
            )

    def start_hint(self, relative: str) -> str:
        """``"; start it in <folder>, …"`` where a path is missing here, but not from a folder above
        the file, as a checkout's models are; or an empty string."""
        if not relative or os.path.isabs(relative) or os.path.exists(relative):
            return ""
        above = self.path.resolve().parents
        folder = next((folder for folder in above if os.path.exists(folder / relative)), None)
        return f"; start it in {folder}, where that is" if folder else ""

    def on_port(self, port: int) -> Fleet:
        """A copy with another ``http_options.port``."""
        options = self.http_options | {"port": port}
        return replace(self, document=self.document | {"http_options": options})


def load(path: str | Path) -> Fleet:
    """Read a config file and check everything that needs neither a GPU nor a cluster.

    Raises:
        ConfigError: the file, the application and the key, and what to change, in one line.
    """
    path = Path(path)
    return parse_document(yaml_files.read(path), path)


_APPLICATION_KEYS = (
    "name", "route_prefix", "import_path", "args", "deployments", "runtime_env",
    "logging_config", "autoscaling_policy", "external_scaler_enabled", "host", "port",
)  # fmt: skip
_DEPLOYMENT_KEYS = (
    "name", "num_replicas", "max_ongoing_requests", "max_queued_requests", "backpressure_config",
    "user_config", "autoscaling_config", "graceful_shutdown_wait_loop_s",
    "graceful_shutdown_timeout_s", "health_check_period_s", "health_check_timeout_s",
    "ray_actor_options", "placement_group_bundles", "placement_group_strategy",
    "placement_group_bundle_label_selector", "max_replicas_per_node", "logging_config",
    "request_router_config", "gang_scheduling_config", "deployment_actors",
    "rolling_update_percentage", "max_surge_percent",
)  # fmt: skip
_DOCUMENT_KEYS = (
    "applications", "http_options", "grpc_options", "proxy_location", "logging_config",
    "target_capacity", "controller_options",
)  # fmt: skip


def parse_document(document: Any, path: Path) -> Fleet:
    """Check a config that has been read already. ``path`` names it in errors.

    Its own keys that start with ``x-`` (pieces to refer to, as in docker compose) are left out.
    """
    refuse_foreign(document, path)
    refuse_shapeless(document, path)
    document = {key: value for key, value in document.items() if not str(key).startswith("x-")}
    for key in document:
        if key not in _DOCUMENT_KEYS:
            hint = did_you_mean(str(key), _DOCUMENT_KEYS)
            raise ConfigError(f"{path}: '{key}' is not a key of a Serve config{hint}")
    _check_http_options(path, document.get("http_options"))
    applications = document["applications"]
    models: dict[str, ModelConfig] = {}
    live: dict[str, ModelConfig] = {}
    gateway: GatewayConfig | None = None
    seen: set[str] = set()
    for position, application in enumerate(applications, 1):
        where, name = _check_application(path, position, application)
        if name in seen:
            raise ConfigError(f"{where}: two applications have this name; rename one")
        seen.add(name)
        if application["import_path"] == MODEL_IMPORT_PATH:
            models[name] = parse(ModelConfig, application.get("args"), where)
            _check_model_application(where, application)
            live[name] = _with_live(where, models[name], application)
            own = ids_of(name, live[name])
            if itself := next((id for id in live[name].fallback if id in own), None):
                raise ConfigError(f"{where}: fallback has '{itself}', the model itself; remove it")
        elif application["import_path"] == GATEWAY_IMPORT_PATH:
            if gateway is not None:
                raise ConfigError(f"{where}: a second gateway; one serves all models")
            gateway = parse(GatewayConfig, application.get("args"), where)
            if application.get("route_prefix", "/") != "/":
                raise ConfigError(f"{where}: the gateway needs 'route_prefix: /'")
    refuse_shared_ids(live, where=str(path))
    return Fleet(path, document, models, gateway)


def refuse_shapeless(document: Any, path: Path) -> None:
    """Refuse what is no config at all, before its parts are looked at.

    Raises:
        ConfigError: there is no list of applications in it.
    """
    if document is None:
        raise ConfigError(f"{path}: the file is empty; `serve-app run MODEL --save` writes one")
    if not isinstance(document, dict) or "applications" not in document:
        keys = map(str, document) if isinstance(document, dict) else ()
        hints = (f" (there is '{key}'{did_you_mean(key, _DOCUMENT_KEYS)})" for key in keys
                 if did_you_mean(key, ["applications"]))  # fmt: skip
        raise ConfigError(
            f"{path}: not a Serve config: it has no 'applications' list{next(hints, '')}"
        )
    if not isinstance(document["applications"], list) or not document["applications"]:
        raise ConfigError(f"{path}: 'applications' must be a list with at least one model")


def refuse_foreign(document: Any, path: Path) -> None:
    """Say of another program's config how ours is made of it.

    Raises:
        ConfigError: it is one.
    """
    if program := foreign.recognize(document):
        file = path if path.is_file() else "FILE"  # else it is a place in a manifest
        raise ConfigError(
            f"{path}: this is a config of {program}; `serve-app convert {file} -o fleet.yaml` "
            "writes ours"
        )


def _check_http_options(path: Path, options: Any) -> None:
    if options is None:
        return
    if not isinstance(options, dict):
        raise ConfigError(f"{path}: http_options must be a mapping, such as {{port: 8000}}")
    _refuse_placeholders(str(path), {"http_options": options})
    port = options.get("port", 8000)
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:
        raise ConfigError(f"{path}: http_options.port is {port!r}, but must be 1 to 65535")


def _check_application(path: Path, position: int, application: Any) -> tuple[str, str]:
    if not isinstance(application, dict):
        raise ConfigError(f"{path}: application {position} must be a mapping")
    name = application.get("name")
    if name is not None and not isinstance(name, str):
        raise ConfigError(
            f"{path}: the name of application {position} is {name!r}, but must be text; put it in "
            "quotes"
        )
    if not name:
        raise ConfigError(f"{path}: application {position} has no name; for a model it is its id")
    where = f"{path}: application {name!r}"
    for key in application:
        if key not in _APPLICATION_KEYS:
            if key in ModelConfig.model_fields or key in GatewayConfig.model_fields:
                hint = "; put it under args"
            elif key in Resources.model_fields:
                hint = "; put it under args.resources"
            else:
                hint = did_you_mean(str(key), _APPLICATION_KEYS)
            raise ConfigError(f"{where}: '{key}' is not a key of a Serve application{hint}")
    if not isinstance(application.get("import_path"), str):
        raise ConfigError(
            f"{where}: import_path is missing; a model has {MODEL_IMPORT_PATH}, "
            f"the gateway {GATEWAY_IMPORT_PATH}"
        )
    known = (MODEL_IMPORT_PATH, GATEWAY_IMPORT_PATH)
    import_path = application["import_path"]
    if import_path.startswith("serve_app.") and import_path not in known:
        raise ConfigError(
            f"{where}: import_path is '{import_path}'{did_you_mean(import_path, known)}"
        )
    own = {MODEL_IMPORT_PATH: DEPLOYMENT, GATEWAY_IMPORT_PATH: GATEWAY_DEPLOYMENT}
    if import_path in own:
        _refuse_placeholders(where, {"name": name, "deployments": application.get("deployments")})
        _check_deployments(where, application.get("deployments"), own[import_path])
    check_name(where, name)
    return where, name


def _refuse_placeholders(where: str, value: dict[str, Any]) -> None:
    try:
        placeholders.refuse(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_deployments(where: str, deployments: Any, known: str) -> None:
    """Refuse overrides of a deployment that the application does not have, as Serve does."""
    if deployments is None:
        return
    if not isinstance(deployments, list) or not all(isinstance(d, dict) for d in deployments):
        raise ConfigError(f"{where}: deployments must be a list such as [{{name: {known}}}]")
    for deployment in deployments:
        if deployment.get("name") != known:
            name = str(deployment.get("name"))
            hint = did_you_mean(name, [known]) or f"; its one deployment is '{known}'"
            raise ConfigError(f"{where}: deployments names '{name}'{hint}")
        for key in deployment:
            if key not in _DEPLOYMENT_KEYS:
                hint = did_you_mean(str(key), _DEPLOYMENT_KEYS)
                raise ConfigError(f"{where}: '{key}' is not a key of a Serve deployment{hint}")


def deployed(name: str, application: dict[str, Any]) -> ModelConfig:
    """The settings of a deployed model's application, which may not have been checked before.

    What its ``user_config`` sets takes the place of its args.

    Raises:
        ConfigError: the settings cannot work; the sentence starts with the application.
    """
    where = f"application {name!r}"
    model = parse(ModelConfig, application.get("args"), where)
    return _with_live(where, model, application)


def answering(fleet: Fleet) -> dict[str, ModelConfig]:
    """The models as they answer: with what their ``user_config`` sets."""
    return {
        name: deployed(name, application)
        for application in fleet.document["applications"]
        if (name := application["name"]) in fleet.models
    }


def _with_live(where: str, model: ModelConfig, application: dict[str, Any]) -> ModelConfig:
    for deployment in application.get("deployments") or []:
        if "user_config" in deployment:
            live = parse(LiveConfig, deployment["user_config"], f"{where}: user_config")
            if live.adapters and not (model.adapters or model.engine.get("enable_lora")):
                raise ConfigError(f"{where}: adapters in user_config need engine.enable_lora: true")
            both = model.model_dump(exclude_unset=True) | live.model_dump(exclude_unset=True)
            return parse(ModelConfig, both, f"{where}: user_config")
    return model


def check_name(where: str, name: str) -> None:
    """Refuse names that Serve 2.60 cannot deploy, because it makes log files' paths from them."""
    if "/" in name:
        short = name.rsplit("/", 1)[-1]
        raise ConfigError(
            f"{where}: an application's name cannot hold '/' (Serve makes a file name of it); "
            f"name it '{short}' and list '{name}' in args.served_as"
        )
    if any(c.isspace() for c in name):
        raise ConfigError(f"{where}: an application's name cannot hold spaces")


def _check_model_application(where: str, application: dict[str, Any]) -> None:
    if "route_prefix" not in application or application["route_prefix"] is not None:
        raise ConfigError(
            f"{where}: a model needs 'route_prefix: null'; clients reach it through the gateway"
        )


def refuse_shared_ids(models: dict[str, ModelConfig], where: str) -> None:
    """Refuse two models that answer to one id, naming both.

    Raises:
        ConfigError: the id and the two applications.
    """
    owner: dict[str, str] = {}
    for name, model in models.items():
        ids = ids_of(name, model)
        if twice := next((id for id in ids if ids.count(id) > 1), None):
            raise ConfigError(f"{where}: '{name}' lists the id '{twice}' twice; remove one")
        for id in ids:
            other = owner.setdefault(id, name)
            if other != name:
                raise ConfigError(
                    f"{where}: the model id '{id}' belongs to both '{other}' and '{name}'; "
                    "change it in one of them"
                )

"""The production checklist of ``serve-app check``: each line ok, warn or fail, and what to change.

The static checks read the config, the model's metadata and, where they were rendered, the
Kubernetes documents beside the config; ``check_cluster`` also asks the cluster at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve_app.cluster import autoscaling, placement
from serve_app.config import engine_args, yaml_files
from serve_app.config.document import MODEL_IMPORT_PATH, Fleet, parse_document
from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError, UserError
from serve_app.planner import check_deployment, check_model, hardware
from serve_app.planner.finding import Finding
from serve_app.planner.loading import load_model
from serve_app.planner.manifests import Manifests
from serve_app.planner.model import metadata


def static(path: Path, manifests: Manifests | None) -> list[Finding]:
    """Every check that needs no cluster.

    Raises:
        UserError: the file cannot be read at all, or is no Serve config.
    """
    document = _read(path)
    findings = list(_engine_arguments(document, path))
    broken = [finding for finding in findings if finding.status == "fail"]
    try:
        fleet = parse_document(document, path)
    except ConfigError as error:
        if not broken:
            findings.append(Finding("config", "fail", str(path), str(error), "mend the config"))
        return findings
    for name, config in fleet.models.items():
        findings += check_model.model(name, config)
        if why := _undeployable(config):
            fix = "mend the setting: a deployment would refuse it, or wait in vain"
            findings.append(Finding("placement", "fail", name, why, fix))
    findings += check_deployment.metrics(fleet, path, manifests)
    findings += check_deployment.autoscaling(fleet, manifests)
    findings += check_deployment.model_cache(fleet, manifests)
    findings += check_deployment.head(manifests)
    findings += check_deployment.secrets(fleet, document, manifests)
    findings += check_deployment.versions(fleet, document, manifests)
    findings += check_deployment.shared_memory(fleet, manifests)
    return findings


def refuse(fleet: Fleet) -> None:
    """Refuse a config that certainly cannot work, before ``serve-app run`` starts anything.

    Needs no network: a model whose metadata is not on this machine is let through.

    Raises:
        ConfigError: the first model that cannot start, and what to change.
    """
    for name, config in fleet.models.items():
        if why := _undeployable(config):
            raise ConfigError(f"{fleet.path}: application '{name}': {why}")
        if config.engine.keys() & metadata.OTHER_CONFIG:
            continue
        try:
            model = load_model(config, offline=True)
        except UserError:
            continue
        if why := check_model.impossible(config, model):
            raise ConfigError(f"{fleet.path}: application '{name}': {why} (--no-check skips this)")


def _undeployable(config: ModelConfig) -> str | None:
    """What the model's application would refuse when it is built, or wait for in vain."""
    try:
        placement.of(config)
        autoscaling.deployment_options(config)
    except ConfigError as error:
        return str(error)
    asked = config.resources.accelerator_type or ""
    for name in (gpu.ray_name for gpu in hardware.gpus().values()):
        if name and asked != name and asked.lower() == name.lower():
            return f"resources.accelerator_type is '{asked}', but Ray writes '{name}'"
    return None


def _read(path: Path) -> dict[str, Any]:
    document = yaml_files.read(path)
    if not isinstance(document, dict) or not isinstance(document.get("applications"), list):
        raise ConfigError(f"{path}: not a Serve config: it has no 'applications' list")
    return document


# --- engine arguments --------------------------------------------------------------------------


def _engine_arguments(document: dict[str, Any], path: Path) -> Iterator[Finding]:
    """Every argument of every model, so that one run shows all mistakes."""
    for application in document["applications"]:
        if not isinstance(application, dict):
            continue
        if application.get("import_path") != MODEL_IMPORT_PATH:
            continue
        name = str(application.get("name"))
        given = application.get("args")
        arguments = given.get("engine") if isinstance(given, dict) else None
        if not isinstance(arguments, dict):
            continue  # said by parse_document
        wrong = 0
        for key, value in arguments.items():
            plain = str(key).lstrip("-").replace("-", "_")
            if plain in engine_args.RENAMED:
                wrong += 1
                yield Finding(
                    "engine arguments",
                    "fail",
                    name,
                    f"engine.{key} is not in vLLM {engine_args.VLLM_VERSION}",
                    f"use {engine_args.RENAMED[plain]}",
                )
                continue
            try:
                engine_args.check({key: value})
            except ConfigError as error:
                wrong += 1
                yield Finding("engine arguments", "fail", name, str(error), None)
        if not wrong:
            known = f"{len(arguments)} known to vLLM {engine_args.VLLM_VERSION}"
            yield Finding("engine arguments", "ok", name, known)

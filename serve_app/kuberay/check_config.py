"""What the Serve config asks for, and whether the pods can give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from serve_app.config import Fleet, parse_document
from serve_app.errors import ConfigError
from serve_app.kuberay.reading import (
    Bundle,
    Document,
    Found,
    Warn,
    accelerator_of,
    container_of,
    count,
    get,
    gpu_limit,
    gpus_of,
    groups_of,
    is_token,
    seconds_of,
)
from serve_app.kuberay.workers import replicas_of


def serve_config(
    document: Document,
) -> Any:  # a generator of findings that returns the Fleet
    text = get(document, "spec.serveConfigV2")
    where = "spec.serveConfigV2"
    if not isinstance(text, str) or not text.strip():
        yield where, "is missing; it is the config file, as text"
        return None
    try:
        config = yaml.safe_load(text)
        fleet = parse_document(config, Path(where))
    except ConfigError as error:
        yield where, str(error).removeprefix(f"{where}: ")
        return None
    except yaml.YAMLError as error:
        yield where, f"is not YAML ({getattr(error, 'problem', 'syntax')})"
        return None
    host = get(config, "http_options.host") or "0.0.0.0"
    if host not in ("0.0.0.0", "::"):
        yield where, f"http_options.host is {host}, where no other pod can reach it; set 0.0.0.0"
    if config.get("proxy_location") in ("HeadOnly", "Disabled"):
        yield (
            where,
            f"proxy_location is {config['proxy_location']}: pods without a proxy never get "
            "Ready; use EveryNode",
        )
    prefixes: dict[str, str] = {}
    for application in config["applications"]:
        prefix = application.get("route_prefix")
        if prefix is not None and prefix in prefixes:
            yield (
                where,
                f"applications '{prefixes[prefix]}' and '{application['name']}' share the "
                f"route_prefix {prefix}",
            )
        prefixes.setdefault(str(prefix), application["name"])
        if application.get("runtime_env", {}).get("pip"):
            yield (
                where,
                Warn(
                    f"application '{application['name']}' installs packages at every start; put "
                    "them into the image"
                ),
            )
    if fleet.gateway is None:
        yield where, "has no gateway; add an application with import_path serve_app.gateway:app"
    for name, model in fleet.models.items():
        for key, value in model.env.items():
            if is_token(key, value):
                yield (
                    where,
                    f"application '{name}': env.{key} holds a secret in plain text; use the "
                    "profile's hf_token",
                )
    port = next(
        (
            p.get("containerPort")
            for _, group in groups_of(document)
            for p in container_of(group).get("ports") or []
            if p.get("name") == "serve"
        ),
        None,
    )
    if port is not None and port != fleet.port:
        yield where, f"listens on port {fleet.port}, but the pods' port 'serve' is {port}"
    return fleet


def capacity(document: Document, fleet: Fleet, bundle: Bundle) -> Found:
    """Do the worker groups hold the replicas that Serve may ask for?"""
    groups = [g for w, g in groups_of(document) if "groupName" in g]
    autoscaling = bool(get(document, "spec.rayClusterConfig.enableInTreeAutoscaling"))
    where = "spec.rayClusterConfig.workerGroupSpecs"
    least_asked: dict[str, int] = {}
    most_asked: dict[str, int] = {}
    for name, model in fleet.models.items():
        if model.resources.device == "cpu":
            continue
        accelerator = model.resources.accelerator_type
        tp, pp = model.tensor_parallel_size, model.pipeline_parallel_size
        gpus = tp * pp * int(model.engine.get("data_parallel_size") or 1)
        fitting = [g for g in groups if gpus_of(g) and accelerator in (None, accelerator_of(g))]
        kind = f"{accelerator or 'GPU'}"
        if not fitting:
            yield where, f"has no group with a {kind} for the model '{name}'"
            continue
        whole = [g for g in fitting if gpus_of(g) >= gpus]
        staged = [g for g in fitting if gpus_of(g) >= tp and gpus_of(g) % tp == 0 and pp > 1]
        if not whole and not staged:
            yield (
                where,
                f"has pods with {max(map(gpus_of, fitting))} {kind}, but the model '{name}' needs "
                f"{tp} in one pod (tensor_parallel_size)",
            )
            continue
        least, most = replicas_of(model)
        key = accelerator or accelerator_of((whole or staged)[0])
        least_asked[key] = least_asked.get(key, 0) + least * gpus
        most_asked[key] = most_asked.get(key, 0) + most * gpus
    for key, asked in most_asked.items():
        mine = [g for g in groups if accelerator_of(g) == key]
        most = sum(count(g, "maxReplicas") * gpus_of(g) for g in mine)
        least = sum(count(g, "minReplicas") * gpus_of(g) for g in mine)
        if asked > most:
            yield (
                f"{where}.maxReplicas",
                f"gives {most} {key} at most, but the models may ask for {asked}; raise it",
            )
        if not autoscaling and least_asked[key] > least:
            yield (
                f"{where}.minReplicas",
                f"gives {least} {key}, but the models need {least_asked[key]}, and without the "
                "autoscaler no more come",
            )
    limit = gpu_limit(bundle)
    total = sum(count(g, "maxReplicas") * gpus_of(g) for g in groups)
    if limit is None or not total:
        return
    strategy = get(document, "spec.upgradeStrategy.type") or "NewCluster"
    if total > limit:
        yield (
            f"{where}.maxReplicas",
            f"takes {total} GPUs, but the NodePools stop at {limit}; raise limits.nvidia.com/gpu",
        )
        return
    least_total = sum(count(g, "minReplicas") * gpus_of(g) for g in groups)
    if strategy == "NewCluster" and total + least_total > limit:
        yield (
            "spec.upgradeStrategy",
            Warn(
                f"NewCluster may need {total + least_total} GPUs during an upgrade at full load, "
                f"but the NodePools stop at {limit}"
            ),
        )


def drain(document: Document, fleet: Fleet, bundle: Bundle) -> Found:
    """Grace periods that contain each other: generation, replica, pod, node."""
    longest = max((m.graceful_shutdown_timeout_s for m in fleet.models.values()), default=0.0)
    slowest = (0, "")
    for where, group in groups_of(document):
        if "groupName" not in group:
            continue
        grace = get(group, "template.spec.terminationGracePeriodSeconds")
        path = f"{where}.template.spec.terminationGracePeriodSeconds"
        if not isinstance(grace, int) or grace < longest + 30:
            yield (
                path,
                f"is {grace if isinstance(grace, int) else 'the default 30'} s, but a replica may "
                f"take {longest:.0f} s to finish its answers and its proxy 30 s more",
            )
            continue
        if not get(container_of(group), "lifecycle.preStop"):
            yield (
                f"{where}.template.spec.containers[0].lifecycle.preStop",
                Warn("is missing: an eviction cuts every stream at once"),
            )
        slowest = max(slowest, (grace, path))
    for pool in bundle.node_pools:
        text = get(pool, "spec.template.spec.terminationGracePeriod")
        patience = seconds_of(text)
        if patience is not None and patience < slowest[0]:
            yield (
                slowest[1],
                f"is {slowest[0]} s, but NodePool '{get(pool, 'metadata.name')}' ends its pods "
                f"after {text} (terminationGracePeriod)",
            )

"""What the Serve config asks for, and whether the pods can give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from serve_app.config.document import Fleet, parse_document
from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError, UserError
from serve_app.kuberay.render.network import why_unreachable
from serve_app.kuberay.render.workers import replicas_of, sizes_of
from serve_app.kuberay.validate.reading import (
    EFA,
    INSTANCE_TYPE,
    Bundle,
    Document,
    Found,
    Warn,
    accelerator_of,
    affinity_values,
    container_of,
    core_count,
    cores,
    count,
    get,
    gpu_limit,
    gpus_of,
    groups_of,
    is_token,
    items,
    mapping,
    resources,
    seconds_of,
)
from serve_app.planner import check_model, hardware
from serve_app.planner.loading import load_model
from serve_app.planner.model import metadata


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
        for name, model in fleet.models.items():
            if model.resources.device == "gpu":
                sizes_of(f"application '{name}'", model)
    except ConfigError as error:
        yield where, str(error).removeprefix(f"{where}: ")
        return None
    except yaml.YAMLError as error:
        yield where, f"is not YAML ({getattr(error, 'problem', 'syntax')})"
        return None
    if problem := why_unreachable(fleet.host):
        yield where, problem
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
        environment = mapping(application, "runtime_env")
        module = str(application["import_path"]).partition(":")[0]
        if not module.startswith("serve_app.") and not environment.get("working_dir"):
            yield (
                where,
                Warn(
                    f"application '{application['name']}': the image of this repo has no module "
                    f"'{module}'; build one that has, or set runtime_env.working_dir"
                ),
            )
        if environment.get("pip"):
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
            for p in items(container_of(group), "ports")
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
        stage, stages, ranks = sizes_of("", model)
        gpus = stage * stages * ranks
        fitting = _with_accelerator(groups, accelerator)
        kind = f"{accelerator or 'GPU'}"
        if not fitting:
            yield where, f"has no group with a {kind} for the model '{name}'"
            continue
        holding = _holding(fitting, model)
        if not holding:
            yield (
                where,
                f"has pods with {max(map(gpus_of, fitting))} {kind}, but the model '{name}' needs "
                f"{stage} in one pod (tensor_parallel_size)",
            )
            continue
        roomiest = max(map(_ray_cpus, holding))
        if model.resources.num_cpus > roomiest:
            yield (
                f"{where}.resources.CPU",
                f"is {roomiest:g} at most where '{name}' fits, which asks for "
                f"{model.resources.num_cpus:g} cores (resources.num_cpus)",
            )
        least, most = replicas_of(model)
        key = accelerator or accelerator_of(holding[0])
        least_asked[key] = least_asked.get(key, 0) + least * gpus
        most_asked[key] = most_asked.get(key, 0) + most * gpus
    short = False
    for key, asked in most_asked.items():
        mine = _with_accelerator(groups, key)
        most = sum(count(g, "maxReplicas") * gpus_of(g) for g in mine)
        least = sum(count(g, "minReplicas") * gpus_of(g) for g in mine)
        if asked > most:
            short = True
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
        yield from _idle(where, mine, asked)
    limit, total = gpu_limit(bundle), sum(most_asked.values())
    if limit is None or short:
        return
    strategy = get(document, "spec.upgradeStrategy.type") or "NewCluster"
    if total > limit:
        yield (
            f"{where}.maxReplicas",
            f"takes {total} GPUs when every model is at its most, but the NodePools stop at "
            f"{limit}; raise limits.nvidia.com/gpu",
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


def _idle(where: str, groups: list[Document], asked: int) -> Found:
    """GPUs of the last machine that nothing can use, where there is only one kind of machine."""
    types = {t for g in groups for t in affinity_values(g, INSTANCE_TYPE)}
    machines = [hardware.instances()[t] for t in types if t in hardware.instances()]
    if len(machines) == 1 and (idle := -asked % machines[0].gpus):
        yield (
            where,
            Warn(
                f"uses {asked} GPUs at most and leaves {idle} of the {machines[0].gpus} GPUs of "
                f"the last {machines[0].name} idle"
            ),
        )


def _with_accelerator(groups: list[Document], accelerator: str | None) -> list[Document]:
    """Groups with such a GPU; one that does not say its type (an error of its own) may have it."""
    may_have = (accelerator, "")
    return [
        g for g in groups if gpus_of(g) and (accelerator is None or accelerator_of(g) in may_have)
    ]


def _holding(groups: list[Document], model: ModelConfig) -> list[Document]:
    """Of these, the ones whose pods hold a replica, or whole stages or ranks of it."""
    stage, stages, ranks = sizes_of("", model)
    whole = [g for g in groups if gpus_of(g) >= stage * stages * ranks]
    if whole or stages * ranks == 1:
        return whole
    return [g for g in groups if gpus_of(g) % stage == 0]


def _ray_cpus(group: Document) -> float:
    """Cores that Ray takes the pod to have."""
    told = mapping(group, "resources").get("CPU")
    return cores(container_of(group), "requests") if told is None else core_count(told)


def models(fleet: Fleet) -> Found:
    """Can each model be split as its sizes say, and does it fit its GPUs?

    Needs no network: a model whose metadata is not on this machine is let through.
    """
    where = "spec.serveConfigV2"
    for name, model in fleet.models.items():
        if model.engine.keys() & metadata.OTHER_CONFIG:
            continue
        try:
            known = load_model(model, offline=True)
        except UserError:
            continue
        try:
            why = check_model.impossible(model, known)
        except UserError as error:
            why = str(error)
        if why:
            yield where, f"application '{name}': {why}"
            continue
        for finding in check_model.checked(name, model, known):
            if finding.status == "fail":  # by an estimate
                fix = f"; {finding.fix}" if finding.fix else ""
                yield where, Warn(f"application '{name}': {finding.message}{fix}")


def stages(document: Document, fleet: Fleet) -> Found:
    """Pods that together make a replica: one zone, and its network where the machine has one."""
    groups = {g["groupName"]: (w, g) for w, g in groups_of(document) if "groupName" in g}
    spread: set[str] = set()
    for model in fleet.models.values():
        if model.resources.device == "cpu":
            continue
        stage, count_, ranks = sizes_of("", model)
        alike = _with_accelerator([g for _, g in groups.values()], model.resources.accelerator_type)
        spread |= {
            g["groupName"] for g in _holding(alike, model) if gpus_of(g) < stage * count_ * ranks
        }
    for where, group in (groups[name] for name in sorted(spread)):
        machines = [
            hardware.instances()[t]
            for t in affinity_values(group, INSTANCE_TYPE)
            if t in hardware.instances()
        ]
        adapters = min((m.efa for m in machines), default=0)
        if adapters and not resources(group, "limits").get(EFA):
            yield (
                f"{where}.template.spec.containers[0].resources.limits.{EFA}",
                Warn(
                    f"is missing: the pods of a replica talk over TCP, though {machines[0].name} "
                    f"has {adapters} EFA adapters"
                ),
            )
        zone = (
            get(
                group,
                "template.spec.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution",
            )
            or []
        )
        if not any(term.get("topologyKey") == "topology.kubernetes.io/zone" for term in zone):
            yield (
                f"{where}.template.spec.affinity.podAffinity",
                Warn("does not keep the pods of a replica in one zone: EFA does not cross zones"),
            )


def caches(document: Document, fleet: Fleet) -> Found:
    """What is downloaded and compiled: is it on a volume that outlives the pod?"""
    kept = {
        mount["mountPath"].rstrip("/")
        for _, group in groups_of(document)
        if "groupName" in group
        for mount in items(container_of(group), "volumeMounts")
        for volume in items(group, "template.spec.volumes")
        if volume.get("name") == mount.get("name") and "persistentVolumeClaim" in volume
    }

    def outlives(folder: str) -> bool:
        return any(f"{folder}/".startswith(f"{mount}/") for mount in kept)

    for name, model in fleet.models.items():
        if model.cache_dir and not outlives(model.cache_dir):
            there = f"; {', '.join(sorted(kept))} does" if kept else ""
            yield (
                "spec.serveConfigV2",
                Warn(
                    f"application '{name}': cache_dir {model.cache_dir} does not outlive the "
                    f"pod{there}"
                ),
            )
        elif not model.cache_dir and not kept and not model.model.startswith(("s3://", "/")):
            yield (
                "spec.rayClusterConfig.workerGroupSpecs",
                Warn(
                    f"mounts no volume: '{name}' downloads its weights at each start; mount one, "
                    "or stream from S3"
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

"""Rules for the Serve config: can the pods provide what it asks for?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from serve_app.config import secrets
from serve_app.config.document import Fleet, parse_document
from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError, UserError
from serve_app.kuberay.render.network import why_unreachable
from serve_app.kuberay.render.workers import packed, sizes_of
from serve_app.kuberay.validate.manifests import (
    EFA,
    INSTANCE_TYPE,
    Document,
    Manifests,
    Pods,
    get,
    items,
    mapping,
    pods_of,
    seconds_of,
    workers_of,
)
from serve_app.kuberay.validate.rule import Found, check, fail, warn
from serve_app.planner import check_model, front_ends, hardware, swap, together
from serve_app.planner.loading import load_known

CONFIG = "spec.serveConfigV2"
GROUPS = "spec.rayClusterConfig.workerGroupSpecs"
PROXY_GRACE_S = 30
"""Seconds that Serve's proxy drains after the replicas."""


def fleet_of(service: Document) -> Fleet:
    """The config inside a RayService.

    Raises:
        ConfigError: it is missing, or ``serve run`` would refuse it too.
    """
    text = get(service, CONFIG)
    if not isinstance(text, str) or not text.strip():
        raise ConfigError("is missing; it is the config file, as text")
    try:
        fleet = parse_document(yaml.safe_load(text), Path(CONFIG))
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "syntax"
        raise ConfigError(f"is not YAML ({problem})") from None
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix(f"{CONFIG}: ")) from None
    for name, model in _on_gpus(fleet):
        if why := check_model.undeployable(model):
            raise ConfigError(f"application '{name}': {why}")
        sizes_of(f"application '{name}'", model)
    return fleet


def _on_gpus(fleet: Fleet) -> Iterator[tuple[str, ModelConfig]]:
    return ((n, m) for n, m in fleet.models.items() if m.resources.device == "gpu")


@check("config")
def config(service: Document, fleet: Fleet) -> Found:
    """Does the config have settings that work on one machine, but not in these pods?"""
    if problem := why_unreachable(fleet.host):
        yield fail(CONFIG, problem)
    if (location := fleet.document.get("proxy_location")) in ("HeadOnly", "Disabled"):
        said = f"proxy_location is {location}: pods without a proxy never get Ready"
        yield fail(CONFIG, said, "use EveryNode")
    if fleet.gateway is None:
        fix = "add an application with import_path serve_app.gateway:app"
        yield fail(CONFIG, "has no gateway", fix)
    port = next((p.ports["serve"] for p in pods_of(service) if "serve" in p.ports), None)
    if port is not None and port != fleet.port:
        yield fail(CONFIG, f"listens on port {fleet.port}, but the pods' port 'serve' is {port}")
    at_prefix: dict[str, str] = {}
    for application in fleet.document["applications"]:
        name, prefix = application["name"], application.get("route_prefix")
        first = at_prefix.setdefault(str(prefix), name)
        if prefix is not None and first != name:
            yield fail(
                CONFIG, f"applications '{first}' and '{name}' share the route_prefix {prefix}"
            )
        environment = mapping(application, "runtime_env")
        module = str(application["import_path"]).partition(":")[0]
        if not module.startswith("serve_app.") and not environment.get("working_dir"):
            yield warn(
                CONFIG,
                f"application '{name}': the image of this repo has no module '{module}'",
                "build one that has, or set runtime_env.working_dir",
            )
        if environment.get("pip"):
            said = f"application '{name}' installs packages at every start"
            yield warn(CONFIG, said, "put them into the image")


@check("secrets")
def environment(fleet: Fleet) -> Found:
    for name, model in fleet.models.items():
        for key in secrets.in_plain_text(model.env):
            said = f"application '{name}': env.{key} holds a secret in plain text"
            yield fail(CONFIG, said, secrets.instead(key))


@check("model")
def models(fleet: Fleet) -> Found:
    """Can each model be split as its sizes say, and does it fit its GPUs?

    Needs no network: a model whose metadata is not on this machine passes.
    """
    for name, model in fleet.models.items():
        known = load_known(model)
        if known is None:
            continue
        try:
            why = check_model.impossible(model, known)
        except UserError as error:
            why = str(error)
        if why:
            yield fail(CONFIG, f"application '{name}': {why}")
            continue
        for finding in check_model.checked(name, model, known):
            if finding.status == "fail":  # by an estimate
                yield warn(CONFIG, f"application '{name}': {finding.message}", finding.fix)


@check("model")
def sharing(fleet: Fleet) -> Found:
    """Do models that share a GPU, in turn or in parts, fit it and a machine that has it?"""
    for finding in (*swap.problems(fleet), *together.problems(fleet)):
        if finding.status == "fail":
            yield fail(CONFIG, finding.message, finding.fix)


@check("model")
def fallbacks(fleet: Fleet) -> Found:
    """Does each fallback generate text?"""
    for finding in check_model.fallbacks(fleet):
        yield fail(CONFIG, f"application '{finding.about}': {finding.text}")


@check("autoscaling")
def capacity(service: Document, fleet: Fleet, manifests: Manifests) -> Found:
    """Have the worker groups and the NodePools room for the replicas that Serve may ask for?"""
    workers = workers_of(service)
    least_asked: dict[str, int] = {}
    most_asked: dict[str, int] = {}
    parts: dict[str, list[tuple[ModelConfig, str]]] = {}
    groups = swap.groups(dict(_on_gpus(fleet)))
    for name, model in _on_gpus(fleet):
        accelerator = model.resources.accelerator_type
        stage, stages, ranks = sizes_of("", model)
        fitting = _with_accelerator(workers, accelerator)
        kind = accelerator or "GPU"
        if not fitting:
            yield fail(GROUPS, f"has no group with a {kind} for the model '{name}'")
            continue
        holding = _holding(fitting, model)
        if not holding:
            yield fail(
                GROUPS,
                f"has pods with {max(p.gpus for p in fitting)} {kind}, but the model '{name}' "
                f"needs {stage} in one pod (tensor_parallel_size)",
            )
            continue
        roomiest = max(p.ray_cores for p in holding)
        group = model.resources.swap_group
        sharing_pod = groups[group] if group else {name: model}
        if name != next(iter(sharing_pod)):
            continue  # its group's GPU is counted
        cores = sum(member.resources.num_cpus for member in sharing_pod.values())
        if cores > roomiest:
            whose = f"swap group '{group}'" if group else f"'{name}'"
            yield fail(
                f"{GROUPS}.resources.CPU",
                f"is {roomiest:g} at most where {whose} fits, which asks for {cores:g} cores "
                "(resources.num_cpus)",
            )
        least, most = (1, 1) if group else model.replica_range
        gpus, key = stage * stages * ranks, accelerator or holding[0].accelerator
        if model.resources.part_of_gpu:
            parts.setdefault(key, []).append((model, name))
            gpus = 0
        least_asked[key] = least_asked.get(key, 0) + least * gpus
        most_asked[key] = most_asked.get(key, 0) + most * gpus
    for key, sharing in parts.items():
        counts = [(model, name, *model.replica_range) for model, name in sharing]
        least_asked[key] += len(packed((model, name, few) for model, name, few, _ in counts))
        most_asked[key] += len(packed((model, name, many) for model, name, _, many in counts))
    short = False
    for key, asked in most_asked.items():
        mine = _with_accelerator(workers, key)
        least = sum(p.gpus_by("minReplicas") for p in mine)
        most = sum(p.gpus_by("maxReplicas") for p in mine)
        if asked > most:
            short = True
            said = f"gives {most} {key} at most, but the models may ask for {asked}"
            yield fail(f"{GROUPS}.maxReplicas", said, "raise it")
        elastic = get(service, "spec.rayClusterConfig.enableInTreeAutoscaling")
        if not elastic and least_asked[key] > least:
            yield fail(
                f"{GROUPS}.minReplicas",
                f"gives {least} {key}, but the models need {least_asked[key]}, and without the "
                "autoscaler no more come",
            )
        yield from _idle(mine, asked)
    if manifests.gpu_limit is not None and not short:
        always = sum(p.gpus_by("minReplicas") for p in workers)
        yield from _node_pools(service, sum(most_asked.values()), always, manifests.gpu_limit)


@check("front ends")
def front_end_cores(service: Document, fleet: Fleet) -> Found:
    """Has a pod cores for as many front ends as a model sets?"""
    workers = workers_of(service)
    for name, model in _on_gpus(fleet):
        holding = _holding(_with_accelerator(workers, model.resources.accelerator_type), model)
        pods = {f"a pod of '{p.name}'": front_ends.Node(p.ray_cores, p.gpus) for p in holding}
        for finding in check_model.too_few_cores(name, model, pods):
            yield warn(CONFIG, f"application '{name}': {finding.message}", finding.fix)


def _idle(workers: list[Pods], asked: int) -> Found:
    """GPUs of the last machine that no replica can use, if there is only one kind of machine."""
    machines = _machines(workers)
    if len(machines) == 1 and (idle := -asked % machines[0].gpus):
        yield warn(
            GROUPS,
            f"uses {asked} GPUs at most and leaves {idle} of the {machines[0].gpus} GPUs of "
            f"the last {machines[0].name} idle",
        )


def _node_pools(service: Document, most: int, always: int, limit: int) -> Found:
    """Is the pools' limit enough for the models at their maximum, and during an upgrade?"""
    strategy = get(service, "spec.upgradeStrategy.type") or "NewCluster"
    if most > limit:
        yield fail(
            f"{GROUPS}.maxReplicas",
            f"takes {most} GPUs when every model is at its most, but the NodePools stop at {limit}",
            "raise limits.nvidia.com/gpu",
        )
    elif strategy == "NewCluster" and most + always > limit:
        yield warn(
            "spec.upgradeStrategy",
            f"NewCluster may need {most + always} GPUs during an upgrade at full load, but the "
            f"NodePools stop at {limit}",
        )


def _with_accelerator(workers: list[Pods], accelerator: str | None) -> list[Pods]:
    """Groups with this type of GPU, or with an unnamed type (for which there is a rule)."""
    return [
        p for p in workers if p.gpus and (not accelerator or p.accelerator in (accelerator, ""))
    ]


def _holding(workers: list[Pods], model: ModelConfig) -> list[Pods]:
    """Those of the groups whose pods hold a replica, or whole stages or ranks of one."""
    stage, stages, ranks = sizes_of("", model)
    whole = [p for p in workers if p.gpus >= stage * stages * ranks]
    if whole or stages * ranks == 1:
        return whole
    return [p for p in workers if p.gpus % stage == 0]


def _machines(workers: list[Pods]) -> list[hardware.Instance]:
    types = {t: None for pods in workers for t in pods.affinity(INSTANCE_TYPE)}
    return [hardware.instances()[t] for t in types if t in hardware.instances()]


@check("placement")
def stages(service: Document, fleet: Fleet) -> Found:
    """Do pods that share a replica have one zone, and EFA where the machine has it?"""
    workers = workers_of(service)
    spread: dict[str, Pods] = {}
    for _, model in _on_gpus(fleet):
        stage, count, ranks = sizes_of("", model)
        alike = _with_accelerator(workers, model.resources.accelerator_type)
        held = _holding(alike, model)
        spread |= {p.name: p for p in held if p.gpus < stage * count * ranks}
    for pods in spread.values():
        machines = _machines([pods])
        adapters = min((m.efa for m in machines), default=0)
        if adapters and not pods.limits.get(EFA):
            yield warn(
                f"{pods.container_at}.resources.limits.{EFA}",
                f"is missing: the pods of a replica talk over TCP, though {machines[0].name} "
                f"has {adapters} EFA adapters",
            )
        terms = items(
            pods.spec, "affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution"
        )
        if not any(term.get("topologyKey") == "topology.kubernetes.io/zone" for term in terms):
            yield warn(
                f"{pods.spec_at}.affinity.podAffinity",
                "does not keep the pods of a replica in one zone: EFA does not cross zones",
            )


@check("model cache")
def caches(service: Document, fleet: Fleet) -> Found:
    """Are downloads and compiled code on a volume that outlives the pod?"""
    workers = workers_of(service)
    kept = {mount for pods in workers for mount in pods.lasting_mounts}
    lost: list[tuple[str, str]] = []  # GPU pods, and where they keep the hub's files for a while
    for pods in workers:
        env = {str(e.get("name")): str(e.get("value") or "") for _, e in pods.env}
        usual = f"{env.get('HOME') or '/root'}/.cache/huggingface"
        home = env.get("HF_HOME") or env.get("HF_HUB_CACHE") or usual
        if pods.gpus and not _within(home, pods.lasting_mounts):
            lost.append((f"{pods.container_at}.volumeMounts", home))
    for name, model in fleet.models.items():
        if model.cache_dir and not _within(model.cache_dir, kept):
            there = f"; {', '.join(sorted(kept))} does" if kept else ""
            said = f"cache_dir {model.cache_dir} does not outlive the pod{there}"
            yield warn(CONFIG, f"application '{name}': {said}")
        elif lost and not model.cache_dir and not model.model.startswith(("s3://", "/")):
            at, home = lost[0]
            yield warn(
                at,
                f"has no volume at {home} that outlives the pod: '{name}' downloads its weights at "
                "each start",
                "mount a PersistentVolumeClaim there, or stream from S3",
            )


def _within(folder: str, mounts: set[str]) -> bool:
    return any(f"{folder}/".startswith(f"{mount}/") for mount in mounts)


@check("draining")
def drain(service: Document, fleet: Fleet, manifests: Manifests) -> Found:
    """Is each grace period longer than the one inside it: answer, replica, pod, node?"""
    longest = max((m.graceful_shutdown_timeout_s for m in fleet.models.values()), default=0.0)
    slowest: tuple[int, str] = (0, "")
    for pods in workers_of(service):
        given: Any = pods.spec.get("terminationGracePeriodSeconds")
        at = f"{pods.spec_at}.terminationGracePeriodSeconds"
        if not isinstance(given, int) or given < longest + PROXY_GRACE_S:
            yield fail(
                at,
                f"is {given if isinstance(given, int) else 'the default 30'} s, but a replica may "
                f"take {longest:.0f} s to finish its answers and its proxy {PROXY_GRACE_S} s more",
            )
            continue
        if not get(pods.container, "lifecycle.preStop"):
            yield warn(
                f"{pods.container_at}.lifecycle.preStop",
                "is missing: an eviction cuts every stream at once",
            )
        slowest = max(slowest, (given, at))
    for pool in manifests.node_pools:
        text = get(pool, "spec.template.spec.terminationGracePeriod")
        patience = seconds_of(text)
        if patience is not None and patience < slowest[0]:
            yield fail(
                slowest[1],
                f"is {slowest[0]} s, but NodePool '{get(pool, 'metadata.name')}' ends its pods "
                f"after {text} (terminationGracePeriod)",
            )

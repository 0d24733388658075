"""Checks of what stands around the models: the config as a whole and its rendered manifests."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from serve_app import __version__
from serve_app.config import engine_args
from serve_app.config.document import Fleet
from serve_app.config.settings import ModelConfig
from serve_app.planner.finding import Finding, Status
from serve_app.planner.hardware import GIB
from serve_app.planner.manifests import Manifests
from serve_app.planner.vllm import defaults as engine_module
from serve_app.planner.vllm import memory

# Names that vLLM used to export, with today's (vllm/v1/metrics/loggers.py).
RENAMED_METRICS = {
    "gpu_cache_usage_perc": "kv_cache_usage_perc",
    "gpu_prefix_cache_hit_rate": "prefix_cache_hits / prefix_cache_queries",
    "cpu_cache_usage_perc": "nothing; vLLM no longer swaps",
    "num_requests_swapped": "nothing; vLLM no longer swaps",
    "time_per_output_token_seconds": "inter_token_latency_seconds",
}

_NOT_RENDERED = "no rendered manifests beside the config, so this part is not checked"
_RENDER = "run `serve-app render`, or name them with --manifests"


def _on_gpus(fleet: Fleet) -> bool:
    """A fleet for CPUs alone (the demo) has no cluster to be checked."""
    return any(config.resources.device == "gpu" for config in fleet.models.values())


def shared_memory(fleet: Fleet, manifests: Manifests | None) -> Iterator[Finding]:
    for name, config in fleet.models.items():
        workers = engine_module.parallelism(config.engine).tensor
        if config.resources.device == "cpu" or workers == 1:
            continue
        needed = memory.shm_bytes(workers)
        if manifests is None:
            yield Finding(
                "shared memory",
                "warn",
                name,
                f"TP {workers} needs {needed / GIB:.1f} GiB of /dev/shm for vLLM's queues, and "
                f"NCCL more; {_NOT_RENDERED}",
                _RENDER,
            )
            continue
        for pod in manifests.pods():
            if pod.is_head or pod.gpus < min(2, workers):
                continue
            size = pod.shm_bytes
            if size is None:
                yield Finding(
                    "shared memory",
                    "fail",
                    pod.name,
                    f"no volume at /dev/shm: the container has 64 MiB, TP {workers} needs "
                    f"{needed / GIB:.1f} GiB",
                    "mount an emptyDir with medium: Memory at /dev/shm",
                )
            elif size < needed:
                yield Finding(
                    "shared memory",
                    "fail",
                    pod.name,
                    f"/dev/shm is {size / GIB:.1f} GiB, TP {workers} needs {needed / GIB:.1f}",
                    f"set sizeLimit to {math.ceil(2 * needed / GIB)}Gi",
                )
            else:
                yield Finding(
                    "shared memory",
                    "ok",
                    pod.name,
                    f"/dev/shm is enough for TP {workers} ({needed / GIB:.1f} GiB)",
                )


def metrics(fleet: Fleet, path: Path, manifests: Manifests | None) -> Iterator[Finding]:
    for name, config in fleet.models.items():
        if config.engine.get("disable_log_stats"):
            yield Finding(
                "metrics",
                "fail",
                name,
                "engine.disable_log_stats turns vLLM's metrics off",
                "remove it: autoscaling and the dashboards read them",
            )
    texts = [(str(path), path.read_text())]
    if manifests is not None:
        texts += [(str(manifests.folder), yaml.safe_dump_all(manifests.documents))]
    for where, text in texts:
        for old, new in RENAMED_METRICS.items():
            if re.search(rf"vllm[:_]{old}\b", text):
                yield Finding(
                    "metrics",
                    "fail",
                    where,
                    f"vLLM {engine_args.VLLM_VERSION} has no vllm:{old}",
                    f"use vllm:{new}" if "nothing" not in new else new,
                )
    if not _on_gpus(fleet):
        return
    if manifests is None:
        yield Finding("metrics", "warn", str(path), _NOT_RENDERED, _RENDER)
        return
    if manifests.of_kind("PodMonitor", "ServiceMonitor"):
        yield Finding("metrics", "ok", str(manifests.folder), "scraped by a PodMonitor")
    else:
        yield Finding(
            "metrics",
            "warn",
            str(manifests.folder),
            "nothing scrapes the Ray pods",
            "add a PodMonitor for the port 'metrics'",
        )
    boards = [
        document
        for document in manifests.of_kind("ConfigMap", "GrafanaDashboard")
        if document.get("kind") == "GrafanaDashboard" or "dashboard" in str(document).lower()
    ]
    status: Status = "ok" if boards else "warn"
    yield Finding(
        "dashboards",
        status,
        str(manifests.folder),
        f"{len(boards)} with Grafana dashboards" if boards else "no Grafana dashboards",
        None if boards else "add the ConfigMaps of kuberay/monitoring",
    )


def gpus_needed(fleet: Fleet) -> tuple[int, int]:
    """GPUs at the least and at the most replicas of all models."""
    least = most = 0
    for config in fleet.models.values():
        if config.resources.device == "cpu":
            continue
        each = engine_module.parallelism(config.engine).gpus
        low, high = replica_bounds(config)
        least, most = least + low * each, most + high * each
    return least, most


def replica_bounds(config: ModelConfig) -> tuple[int, int]:
    if config.autoscaling is not None:
        return config.autoscaling.min_replicas, config.autoscaling.max_replicas
    return config.replicas or 1, config.replicas or 1


def autoscaling(fleet: Fleet, manifests: Manifests | None) -> Iterator[Finding]:
    least, most = gpus_needed(fleet)
    if not most:
        return
    text = f"{least} to {most} GPUs for all replicas"
    if manifests is None or not manifests.pods():
        yield Finding("autoscaling", "warn", str(fleet.path), f"{text}; {_NOT_RENDERED}", _RENDER)
        return
    yield reach("autoscaling", str(manifests.folder), least, most, manifests.gpu_limit(), text)


def reach(check: str, about: str, least: int, most: int, there: int, text: str) -> Finding:
    if there < least:
        return Finding(
            check,
            "fail",
            about,
            f"{text}, but the nodes give {there}",
            "add GPU nodes or lower min_replicas",
        )
    if there < most:
        return Finding(
            check,
            "warn",
            about,
            f"{text}, but the nodes give {there}: the upper bound is out of reach",
            "raise the worker groups' maxReplicas or lower max_replicas",
        )
    return Finding(check, "ok", about, f"{text}, and the nodes can give {there}")


def model_cache(fleet: Fleet, manifests: Manifests | None) -> Iterator[Finding]:
    if not _on_gpus(fleet):
        return
    if manifests is None:
        yield Finding("model cache", "warn", str(fleet.path), _NOT_RENDERED, _RENDER)
        return
    for pod in manifests.pods():
        if pod.is_head or not pod.gpus:
            continue
        env = {name: str(entry.get("value", "")) for name, entry in pod.env()}
        home = env.get("HF_HOME") or env.get("HF_HUB_CACHE") or "/root/.cache/huggingface"
        kept = pod.persistent_mounts
        if any(home == mount or home.startswith(mount.rstrip("/") + "/") for mount in kept):
            yield Finding("model cache", "ok", pod.name, f"{home} outlives the pod")
        else:
            yield Finding(
                "model cache",
                "warn",
                pod.name,
                f"{home} is lost with the pod: each start downloads the weights again",
                "mount a PersistentVolumeClaim there",
            )


def head(manifests: Manifests | None) -> Iterator[Finding]:
    for pod in manifests.pods() if manifests else ():
        if not pod.is_head:
            continue
        if pod.gpus:
            yield Finding(
                "head node",
                "fail",
                pod.name,
                f"the head asks for {pod.gpus} GPUs, which no replica should use",
                "remove nvidia.com/gpu from headGroupSpec",
            )
        else:
            yield Finding("head node", "ok", pod.name, "has no GPU")


_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)(_|$)", re.I)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|AKIA[0-9A-Z]{16}|ghp_[A-Za-z0-9]{20,})"
)


def secrets(
    fleet: Fleet, document: dict[str, Any], manifests: Manifests | None
) -> Iterator[Finding]:
    """Literal secrets; the message never repeats one."""
    literal = 0
    places = [(f"{name}: env", config.env) for name, config in fleet.models.items()]
    for application in document["applications"]:
        env = (application.get("runtime_env") or {}).get("env_vars")
        if isinstance(env, dict):
            places.append((f"{application.get('name')}: runtime_env", env))
    for pod in manifests.pods() if manifests else ():
        plain = {name: str(entry["value"]) for name, entry in pod.env() if entry.get("value")}
        places.append((f"pod {pod.name}", plain))
    for where, env in places:
        for key, value in env.items():
            if value and (_SECRET_NAME.search(key) or _SECRET_VALUE.search(str(value))):
                literal += 1
                yield Finding(
                    "secrets",
                    "fail",
                    where,
                    f"{key} holds a secret in plain text",
                    "put it into a Kubernetes Secret and name it with valueFrom.secretKeyRef",
                )
    if not literal and _SECRET_VALUE.search(yaml.safe_dump(document)):
        literal += 1
        yield Finding(
            "secrets",
            "fail",
            str(fleet.path),
            "something that looks like a token is in the file",
            "remove it and revoke the token",
        )
    if not literal:
        yield Finding("secrets", "ok", str(fleet.path), "none in plain text")


def versions(
    fleet: Fleet, document: dict[str, Any], manifests: Manifests | None
) -> Iterator[Finding]:
    ray = _installed("ray")
    wrong = 0
    for application in document["applications"]:
        pins = (application.get("runtime_env") or {}).get("pip") or []
        packages = pins.get("packages") if isinstance(pins, dict) else pins
        for pin in packages if isinstance(packages, list) else []:
            wanted = {"vllm": engine_args.VLLM_VERSION, "ray": ray}
            name, _, pinned = str(pin).partition("==")
            expected = wanted.get(re.split(r"[\[<>~!]", name)[0].strip())
            if expected and pinned and pinned != expected:
                wrong += 1
                yield Finding(
                    "versions",
                    "fail",
                    str(application.get("name")),
                    f"runtime_env pins {pin}, but serve_app runs {expected}",
                    "remove the pin; the image brings both",
                )
    if manifests is None or not manifests.pods():
        if not wrong:
            text = f"vLLM {engine_args.VLLM_VERSION}, Ray {ray}, serve_app {__version__}"
            yield Finding("versions", "ok", str(fleet.path), text)
        return
    written = str(manifests.ray_cluster.get("rayVersion") or "")
    if ray and written != ray:
        wrong += 1
        yield Finding(
            "versions",
            "fail",
            str(manifests.folder),
            f"rayVersion is '{written}', the image runs {ray}",
            f"set rayVersion: '{ray}'",
        )
    images = {
        str(container.get("image"))
        for pod in manifests.pods()
        for container in pod.containers
        if str(container.get("name", "")).startswith(("ray", "worker", "head"))
    }
    if len(images) > 1:
        wrong += 1
        yield Finding(
            "versions",
            "fail",
            str(manifests.folder),
            f"head and workers run different images: {', '.join(sorted(images))}",
            "give all Ray containers one image",
        )
    for image in images:
        tag = image.rpartition(":")[2] if ":" in image.rpartition("/")[2] else ""
        if not tag or tag == "latest":
            wrong += 1
            yield Finding(
                "versions", "warn", image, "the image is not pinned", "use a version tag or digest"
            )
    if not wrong:
        yield Finding("versions", "ok", str(manifests.folder), f"one image, Ray {ray}")


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

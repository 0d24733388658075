"""The checks that need no cluster: of a config, and of the manifests rendered from it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import yaml

from serve_app import __version__
from serve_app.config import engine_args, yaml_files
from serve_app.config.document import (
    MODEL_IMPORT_PATH,
    Fleet,
    parse_document,
    refuse_foreign,
    refuse_shapeless,
)
from serve_app.config.notices import notices
from serve_app.config.secrets import in_plain_text, instead, looks_like_one
from serve_app.config.settings import ModelConfig, engine_problems
from serve_app.errors import ConfigError
from serve_app.kuberay.render.workers import packed
from serve_app.kuberay.validate.judge import judge
from serve_app.kuberay.validate.manifests import Document, Manifests, get, mapping, read
from serve_app.kuberay.validate.serving import CONFIG
from serve_app.local import gateway_needs
from serve_app.local import judge as on_this_machine
from serve_app.planner import check_machine, check_model, swap, together
from serve_app.planner.finding import Finding, Status
from serve_app.planner.model import runner, templates
from serve_app.planner.vllm import defaults

RENAMED_METRICS = {
    "gpu_cache_usage_perc": "kv_cache_usage_perc",
    "gpu_prefix_cache_hit_rate": "prefix_cache_hits / prefix_cache_queries",
    "cpu_cache_usage_perc": "nothing; vLLM no longer swaps",
    "num_requests_swapped": "nothing; vLLM no longer swaps",
    "time_per_output_token_seconds": "inter_token_latency_seconds",
}
"""Metrics that vLLM has renamed: old and new names (vllm/v1/metrics/loggers.py)."""

_RAY = version("ray")
_BY_CONFIG = {
    "metrics": "exported, under the names of today's vLLM",
    "secrets": "none in plain text",
    "serve settings": "do what they seem to",
    "versions": f"vLLM {engine_args.VLLM_VERSION}, Ray {_RAY}, serve_app {__version__}",
}
_BY_MANIFESTS = {
    "shared memory": "/dev/shm holds vLLM's queues",
    "autoscaling": "the worker groups hold every replica",
    "model cache": "weights outlive the pods",
    "head node": "has no GPU and no replica",
    "machines": "each pod fits on one",
    "draining": "pods and nodes wait for the last answers",
    "metrics": "scraped, under the names of today's vLLM",
    "dashboards": "are there",
}
"""The checklist's lines, each with its sentence when nothing is wrong: without manifests, and with
them."""

_MANIFESTS = "the manifests"
_AGAIN = "run `serve-app render` again"
_RENDER = "run `serve-app render`, or name them with --manifests"


def find(config: Path, given: Path | None) -> list[Document] | None:
    """The manifests under ``given``, else those that `serve-app render` puts beside a config.

    Raises:
        ConfigError: ``given`` does not exist, or a file cannot be read.
    """
    if given is not None:
        if not given.exists():
            raise ConfigError(f"{given}: no such file or folder of manifests")
        return read([given])
    folder = config.resolve().parent.parent / "kuberay" / config.stem
    if all(file.name == "profile.yaml" for file in folder.rglob("*.yaml")):
        return None
    # All configs share the monitoring, which is rendered once, beside them.
    shared = folder.parent / "monitoring"
    return read([folder, shared] if shared.is_dir() else [folder])


def static(path: Path, documents: list[Document] | None) -> list[Finding]:
    """Every check that needs no cluster; ``documents`` are the manifests, if there are any.

    Raises:
        UserError: the file cannot be read at all, or is not a Serve config.
    """
    document = yaml_files.read(path)
    refuse_foreign(document, path)
    refuse_shapeless(document, path)
    findings = list(_engine_arguments(document))
    try:
        fleet = parse_document(document, path)
    except ConfigError as error:
        if all(finding.status != "fail" for finding in findings):
            said = str(error).removeprefix(f"{path}: ")
            findings.append(Finding("config", "fail", str(path), said))
        return findings
    for name, config in fleet.models.items():
        findings += check_model.model(name, config)
        findings += check_model.cores(name, config)
        if why := check_model.undeployable(config):
            fix = "mend the setting: a deployment would refuse it, or wait in vain"
            findings.append(Finding("placement", "fail", name, why, fix))
        findings += _started_elsewhere(name, config, fleet)
        findings += _chat_template(name, config)
    for_here = not gpus_needed(fleet)[1]  # then it is for a machine such as this one
    if for_here:
        findings += check_machine.lacks(fleet, on_this_machine.limits(fleet, all_memory=True))
    findings += swap.problems(fleet)
    findings += together.problems(fleet)
    if fleet.gateway is None:
        fix = "add an application with import_path serve_app.gateway:app and route_prefix /"
        findings.append(Finding("gateway", "fail", str(path), "no client can reach a model", fix))
    findings += check_model.fallbacks(fleet)
    findings += _shared_gpus(fleet)
    findings += _gateway(fleet, for_here=for_here and documents is None)
    findings += [Finding("serve settings", "warn", str(path), said) for said in notices(fleet)]
    findings += _renamed_metrics(str(path), path.read_text())
    findings += _secrets(fleet)
    findings += _versions(fleet)
    answers = {check: (str(path), said) for check, said in _BY_CONFIG.items()}
    if gpus_needed(fleet)[1]:  # a fleet without GPUs (the demo) has no cluster to check
        found, complete = _manifests(fleet, documents)
        findings += found
        if complete:
            answers |= {check: (_MANIFESTS, said) for check, said in _BY_MANIFESTS.items()}
    spoken = {finding.check for finding in findings}
    return findings + [
        Finding(check, "ok", about, said)
        for check, (about, said) in answers.items()
        if check not in spoken
    ]


def gpus_needed(fleet: Fleet) -> tuple[int, int]:
    """The GPUs of all models at their fewest and at their most replicas."""
    least = most = len(
        {it.resources.swap_group for it in fleet.models.values() if it.resources.device == "gpu"}
        - {None}
    )
    for config in fleet.models.values():
        resources = config.resources
        whole = not (resources.part_of_gpu or resources.swap_group)
        if resources.device == "gpu" and whole:
            each = defaults.parallelism(config.engine).gpus
            low, high = config.replica_range
            least, most = least + low * each, most + high * each
    for sharing in _sharing(fleet).values():
        least += len(packed((config, name, config.replica_range[0]) for name, config in sharing))
        most += len(packed((config, name, config.replica_range[1]) for name, config in sharing))
    return least, most


def _sharing(fleet: Fleet) -> dict[str, list[tuple[str, ModelConfig]]]:
    """The models with parts of GPUs, by the type of GPU that they ask for."""
    found: dict[str, list[tuple[str, ModelConfig]]] = {}
    for name, config in fleet.models.items():
        if config.resources.part_of_gpu:
            found.setdefault(config.resources.accelerator_type or "", []).append((name, config))
    return found


def _shared_gpus(fleet: Fleet) -> Iterator[Finding]:
    """What shares a GPU, with at least one replica of each model."""
    for kind, sharing in _sharing(fleet).items():
        models = ((config, name, max(1, config.replica_range[0])) for name, config in sharing)
        for gpu in packed(models):
            parts = " + ".join(f"{part.name} {part.fraction:g}" for part in gpu.parts)
            said = f"{parts} of {kind or 'a GPU'}, {gpu.free:g} left"
            yield Finding(together.CHECK, "ok", str(fleet.path), said)


def _engine_arguments(document: Document) -> Iterator[Finding]:
    """Check every argument of every model, so that one run shows all mistakes."""
    check = "engine arguments"
    for application in document["applications"]:
        arguments = get(application, "args.engine")
        if get(application, "import_path") != MODEL_IMPORT_PATH or not isinstance(arguments, dict):
            continue  # parse_document reports other types
        name = str(application.get("name"))
        wrong = list(engine_problems(arguments, mapping(application, "args.env")))
        yield from (Finding(check, "fail", name, said) for said in wrong)
        if not wrong:
            known = f"{len(arguments)} known to vLLM {engine_args.VLLM_VERSION}"
            yield Finding(check, "ok", name, known)


def _started_elsewhere(name: str, config: ModelConfig, fleet: Fleet) -> Iterator[Finding]:
    if hint := fleet.start_hint(config.model):
        said = f"model is {config.model}, and there is no such folder here"
        yield Finding("model", "warn", name, said, hint.removeprefix("; "))


def _gateway(fleet: Fleet, *, for_here: bool) -> Iterator[Finding]:
    """What the gateway finds when it starts, and who is let in."""
    if fleet.gateway is None:
        return
    about = str(fleet.path)
    problems = gateway_needs.problems(fleet, os.environ)
    wrong = [problem for problem in problems if for_here or not problem.elsewhere]
    for problem in wrong:
        status: Status = "warn" if problem.hint else "fail"
        yield Finding(
            "gateway", status, about, problem.why, problem.hint.removeprefix("; ") or None
        )
    notes = [*gateway_needs.odd_keys(fleet, os.environ)]
    if for_here:  # others have a network of their own, and `render` a rule for what is public
        notes += gateway_needs.open_to_all(fleet)
    yield from (Finding("keys", "warn", about, said) for said in notes)
    if not any(problem.why.startswith("keys: ") for problem in wrong):
        yield Finding("keys", "ok", about, gateway_needs.in_force(fleet, os.environ))


def _chat_template(name: str, config: ModelConfig) -> Iterator[Finding]:
    check, given = "chat template", config.engine.get("chat_template")
    environment = check_model.environment(config)
    if why := templates.missing(given):
        # In the image of a RayService may be what this machine has not.
        status: Status = "warn" if str(given).startswith("/") else "fail"
        fix = "correct it, or put the file there on every machine that runs the model"
        yield Finding(check, status, name, f"engine.chat_template: {why}", fix)
    elif not runner.pools(config.model, config.engine, environment) and templates.lacks_one(
        config.model, config.engine, environment
    ):
        said = "the tokenizer has none, so the model refuses /v1/chat/completions"
        fix = "set engine.chat_template to a file, if it is to chat; completions need none"
        yield Finding(check, "warn", name, said, fix)


def _renamed_metrics(about: str, text: str) -> Iterator[Finding]:
    for old, new in RENAMED_METRICS.items():
        if re.search(rf"vllm[:_]{old}\b", text):
            said = f"vLLM {engine_args.VLLM_VERSION} has no vllm:{old}"
            fix = f"use vllm:{new}" if "nothing" not in new else new
            yield Finding("metrics", "fail", about, said, fix)


def _secrets(fleet: Fleet) -> Iterator[Finding]:
    """Literal secrets in the config. The message never repeats one."""
    places = {f"{name}: env": config.env for name, config in fleet.models.items()}
    for application in fleet.document["applications"]:
        env = mapping(application, "runtime_env.env_vars")
        places[f"{application.get('name')}: runtime_env"] = env
    found = [(where, key) for where, env in places.items() for key in in_plain_text(env)]
    for where, key in found:
        said = f"{key} holds a secret in plain text"
        yield Finding("secrets", "fail", where, said, instead(key))
    if not found and looks_like_one(fleet.path.read_text()):  # also in a comment, or an x- key
        said = "something that looks like a token is in the file"
        yield Finding("secrets", "fail", str(fleet.path), said, "remove it and revoke the token")


def _versions(fleet: Fleet) -> Iterator[Finding]:
    wanted = {"vllm": engine_args.VLLM_VERSION, "ray": _RAY}
    for application in fleet.document["applications"]:
        pins = mapping(application, "runtime_env").get("pip")
        packages = pins.get("packages") if isinstance(pins, dict) else pins
        for pin in packages if isinstance(packages, list) else []:
            name, _, pinned = str(pin).partition("==")
            expected = wanted.get(re.split(r"[\[<>~!]", name)[0].strip())
            if expected and pinned and pinned != expected:
                said = f"runtime_env pins {pin}, but serve_app runs {expected}"
                fix = "remove the pin; the image brings both"
                yield Finding("versions", "fail", str(application.get("name")), said, fix)


def _manifests(fleet: Fleet, documents: list[Document] | None) -> tuple[list[Finding], bool]:
    """The findings of `serve-app validate` on the manifests, and whether it got to its end.

    The manifests are checked with the current config in place of the one in them.
    """
    services = Manifests(documents or []).services
    if not documents or not services:
        missing = "no rendered manifests beside the config" if not documents else "no RayService"
        said = f"{missing}: {', '.join(_BY_MANIFESTS)} are not checked"
        return [Finding("manifests", "warn", str(fleet.path), said, _RENDER)], False
    findings = []
    for service in services:
        try:
            rendered = yaml.safe_load(str(get(service, CONFIG)))
        except yaml.YAMLError:
            rendered = None
        if rendered != fleet.document:
            said = "holds another config than this one, which is judged here in its place"
            name = f"RayService/{get(service, 'metadata.name')}"
            findings.append(Finding("manifests", "warn", name, said, _AGAIN))
    now = [_with_config(d, fleet) if d in services else d for d in documents]
    judged = judge(now)
    # The checks of the config itself have run already.
    findings += [f for f in judged if f.check != "model" and not _is_of_env(f)]
    findings += _monitoring(Manifests(documents))
    complete = all(f.status != "fail" for f in judged if f.check in ("manifests", "model"))
    if not complete:
        said = "what is not listed here cannot be judged before the failures above are mended"
        findings.append(Finding("manifests", "warn", _MANIFESTS, said))
    return findings, complete


def _with_config(service: Document, fleet: Fleet) -> Document:
    spec = {**mapping(service, "spec"), "serveConfigV2": yaml.safe_dump(fleet.document)}
    return {**service, "spec": spec}


def _is_of_env(finding: Finding) -> bool:
    return finding.check == "secrets" and finding.about.endswith(CONFIG)


def _monitoring(manifests: Manifests) -> Iterator[Finding]:
    yield from _renamed_metrics(_MANIFESTS, yaml.safe_dump_all(manifests.documents))
    if not manifests.of_kind("PodMonitor", "ServiceMonitor"):
        fix = "add a PodMonitor for the port 'metrics'"
        yield Finding("metrics", "warn", _MANIFESTS, "nothing scrapes the Ray pods", fix)
    boards = manifests.of_kind("GrafanaDashboard") + [
        d for d in manifests.of_kind("ConfigMap") if "dashboard" in str(d).lower()
    ]
    if not boards:
        fix = "add the ConfigMaps of kuberay/monitoring"
        yield Finding("dashboards", "warn", _MANIFESTS, "no Grafana dashboards", fix)

"""Ray Serve LLM's ``llm_configs``: each LLMConfig becomes a model's application.

A file is a Serve config with applications of ``ray.serve.llm``, that application's ``args`` alone,
a list of LLMConfigs, or one LLMConfig. An entry of ``llm_configs`` may be the path of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from serve_app.config.foreign import RAY_SERVE_LLM, is_rays_model
from serve_app.config.yaml_files import note
from serve_app.convert import engine, source
from serve_app.convert.draft import Draft, Model
from serve_app.convert.source import Part


def convert(whole: Part) -> Draft:
    """Our config, as far as Ray Serve LLM's has one.

    Raises:
        ConfigError: a part is not what Ray Serve LLM takes.
    """
    draft = Draft(program=RAY_SERVE_LLM)
    if "applications" in whole:
        draft.top = {key: part.value for key, part in whole.items() if key != "applications"}
        for application in whole["applications"].entries():
            if is_rays_model(application.value):
                _add_application(draft, application)
            else:
                _take_over(draft, application)
    elif isinstance(whole.value, list):
        for config in whole.entries():
            _add_model(draft, config)
    elif "llm_configs" in whole:
        _add_args(draft, whole)
    else:
        _add_model(draft, whole)
    return draft


def _add_application(draft: Draft, application: Part) -> None:
    """One application of ``ray.serve.llm``: its models, and its ingress for our gateway."""
    before = len(draft.models)
    args = application["args"].named("args")
    _add_args(draft, args)
    if len(draft.models) == before:
        raise args.wrong("has no llm_configs")
    for key, part in application.items():
        if key == "runtime_env":
            for model in draft.models[before:]:
                _runtime_env(model, part.named(key))
        elif key == "route_prefix" and part.value not in ("/", None):
            draft.leave_out(part.named(key), "the gateway's routes begin at /, so at /v1")
        elif key not in ("name", "import_path", "args", "route_prefix"):
            draft.leave_out(part.named(key), "no counterpart: each model is an application now")


def _take_over(draft: Draft, application: Part) -> None:
    """An application of another kind, as it is; ``/`` is the gateway's."""
    value = application.value
    if isinstance(value, dict) and value.get("route_prefix", "/") == "/":
        name, place = value.get("name"), f"/{value.get('name')}"
        value = {**value, "route_prefix": note(place, "/ is the gateway's.")}
        draft.leave_out(
            application["route_prefix"].named(f"{name}.route_prefix"),
            f"is '{place}' now: / is the gateway's",
        )
    draft.others.append(value)


def _add_args(draft: Draft, args: Part) -> None:
    """What ``build_openai_app`` and its two relatives take."""
    for key, part in args.items():
        if key == "llm_configs":
            for config in part.entries():
                _add_model(draft, config)
        elif key in ("llm_config", "decode_config"):
            _add_model(draft, part)
        elif key == "prefill_config":
            draft.leave_out(
                part.named(key),
                "no counterpart: one engine, made of decode_config, has both phases; remove its "
                "kv_transfer_config, if it has one",
            )
        elif key == "ingress_deployment_config":
            _ingress(draft, part.named(key))
        else:
            draft.leave_out(part.named(key), "no counterpart")


def _from_file(config: Part) -> Part:
    """The LLMConfig itself where a path stands for it.

    Ray looks from where it is started, which is a folder above the file as a rule.
    """
    if not isinstance(config.value, str):
        return config
    places = (folder / config.value for folder in (Path(), *config.file.absolute().parents))
    return source.read(next(filter(Path.is_file, places), Path(config.value)))


def _ingress(draft: Draft, options: Part) -> None:
    """The ingress' deployment options: for the gateway, where they have the same sense."""
    for key, part in options.items():
        if key == "num_replicas" and isinstance(part.value, int):
            draft.gateway["replicas"] = part.value
        elif key == "autoscaling_config":
            for name, bound in part.items():
                if name == "min_replicas" and isinstance(bound.value, int) and bound.value:
                    draft.gateway.setdefault("replicas", bound.value)
                elif name != "min_replicas":
                    draft.leave_out(bound, "no counterpart: a fixed number of gateways")
        elif key == "ray_actor_options":
            for name, option in part.items():
                if name == "num_cpus":
                    draft.gateway["num_cpus"] = option.value
                else:
                    draft.leave_out(option, "no counterpart")
        else:
            draft.leave_out(part, "no counterpart: a gateway limits the bytes that it holds")


def _add_model(draft: Draft, config: Part) -> None:
    """The application of one LLMConfig."""
    config = _from_file(config).named("")
    if not isinstance(config.value, dict) or "model_loading_config" not in config:
        raise config.named("an LLMConfig").wrong("must be a mapping with 'model_loading_config'")
    model = Model()
    for key, field in _FIELDS.items():
        if key in config:
            field(model, config[key])
    for key, part in config.items():
        if key == "experimental_configs":
            _experimental(draft, model, part)
        elif key not in _FIELDS:
            model.leave_out(part, "no counterpart")
    draft.models.append(model)


def _model_loading(model: Model, loading: Part) -> None:
    model.answer_to(loading["model_id"], loading["model_id"].text())
    model.args["model"] = model.ids[0]
    for key, part in loading.items():
        if key == "model_source" and part.value is not None:
            model.args["model"] = _weights(model, part)
        elif key == "tokenizer_source":
            if part.value is not None:
                model.engine("tokenizer", part.text())
        elif key not in ("model_id", "model_source"):
            model.leave_out(part, "no counterpart")


_EXTRA = {"gs": "gcs", "az": "azure"}


def _weights(model: Model, part: Part) -> str:
    """A hub id, a folder or an address, which may be a mirror's ``bucket_uri``."""
    if isinstance(part.value, dict):
        for key, extra in part.items():
            if key != "bucket_uri" and extra.value:
                model.leave_out(extra, "no counterpart: put these files beside the weights")
        if part["bucket_uri"].value is None:
            return model.ids[0]
        part = part["bucket_uri"]
    weights = part.text()
    if "://" not in weights:
        return weights
    scheme, _, rest = weights.partition("://")
    if scheme not in ("s3", "gs", "az"):
        model.leave_out(part, f"vLLM reads s3://, gs:// and az://, not {scheme}://")
        return weights
    if scheme != "s3":
        model.leave_out(part, f"{scheme}:// needs runai-model-streamer[{_EXTRA[scheme]}] installed")
    elif rest.startswith("anonymous@"):
        rest = rest.removeprefix("anonymous@")
        why = "Ray's anonymous@: the bucket is read without credentials."
        model.put("env", "RUNAI_STREAMER_S3_UNSIGNED", note("1", why))
    why = "Reads the weights from the bucket, not the disk."
    model.engine("load_format", note("runai_streamer", why))
    return f"{scheme}://{rest}"


def _engine_kwargs(model: Model, part: Part) -> None:
    for key, argument in part.items():
        engine.add(model, argument, key)


def _accelerator_type(model: Model, part: Part) -> None:
    if part.value is None:
        return
    kind = part.text()
    if kind.startswith("TPU"):
        model.leave_out(part, "no counterpart: models run on GPUs, or on CPUs")
    else:
        model.put("resources", "accelerator_type", "A10G" if kind == "A10" else kind)


def _accelerator_config(model: Model, part: Part) -> None:
    kind = part["kind"].value
    if kind == "cpu":
        model.put("resources", "device", "cpu")
    elif kind not in (None, "gpu"):
        model.leave_out(part, "no counterpart: models run on GPUs, or on CPUs")


def _placement(model: Model, part: Part) -> None:
    """Bundles: ours follow from the parallel sizes, so they say the device, its type and CPUs."""
    if part.value is None:
        return
    bundles = list(_bundles(part))
    if not any(bundle.get("GPU") for bundle in bundles):
        model.put("resources", "device", "cpu")
    for name in {name for bundle in bundles for name in bundle} - {"CPU", "GPU"}:
        if name.startswith("accelerator_type:"):
            model.put("resources", "accelerator_type", name.partition(":")[2])
        else:
            model.leave_out(part.named(f"{part.name}.{name}"), "no counterpart: a resource of Ray")
    gpus = [bundle["GPU"] for bundle in bundles if bundle.get("GPU")]
    if len(gpus) == 1 and 0 < gpus[0] < 1:
        model.put("resources", "gpu_share", gpus[0])
    elif any(0 < size < 1 for size in gpus):
        model.leave_out(part, "no counterpart: a model has a part of one GPU, or whole GPUs")
    if cpus := sum(bundle.get("CPU", 0) for bundle in bundles):
        model.put("resources", "num_cpus", note(cpus, "As many as the bundles had together."))
    strategy = part["strategy"]
    if strategy.value in ("SPREAD", "STRICT_SPREAD"):
        model.leave_out(
            strategy,
            "no counterpart: the tensor-parallel ranks share a node, and pipeline stages are on as "
            "few nodes as have room",
        )


def _bundles(part: Part) -> Iterator[dict[str, Any]]:
    if "bundle_per_worker" in part:
        listed = [part["bundle_per_worker"]]
    else:
        listed = part["bundles"].entries()
    for bundle in listed:
        for key, amount in bundle.items():
            if isinstance(amount.value, bool) or not isinstance(amount.value, (int, float)):
                raise bundle.wrong(f"has {key}: {amount.value!r}, but it must be a number")
        yield bundle.value or {}


def _deployment(model: Model, options: Part) -> None:
    """Serve's options of the deployment."""
    for key, part in options.items():
        if key == "num_replicas":
            _num_replicas(model, part, options["autoscaling_config"])
        elif key == "autoscaling_config" and part.value is not None:
            _autoscaling(model, part)
        elif key == "ray_actor_options":
            _actor(model, part)
        elif key == "graceful_shutdown_timeout_s":
            model.args[key] = part.value
        elif key in _SERVES:
            deployments = model.more.setdefault("deployments", [{"name": "ModelServer"}])
            deployments[0][key] = part.value
        elif key != "autoscaling_config":
            model.leave_out(part, _WHY_OPTION.get(key, "no counterpart"))


_SERVES = (
    "health_check_period_s", "health_check_timeout_s", "graceful_shutdown_wait_loop_s",
    "logging_config", "max_replicas_per_node",
)  # fmt: skip
"""Options that our deployment takes under Serve's own names."""

_WHY_OPTION = {
    "max_ongoing_requests": "not needed: the engine runs max_num_seqs at once and queues the rest",
    "max_queued_requests": "no counterpart in the gateway; engine.max_num_queued_reqs limits an "
    "engine's queue",
    "request_router_config": "has its own way: the replica with the fewest requests in flight",
    "name": "not needed: the application has the model's name",
}


def _num_replicas(model: Model, part: Part, bounds: Part) -> None:
    if part.value == "auto":
        if "min_replicas" not in bounds:
            model.put("autoscaling", "min_replicas", 1)
        if "max_replicas" not in bounds:
            why = "What Serve makes of num_replicas: auto; set what you have GPUs for."
            model.put("autoscaling", "max_replicas", note(100, why))
    elif part.value is not None:
        model.args["replicas"] = part.value


def _autoscaling(model: Model, part: Part) -> None:
    """The bounds and delays are the same; the load is counted in another unit."""
    for key, setting in part.items():
        if key in _BOUNDS:
            if setting.value is not None:
                model.put("autoscaling", key, setting.value)
        elif key in ("target_ongoing_requests", "target_num_ongoing_requests_per_replica"):
            _target(model, setting)
        else:
            model.leave_out(setting, "no counterpart: replicas follow the load of the engines")


_BOUNDS = (
    "min_replicas", "max_replicas", "initial_replicas", "upscale_delay_s", "downscale_delay_s",
)  # fmt: skip


def _target(model: Model, part: Part) -> None:
    """Requests per replica; ours is a share of ``max_num_seqs``, which must be known for it."""
    most = model.args.get("engine", {}).get("max_num_seqs")
    if isinstance(part.value, (int, float)) and isinstance(most, int) and 0 < part.value <= most:
        why = f"{part.value:g} requests of max_num_seqs, {most}."
        model.put("autoscaling", "target_load", note(round(part.value / most, 3), why))
    else:
        model.leave_out(
            part, "autoscaling.target_load is a share of engine.max_num_seqs; 0.7 where not set"
        )


def _actor(model: Model, options: Part) -> None:
    for key, part in options.items():
        if key == "num_cpus":
            model.put("resources", "num_cpus", part.value)
        elif key == "memory" and isinstance(part.value, (int, float)):
            model.put("resources", "memory_gib", round(part.value / 2**30, 3))
        elif key == "accelerator_type":
            _accelerator_type(model, part)
        elif key == "runtime_env":
            _runtime_env(model, part)
        elif key == "num_gpus":
            model.leave_out(part, "not needed: engine.tensor_parallel_size says how many")
        else:
            model.leave_out(part, "no counterpart")


def _runtime_env(model: Model, part: Part) -> None:
    """A runtime environment: the model's own goes before its application's."""
    for key, value in part.items():
        if key == "env_vars":
            engine.add_environment(model, value)
        elif engine.holds_login(value.value):
            model.leave_out(value, "an address with a password in it, so it is not copied")
        else:
            model.more.setdefault("runtime_env", {}).setdefault(key, value.value)


def _lora(model: Model, part: Part) -> None:
    """Ray finds adapters in a bucket when they are asked for; ours are listed."""
    for key, setting in part.items():
        if key == "dynamic_lora_loading_path" and setting.value is not None:
            path = setting.text().rstrip("/")
            model.engine("enable_lora", True)
            model.leave_out(
                setting,
                "list the adapters, one for each folder in it: "
                f"adapters: [{{name: '{model.ids[0]}:NAME', path: '{path}/NAME'}}]",
            )
        elif key == "max_num_adapters_per_replica":
            model.engine("enable_lora", True)
            model.engine("max_loras", setting.value)
        elif setting.value is not None:
            model.leave_out(setting, "no counterpart")


def _experimental(draft: Draft, model: Model, part: Part) -> None:
    for key, setting in part.items():
        if key == "num_ingress_replicas" and isinstance(setting.value, int):
            most = max(setting.value, draft.gateway.get("replicas", 1))
            draft.gateway["replicas"] = most
        elif key == "stream_batching_interval_ms":
            model.leave_out(setting, "not needed: the gateway passes on each token as it comes")
        else:
            model.leave_out(setting, "no counterpart")


def _log_metrics(model: Model, part: Part) -> None:
    if part.value is False:
        model.leave_out(part, "no counterpart: the engines' metrics are always there")


def _llm_engine(model: Model, part: Part) -> None:
    if part.value not in (None, "vLLM"):
        raise part.wrong(f"is {part.value!r}, but serve_app runs vLLM only")


def _server_cls(model: Model, part: Part) -> None:
    if part.value is not None:
        if "sglang" in str(part.value).lower():
            raise part.wrong("is SGLang's, but serve_app runs vLLM only")
        model.leave_out(part, "no counterpart: vLLM's own server runs")


# In this order: what is set last wins, and the target of autoscaling needs the engine's.
_FIELDS: dict[str, Callable[[Model, Part], None]] = {
    "model_loading_config": _model_loading,
    "engine_kwargs": _engine_kwargs,
    "accelerator_type": _accelerator_type,
    "accelerator_config": _accelerator_config,
    "placement_group_config": _placement,
    "deployment_config": _deployment,
    "runtime_env": _runtime_env,
    "lora_config": _lora,
    "log_engine_metrics": _log_metrics,
    "llm_engine": _llm_engine,
    "server_cls": _server_cls,
}

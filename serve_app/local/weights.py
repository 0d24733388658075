"""Checks, before anything starts, that what a config wants to load is there.

vLLM finds out only after its imports and three starts, and then reports an error of the hub. The
user may never have meant the hub: ``models/mine`` is a folder only in the right working directory.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from serve_app.config import caches
from serve_app.config.document import Fleet
from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError, UserError
from serve_app.planner.model import metadata, templates

_HUB_S = 5.0
"""Seconds that the model hub gets to answer."""


def refuse_missing(fleet: Fleet) -> None:
    """Refuse a config with a model, tokenizer, adapter or template that does not exist.

    Raises:
        ConfigError: the first one that is missing, and where it was looked for.
    """
    for name, config in fleet.models.items():
        environment = os.environ | caches.downloads(config.cache_dir) | config.env
        if _is_on(environment, "VLLM_USE_MODELSCOPE") or "download_dir" in config.engine:
            continue  # loaded neither from the hub nor from its cache
        for setting, value in _named(config):
            if why := _missing(value, environment):
                if hint := fleet.start_hint(value):
                    why = f"there is no folder {metadata.as_folder(value).absolute()}{hint}"
                raise ConfigError(
                    f"{fleet.path}: application '{name}': {setting} is '{value}', but {why}"
                )
        if why := _without_weights(config.model, config.engine):
            at = f"{fleet.path}: application '{name}': model is '{config.model}'"
            raise ConfigError(f"{at}, but {why}")
        if why := templates.missing(config.engine.get("chat_template")):
            at = f"{fleet.path}: application '{name}': engine.chat_template"
            raise ConfigError(f"{at}: {why}; correct it")


def refuse_absent(model: str, engine: Mapping[str, Any]) -> None:
    """Refuse a model that is neither a folder nor in the cache, and that the hub does not have.

    ``engine`` are the engine arguments that the command line gives.

    Raises:
        UserError: where it was looked for, and what to do.
    """
    if why := _no_streamer(model):
        raise UserError(why)
    if why := _missing(model, os.environ) or _without_weights(model, engine):
        raise UserError(f"{model}: {why}")


def _named(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Every model or part of one that a config names by a folder or hub id."""
    yield "model", config.model
    for key in ("tokenizer", "hf_config_path"):
        if isinstance(value := config.engine.get(key), str):
            yield f"engine.{key}", value
    draft = config.engine.get("speculative_config")
    value = draft.get("model") if isinstance(draft, dict) else None
    if isinstance(value, str) and value.strip("[]") != "ngram":  # a draft without a model
        yield "engine.speculative_config.model", value
    for adapter in config.adapters:
        yield f"the path of the adapter '{adapter.name}'", adapter.path


def _missing(value: str, environment: Mapping[str, str]) -> str | None:
    """Why ``value`` cannot be loaded; None where it perhaps can."""
    if "://" in value:
        return None  # the store itself answers, or the planner, which reads its config.json
    path = metadata.as_folder(value)
    try:
        if path.is_dir():
            return None if any(path.iterdir()) else f"the folder {path.absolute()} is empty"
        if path.exists():
            return None
    except OSError as error:  # another user's folder
        return f"it cannot be read ({error.strerror}); let this user read it, or correct it"
    nowhere = f"there is no folder {path.absolute()}"
    if metadata.is_path(value) and "/" in value:  # gpt2 is a hub id too
        return f"{nowhere}; correct it, or give a hub id (organisation/name)"
    if metadata.snapshot(value, environment).is_dir():
        return None
    hub = _ask_hub(value, environment)
    if hub is None:
        return None
    return f"{nowhere}, and as a hub id it cannot be had: {hub}"


_FORMATS = (None, "auto", "hf", "safetensors", "pt")
"""Values of ``load_format`` with which vLLM takes the weights from the folder's files."""

_WEIGHTS = (".safetensors", ".bin", ".pt")


def _without_weights(model: str, engine: Mapping[str, Any]) -> str | None:
    """Why a model's folder cannot be loaded although its config.json is there."""
    folder = metadata.as_folder(model)
    asked = engine.get("load_format")
    if not (folder / "config.json").is_file() or asked not in _FORMATS:
        return None
    if any(file.suffix in _WEIGHTS and file.exists() for file in folder.iterdir()):
        return None
    return (
        f"the folder {folder.absolute()} has no weights (*{', *'.join(_WEIGHTS)}); copy or fetch "
        "the whole model (set engine.load_format where they are of another kind)"
    )


_OTHERWISE = "or copy the model here and give its folder (--no-check starts all the same)"


def _no_streamer(model: str) -> str | None:
    """Why vLLM could not read weights at an address; None for any other model."""
    if "://" not in model or importlib.util.find_spec("runai_model_streamer"):
        return None
    return (
        f"{model}, which vLLM reads with the package runai-model-streamer; install "
        "serve-app[gpu], which has it, or copy the model here and give its folder"
    )


def _ask_hub(name: str, environment: Mapping[str, str]) -> str | None:
    """Why the hub does not have the model, and what to do; None where it does."""
    if _is_on(environment, "HF_HUB_OFFLINE") or _is_on(environment, "TRANSFORMERS_OFFLINE"):
        return f"it is not in the cache, and HF_HUB_OFFLINE is set; unset it, {_OTHERWISE}"
    said: list[str | None] = []

    def ask() -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

        hub = HfApi(endpoint=environment.get("HF_ENDPOINT"), token=environment.get("HF_TOKEN"))
        try:
            hub.model_info(name, timeout=_HUB_S)
            said.append(None)
        except GatedRepoError:
            said.append("it is gated; accept its terms on the hub and set HF_TOKEN")
        except Exception as error:  # of the hub, of its HTTP client, or for a name that is no id
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status in (401, 403, 404):
                said.append(
                    "the hub has no such model, or a private one (then set HF_TOKEN); correct it"
                )
            elif isinstance(error, ValueError):  # a name that no model of the hub can have
                said.append("the hub has no such model; correct it")
            else:
                said.append(
                    f"the hub cannot be reached ({metadata.why_unreachable(error)}); set "
                    f"HF_ENDPOINT to one that can, {_OTHERWISE}"
                )

    # A thread, because the client's timeout does not cover the look-up of the host's name.
    thread = threading.Thread(target=ask, name="ask-hub", daemon=True)
    thread.start()
    thread.join(2 * _HUB_S)
    silent = f"the hub does not answer; set HF_ENDPOINT to one that does, {_OTHERWISE}"
    return said[0] if said else silent


def _is_on(environment: Mapping[str, str], variable: str) -> bool:
    """Whether a variable is on, as huggingface_hub reads its own variables."""
    return environment.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")

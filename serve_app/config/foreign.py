"""Which other program's config a YAML file is; :mod:`serve_app.convert` makes ours of it."""

from __future__ import annotations

from typing import Any

import yaml

from serve_app.config import engine_args

LITELLM = "LiteLLM"
RAY_SERVE_LLM = "Ray Serve LLM"
VLLM_SERVE = "vllm serve"

RAY_BUILDERS = ("ray.serve.llm", "ray.llm.")
"""How the ``import_path`` of a Ray Serve LLM application begins."""


def recognize(document: Any) -> str | None:
    """The program that takes this config: one of the names above; None for ours and any other."""
    if isinstance(document, list):
        is_ray = any(isinstance(item, dict) and "model_loading_config" in item for item in document)
        return RAY_SERVE_LLM if is_ray else None
    if not isinstance(document, dict):
        return None
    if "applications" in document:
        return RAY_SERVE_LLM if _has_only_rays_models(document["applications"]) else None
    if is_rayservice(document):
        try:
            return recognize(yaml.safe_load(document["spec"]["serveConfigV2"]))
        except yaml.YAMLError:
            return None
    if "model_list" in document:
        return LITELLM
    if "llm_configs" in document or "model_loading_config" in document:
        return RAY_SERVE_LLM
    if ("model" in document or "model_tag" in document) and all(map(_is_vllms, document)):
        return VLLM_SERVE
    return None


def resembles_vllm_serve(document: Any) -> bool:
    """Whether most of its keys are those of ``vllm serve``, of which a few may be misspelled."""
    if not isinstance(document, dict) or not document or "applications" in document:
        return False
    return 2 * sum(map(_is_vllms, document)) >= len(document)


def is_rayservice(document: Any) -> bool:
    """Whether it is a RayService with a config of Ray Serve in it."""
    spec = document.get("spec") if isinstance(document, dict) else None
    return (
        isinstance(spec, dict)
        and document.get("kind") == "RayService"
        and isinstance(spec.get("serveConfigV2"), str)
    )


def is_rays_model(application: Any) -> bool:
    """Whether an entry of ``applications`` is built by Ray Serve LLM."""
    return isinstance(application, dict) and str(application.get("import_path")).startswith(
        RAY_BUILDERS
    )


def _has_only_rays_models(applications: Any) -> bool:
    """Whether Ray Serve LLM has models here and serve_app has none."""
    if not isinstance(applications, list):
        return False
    paths = [str(a.get("import_path")) for a in applications if isinstance(a, dict)]
    ours = any(path.startswith("serve_app.") for path in paths)
    return not ours and any(map(is_rays_model, applications))


def _is_vllms(key: Any) -> bool:
    plain = str(key).replace("-", "_")
    return (
        plain in engine_args.table()
        or plain in engine_args.OWNED
        or plain in engine_args.SERVER_ONLY
        or plain in engine_args.RENAMED
    )

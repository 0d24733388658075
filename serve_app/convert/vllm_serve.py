"""A YAML for ``vllm serve --config``: engine arguments, flat, by the names of its command line."""

from __future__ import annotations

import json
from typing import Any

from serve_app.config.foreign import VLLM_SERVE
from serve_app.convert import engine
from serve_app.convert.draft import Draft, Model
from serve_app.convert.source import Part

_KEYS = (
    "make keys with `serve-app keys new NAME --file keys.yaml`, and name the file in the gateway's "
    "args, keys: {file: keys.yaml}"
)


def convert(whole: Part) -> Draft:
    """One model and a gateway.

    Raises:
        ConfigError: no model is named, or a value is not what ``vllm serve`` takes.
    """
    draft, model = Draft(program=VLLM_SERVE), Model()
    by_name = {key.replace("-", "_"): part for key, part in whole.items()}
    if not by_name.keys() & {"model", "model_tag"}:
        raise whole.wrong(
            "names no model, which `vllm serve` then takes from its command line; add model: ID"
        )
    weights = by_name["model"] if "model" in by_name else by_name["model_tag"]
    model.args["model"] = weights.text()
    for id in _listed(by_name, "served_model_name") or [model.args["model"]]:
        model.answer_to(by_name.get("served_model_name", weights), str(id))
    for plain, part in by_name.items():
        if plain in ("model", "model_tag", "served_model_name"):
            continue
        if plain in ("host", "port"):
            draft.top.setdefault("http_options", {})[plain] = part.value
        elif plain == "allowed_origins":
            draft.gateway["cors_allow_origins"] = part.value
        elif plain == "api_server_count":
            model.args["frontends"] = part.value
        elif plain == "lora_modules":
            model.args["adapters"] = [_adapter(part, text) for text in _listed(by_name, plain)]
        elif plain == "api_key":
            draft.leave_out(part, _KEYS)
        else:
            engine.add(model, part, plain)
    draft.models.append(model)
    return draft


def _listed(by_name: dict[str, Part], name: str) -> list[Any]:
    value = by_name[name].value if name in by_name else None
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _adapter(part: Part, module: Any) -> dict[str, Any]:
    """``name=path``, or a mapping or JSON with both."""
    if isinstance(module, str) and module.startswith("{"):
        try:
            module = json.loads(module)
        except ValueError:
            raise part.wrong(f"has {module!r}, which is not JSON") from None
    if isinstance(module, str):
        name, _, path = module.partition("=")
        module = {"name": name, "path": path}
    if not isinstance(module, dict):
        raise part.wrong(f"has {module!r}, but must be a list of name=path")
    return {"name": module.get("name"), "path": module.get("path")}

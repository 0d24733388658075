"""LiteLLM's ``config.yaml``: the models of ``model_list`` that run on servers of one's own.

An entry's ``model`` is ``provider/name``. What is with an outside provider stays there. Entries of
one model that share a server, or a ``model_name``, become one application: its ids are their
``model_name``, its replicas their servers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from serve_app.config.foreign import LITELLM
from serve_app.config.yaml_files import note, plain
from serve_app.convert import litellm_rest
from serve_app.convert.draft import Draft, Model
from serve_app.convert.source import Part
from serve_app.errors import ConfigError

_VLLM = ("hosted_vllm", "vllm", "huggingface")
"""Providers whose names of models are those of the hub."""

_OPENAI_LIKE = ("openai", "text-completion-openai", "custom_openai", "openai_like", "infinity")
"""Providers that are a server of one's own where ``api_base`` says so."""

_OTHER_SERVERS = (
    "ollama", "ollama_chat", "lm_studio", "llamafile", "xinference", "triton", "oobabooga",
    "docker_model_runner", "lemonade", "petals",
)  # fmt: skip
"""Servers of one's own with names of models that are not the hub's."""

_PROVIDERS_HOSTS = (
    "openai.com", "openai.azure.com", "ai.azure.com", "cognitiveservices.azure.com", "github.ai",
    "openrouter.ai", "together.xyz", "together.ai", "groq.com", "mistral.ai", "deepseek.com",
    "fireworks.ai", "googleapis.com", "x.ai", "api.nvidia.com", "perplexity.ai", "cohere.ai",
    "cohere.com", "anthropic.com", "aliyuncs.com", "moonshot.ai", "moonshot.cn", "deepinfra.com",
    "anyscale.com", "cerebras.ai", "sambanova.ai", "huggingface.co", "voyageai.com",
    "databricks.com", "replicate.com", "nebius.com", "z.ai", "hyperbolic.xyz", "novita.ai",
    "siliconflow.cn", "siliconflow.com", "minimax.io",
)  # fmt: skip
"""Domains behind which an OpenAI API is somebody else's."""


def convert(source: Part) -> Draft:
    """Our config, as far as LiteLLM's has one.

    Raises:
        ConfigError: a part is not what LiteLLM takes, or all models are at outside providers.
    """
    draft = Draft(program=LITELLM)
    groups: list[_Group] = []
    outside: list[str] = []
    for entry in source["model_list"].entries():
        _add_entry(draft, groups, outside, entry)
    if not groups:
        names = ", ".join(dict.fromkeys(outside))
        raise ConfigError(
            f"{source.file}: serve_app could run none of its models ({names}): it runs models on "
            "machines of yours, and these are at outside providers"
        )
    draft.models = [group.finish() for group in groups]
    for key, section in _SECTIONS.items():
        section(draft, source[key])
    for key, part in source.items():
        if key != "model_list" and key not in _SECTIONS and not key.startswith("x-"):
            draft.leave_out(part, litellm_rest.of_section(key))
    draft.advice.append(
        "LiteLLM does not say how a model runs: set engine and resources (`serve-app plan` shows "
        "on which GPUs it fits). api_base and api_key are gone: serve_app starts the servers "
        "itself, and they answer the gateway alone. Clients use port 8000 (LiteLLM's is 4000)."
    )
    if outside:
        draft.advice.append(
            "For the models of outside providers keep LiteLLM in front, with this gateway as an "
            "api_base."
        )
    return draft


@dataclass
class _Group:
    """Entries of ``model_list`` that are one application."""

    model: Model
    source: str
    servers: list[str] = field(default_factory=list)

    def finish(self) -> Model:
        servers = sorted(set(self.servers))
        if len(servers) > 1:
            why = f"LiteLLM balanced over {len(servers)} servers: {', '.join(servers)}."
            self.model.args["replicas"] = note(len(servers), why)
        return self.model


def _add_entry(draft: Draft, groups: list[_Group], outside: list[str], entry: Part) -> None:
    name = entry["model_name"].text()
    params = entry["litellm_params"].named("litellm_params")
    if not isinstance(params.value, dict):
        raise params.wrong(f"of '{name}' must be a mapping with 'model'")
    provider, model = _provider(params)
    server = _server(params)
    shown = entry.named(f"{name} ({params['model'].value})")
    if refusal := _refusal(provider, model, server):
        draft.leave_out(shown, refusal)
        outside.append(name)
        return
    server = server or "the default server"
    id = model.rsplit("/", 1)[-1] if "*" in name else name
    taken = next((g for g in groups if id in g.model.ids), None)
    if taken is not None and taken.source != model:
        draft.leave_out(
            shown,
            f"one id is one model here, and '{id}' is already {taken.source}; give it an id of "
            "its own",
        )
        return
    group = taken or next((g for g in groups if g.source == model and server in g.servers), None)
    first = group is None
    if group is None:
        group = _Group(Model(), model)
        group.model.args["model"] = model
        groups.append(group)
        if "/" not in model:
            group.model.leave_out(
                params["model"],
                f"'{model}' is the name that the server had for it; set `model` to the hub id or "
                "folder of its weights",
            )
    if "*" in name:
        group.model.leave_out(
            entry["model_name"],
            f"'{name}' is a pattern: list the ids that clients send in served_as",
        )
    group.model.answer_to(entry["model_name"], id)
    group.servers.append(server)
    _settings(group.model, params, entry["model_info"].named("model_info"), first)
    for key, part in entry.items():
        if key not in ("model_name", "litellm_params", "model_info"):
            group.model.leave_out(part.named(key), litellm_rest.of_param(key))


def _provider(params: Part) -> tuple[str, str]:
    """The provider, and its name for the model."""
    model = params["model"].text()
    if "custom_llm_provider" in params:
        provider = params["custom_llm_provider"].text()
        return provider, model.removeprefix(f"{provider}/")
    prefix, slash, rest = model.partition("/")
    if not slash:
        return "openai", model
    if prefix == "huggingface" and rest.count("/") == 2:
        rest = rest.split("/", 1)[1]  # huggingface/<inference provider>/<owner>/<model>
    return prefix, rest


def _server(params: Part) -> str | None:
    """``host:port`` of the entry's server, or the variable that names it."""
    for key in ("api_base", "base_url"):
        if params[key].value is not None:
            address = params[key].text()
            if address.startswith("os.environ/"):
                return address
            return urlsplit(address if "//" in address else f"//{address}").netloc.split("@")[-1]
    return None


def _refusal(provider: str, model: str, server: str | None) -> str | None:
    """Why serve_app cannot run it; None if it can."""
    if provider == "os.environ":
        return "its model is in an environment variable; write the model here"
    if "*" in model:
        return "no counterpart: a wildcard names no model"
    if provider in _VLLM:
        return None
    if provider in _OTHER_SERVERS:
        return f"{provider} has names of its own for models; run the model by its hub id instead"
    if provider in _OPENAI_LIKE and server and not _is_providers(server):
        return None
    return "no counterpart: at an outside provider"


def _is_providers(server: str) -> bool:
    host = (urlsplit(f"//{server}").hostname or "").rstrip(".")
    return any(host == domain or host.endswith(f".{domain}") for domain in _PROVIDERS_HOSTS)


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_DEFAULTS = "override_generation_config"
"""The engine argument that holds the defaults of these parameters."""


def _settings(model: Model, params: Part, info: Part, first: bool) -> None:
    """An entry's ``litellm_params`` and ``model_info``; ``first`` is the model's first entry."""
    sampling: dict[str, Any] = {}
    for key, part in params.items():
        if key in ("model", "custom_llm_provider", "api_base", "base_url", "api_key"):
            continue
        if key in _SAMPLING and _is_number(part.value):
            sampling[key] = part.value
        elif key == "extra_body":
            _extra_body(model, part)
        else:
            model.leave_out(part, litellm_rest.of_param(key))
    if sampling and first:
        why = "Defaults for requests that do not set them."
        model.engine(_DEFAULTS, note(sampling, why))
    elif sampling and sampling != plain(model.args.get("engine", {})).get(_DEFAULTS):
        model.leave_out(
            params.named(", ".join(sampling)),
            f"the first entry of '{model.ids[0]}' has other defaults; clients send these",
        )
    for key, part in info.items():
        if key == "mode":
            if part.value in ("embedding", "rerank"):
                model.engine("runner", "pooling")
        else:
            model.leave_out(part, litellm_rest.of_information(key))


def _extra_body(model: Model, part: Part) -> None:
    for key, value in part.items():
        if key == "chat_template_kwargs":
            model.engine("default_chat_template_kwargs", value.value)
        else:
            model.leave_out(value, litellm_rest.CLIENTS)


def _litellm_settings(draft: Draft, section: Part) -> None:
    for key, part in section.items():
        if key == "request_timeout":
            _timeout(draft, part)
        elif key == "model_alias_map":
            _aliases(draft, part)
        elif key in ("callbacks", "success_callback", "failure_callback", "service_callbacks"):
            named = part.value if isinstance(part.value, list) else [part.value]
            if any(name != "prometheus" for name in named):
                draft.leave_out(part, litellm_rest.CALLBACKS)
        else:
            draft.leave_out(part, litellm_rest.of_setting(key))


def _router_settings(draft: Draft, section: Part) -> None:
    for key, part in section.items():
        if key == "model_group_alias":
            _aliases(draft, part)
        elif key == "timeout":
            _timeout(draft, part)
        elif not (key == "routing_strategy" and part.value == "least-busy"):
            draft.leave_out(part, litellm_rest.of_setting(key))


def _general_settings(draft: Draft, section: Part) -> None:
    for key, part in section.items():
        if key == "max_request_size_mb" and _is_number(part.value) and part.value <= 1024:
            draft.gateway["max_body_mib"] = part.value
        else:
            draft.leave_out(part, litellm_rest.of_setting(key))


# The router's timeout goes before LiteLLM's own.
_SECTIONS = {
    "router_settings": _router_settings,
    "litellm_settings": _litellm_settings,
    "general_settings": _general_settings,
}


def _aliases(draft: Draft, section: Part) -> None:
    """``model_group_alias``: further ids, each for the group that it names."""
    for alias, part in section.items():
        target = part["model"].value if isinstance(part.value, dict) else part.value
        model = next((m for m in draft.models if target in m.ids), None)
        if model is None:
            draft.leave_out(part, f"its model '{target}' is not served here")
        elif any(alias in m.ids for m in draft.models):
            draft.leave_out(part, "a model has this id already")
        else:
            model.answer_to(part, alias)


def _timeout(draft: Draft, part: Part) -> None:
    if not _is_number(part.value):
        draft.leave_out(part, "not copied: set the gateway's request_timeout_s, in seconds")
    elif "request_timeout_s" in draft.gateway:
        draft.leave_out(part, "router_settings.timeout goes before it, and is taken")
    else:
        why = f"{part.name} in LiteLLM. Here: how long a replica may stay silent."
        draft.gateway["request_timeout_s"] = note(part.value, why)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

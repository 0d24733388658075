"""Engine arguments of another config, by the names that vLLM has for them now."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from serve_app.config import engine_args
from serve_app.config.secrets import in_plain_text
from serve_app.convert.draft import Model
from serve_app.convert.source import Part


def add(model: Model, part: Part, plain: str) -> None:
    """Put one argument, called ``plain`` without dashes, into the model's ``engine``.

    What this vLLM does not have under any name is kept: our loader says so, with a did-you-mean.
    """
    if plain in _NOW:
        for name, value in _NOW[plain](part.value).items():
            model.args.setdefault("engine", {})[name] = value
    elif plain == "device":
        if part.value == "cpu":
            model.put("resources", "device", "cpu")
    elif plain in _GONE:
        model.leave_out(part, f"not in vLLM {engine_args.VLLM_VERSION}: {_GONE[plain]}")
    elif plain in engine_args.RENAMED:
        instead = engine_args.RENAMED[plain].removeprefix("nothing; ")
        model.leave_out(part, f"not in vLLM {engine_args.VLLM_VERSION}: {instead}")
    elif plain in engine_args.OWNED:
        model.leave_out(part, engine_args.OWNED[plain])
    elif plain in engine_args.SERVER_ONLY:
        model.leave_out(part, "belongs to vLLM's own server, which does not run here")
    else:
        model.args.setdefault("engine", {})[plain] = part.value


_TASKS = {
    "embed": {"runner": "pooling", "convert": "embed"},
    "embedding": {"runner": "pooling", "convert": "embed"},
    "classify": {"runner": "pooling", "convert": "classify"},
    "score": {"runner": "pooling"},
    "reward": {"runner": "pooling"},
}
"""vLLM's former ``task``; it finds by itself that a model generates."""

_NOW: dict[str, Callable[[Any], dict[str, Any]]] = {
    "tp": lambda n: {"tensor_parallel_size": n},
    "pp": lambda n: {"pipeline_parallel_size": n},
    "dp": lambda n: {"data_parallel_size": n},
    "max_seq_len_to_capture": lambda n: {"max_cudagraph_capture_size": n},
    "max_context_len_to_capture": lambda n: {"max_cudagraph_capture_size": n},
    "guided_decoding_backend": lambda name: {"structured_outputs_config": {"backend": name}},
    "disable_log_requests": lambda off: {"enable_log_requests": not off},
    "worker_use_ray": lambda on: {"distributed_executor_backend": "ray"} if on else {},
    "cuda_graph_sizes": lambda sizes: {"cudagraph_capture_sizes": sizes},
    "override_pooler_config": lambda config: {"pooler_config": config},
    "task": lambda task: dict(_TASKS.get(str(task), {})),
}
"""Arguments that vLLM had once: what they are now."""

_GONE = {
    **dict.fromkeys(
        ("use_v2_block_manager", "disable_async_output_proc", "num_lookahead_slots",
         "preemption_mode", "multi_step_stream_outputs", "scheduler_delay_factor",
         "enable_prompt_adapter", "max_prompt_adapters", "max_prompt_adapter_token",
         "lora_extra_vocab_size", "long_lora_scaling_factors", "max_num_partial_prefills",
         "max_long_partial_prefills", "disable_frontend_multiprocessing"),
        "nothing takes its place",
    ),
    "rope_scaling": "set it in engine.hf_overrides",
    "rope_theta": "set it in engine.hf_overrides",
    "disable_mm_preprocessor_cache": "set engine.mm_processor_cache_gb: 0",
}  # fmt: skip
"""Further arguments that vLLM had once, and what to do."""


def add_environment(model: Model, part: Part) -> None:
    """Put variables into the model's ``env``, but no secret, and none that it has already.

    Raises:
        ConfigError: not a mapping.
    """
    for name, value in part.items():
        if name.startswith(("RAY_SERVE_LLM_", "RAYLLM_")):
            model.leave_out(value, "not needed: Ray Serve LLM's own")
        elif any(in_plain_text({name: value.value})) or holds_login(value.value):
            model.leave_out(value, "a secret, so it is not copied; set it where Ray runs")
        else:
            model.args.setdefault("env", {}).setdefault(name, value.value)


def holds_login(value: Any) -> bool:
    """Whether an address with a password or a token is in it, at any depth."""
    if isinstance(value, dict):
        return any(map(holds_login, value.values()))
    if isinstance(value, list):
        return any(map(holds_login, value))
    return isinstance(value, str) and bool(_LOGIN.search(value))


_LOGIN = re.compile(r"://(?!git@|anonymous@)[^/\s@]+@")

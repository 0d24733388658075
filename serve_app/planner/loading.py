"""Loads the checkpoint metadata that a config's model names."""

from __future__ import annotations

from dataclasses import replace

from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError, UserError
from serve_app.planner import choose, hardware
from serve_app.planner.hardware import GIB
from serve_app.planner.model import metadata
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.vllm import defaults, memory
from serve_app.planner.vllm.memory import Plan


def load_model(config: ModelConfig, *, offline: bool = False) -> Model:
    """The metadata of a config's model, and of its draft model if it has one.

    ``offline`` uses only files on this machine, found by the model's own name: an alias could
    belong to another model.

    Raises:
        UserError: the model's metadata cannot be had. A draft without metadata is left out instead.
    """
    aliases = () if offline else config.served_as
    overrides = config.engine.get("hf_overrides")
    model = metadata.load(
        config.model,
        also_known_as=aliases,
        offline=offline,
        overrides=overrides if isinstance(overrides, dict) else None,
    )
    draft = defaults.draft_of(config.engine)
    if draft is None or draft.model is None:
        return model
    try:
        return replace(model, draft=metadata.load(draft.model, offline=offline))
    except UserError:
        return model  # the report's notes say so


def load_known(config: ModelConfig) -> Model | None:
    """The metadata, where it is on this machine and is surely that which vLLM would read."""
    other = config.engine.keys() & metadata.OTHER_CONFIG
    if other - {"hf_overrides"} or (other and not isinstance(config.engine["hf_overrides"], dict)):
        return None
    try:
        return load_model(config, offline=True)
    except UserError:
        return None


_PROCESS_GIB = 1.5
"""Host memory of a replica on the CPU engine beside weights, activations and KV cache: an
estimate."""


def cpu_bytes(plan: Plan) -> int:
    """Host memory that a replica on the CPU engine takes, about."""
    return plan.tightest.requested + int(_PROCESS_GIB * GIB)


def cpu_plan(model: Model, config: ModelConfig) -> Plan:
    """The plan of a model on vLLM's CPU engine."""
    # A GPU with bfloat16 and the small batch defaults stands in: the CPU engine has both too.
    like = hardware.gpus()["A100-80G"]
    engine = defaults.resolve(choose.arguments_of(config), model.shape, like)
    space = config.env.get("VLLM_CPU_KVCACHE_SPACE", str(memory.DEFAULT_CPU_KV_GIB))
    try:
        kv_gib = float(space)
    except ValueError:
        raise ConfigError(f"env.VLLM_CPU_KVCACHE_SPACE is {space!r}, not a number of GiB") from None
    front_ends = 1 if config.frontends == "auto" else config.frontends
    return memory.plan_on_cpu(model, engine, kv_gib, config.resources.memory_gib, front_ends)

"""Environment variables: of a replica, by its settings, and of what has a port for clients."""

from __future__ import annotations

import os

from serve_app.config import caches
from serve_app.config.settings import ModelConfig


def environment(config: ModelConfig) -> dict[str, str]:
    """Environment variables of a replica on this node: the config's, over what vLLM needs."""
    # StartWatch bounds the start. vLLM's own limit covers only a part of it, and is a part of the
    # key of what it compiles: with start_timeout_s here, to edit that would compile all anew.
    env = {"VLLM_ENGINE_READY_TIMEOUT_S": "604800"}
    if config.cache_dir:
        env |= caches.downloads(config.cache_dir) | caches.compiled(config.cache_dir)
    if config.adapters or config.engine.get("enable_lora"):
        # Lets vLLM load an adapter when it is first asked for (serve_app.replica.adapters).
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if config.resources.device == "cpu":
        # vLLM's default takes most of the machine's memory for each engine, and pins each
        # engine's threads to the same cores.
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if config.tensor_parallel_size * config.pipeline_parallel_size == 1:
            # The worker runs inside EngineCore: one process and one import of torch less.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Ray would set it to num_cpus, which is what is reserved, not what may be used. One core
        # is left to the front end, as vLLM's own binding does: threads of a batch that share
        # their cores with it wait for each other.
        cores = len(os.sched_getaffinity(0))
        env["OMP_NUM_THREADS"] = str(max(1, cores - 1))
    return env | config.env


_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def front() -> dict[str, str]:
    """For each process with an HTTP port for clients: ``serve_app.gateway.front`` around it.

    An operator's own callback stays.
    """
    return {_CALLBACK: os.environ.get(_CALLBACK, "serve_app.gateway.front:middlewares")}

"""Environment variables of replicas, and of processes with an HTTP port for clients."""

from __future__ import annotations

import os

from serve_app.config import caches
from serve_app.config.settings import ModelConfig


def environment(config: ModelConfig) -> dict[str, str]:
    """Environment variables of a replica on this node: the config's, over those that vLLM needs."""
    # StartWatch limits the start. vLLM's own limit covers only a part of the start, and is in the
    # key of vLLM's compile cache: a copy of start_timeout_s here would make each edit recompile.
    env = {"VLLM_ENGINE_READY_TIMEOUT_S": "604800"}
    if config.cache_dir:
        env |= caches.downloads(config.cache_dir) | caches.compiled(config.cache_dir)
    if config.adapters or config.engine.get("enable_lora"):
        # Lets vLLM load an adapter when it is first asked for (serve_app.replica.adapters).
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if config.resources.device == "cpu":
        # By default each vLLM engine takes most of the machine's memory, and all engines pin
        # their threads to the same cores.
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if config.tensor_parallel_size * config.pipeline_parallel_size == 1:
            # The worker runs inside EngineCore: one process and one import of torch less.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if config.engine.get("enforce_eager"):
            # vLLM then compiles no model, but some of its functions still compile themselves, with
            # a C++ compiler and for seconds, when the first request comes.
            env["TORCHDYNAMO_DISABLE"] = "1"
        # Ray would set it to num_cpus, which is only the reservation. One core is left to the
        # front end, as in vLLM's own binding: a batch's threads wait for the one thread that has
        # to share its core.
        cores = len(os.sched_getaffinity(0))
        env["OMP_NUM_THREADS"] = str(max(1, cores - 1))
    env |= config.env
    if plugins := env.get("VLLM_PLUGINS"):
        # vLLM then loads these only, and ours ends an engine whose replica is gone.
        env["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins.split(","), "serve_app"]))
    return env


_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def front() -> dict[str, str]:
    """Variables that put ``serve_app.gateway.front`` around each HTTP port for clients.

    A callback that an operator has set stays.
    """
    return {_CALLBACK: os.environ.get(_CALLBACK, "serve_app.gateway.front:middlewares")}

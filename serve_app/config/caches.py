"""Where vLLM 0.29 and what it stands on keep what they download and compile.

The one place that knows these variables: a model's ``cache_dir`` and the pods on Kubernetes both
take them from here. Nothing here differs between the replicas of a model: vLLM's cache key would
differ too.
"""

from __future__ import annotations


def downloads(folder: str | None) -> dict[str, str]:
    """Weights and tokenizers: the same for every machine. Nothing where there is no folder."""
    return {"HF_HOME": f"{folder}/huggingface"} if folder else {}


def compiled(folder: str) -> dict[str, str]:
    """Code and kernels, and what was measured: right for one kind of machine only.

    vLLM keys most of it by the GPU's type, but not which GPUs reach each other's memory.
    """
    return {
        "VLLM_CACHE_ROOT": f"{folder}/vllm",  # torch.compile, DeepGEMM, autotuning
        "VLLM_ENABLE_STARTUP_PLAN": "1",  # the KV cache's size is not profiled anew
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "FLASHINFER_WORKSPACE_BASE": folder,  # kernels that are compiled at the first start
    }

"""Variables for the cache folders of vLLM 0.29 and its libraries.

Both a model's ``cache_dir`` and the pods on Kubernetes use this module. The values are the same for
all replicas of a model, because they are part of vLLM's cache key.
"""

from __future__ import annotations


def downloads(folder: str | None) -> dict[str, str]:
    """For weights and tokenizers, which are the same on every machine. Empty without a folder."""
    return {"HF_HOME": f"{folder}/huggingface"} if folder else {}


def compiled(folder: str) -> dict[str, str]:
    """For compiled code, kernels and measurements, which are valid for one kind of machine only.

    vLLM's keys include the GPU's type, but not which GPUs can access each other's memory.
    """
    return {
        "VLLM_CACHE_ROOT": f"{folder}/vllm",  # torch.compile, DeepGEMM, autotuning
        "VLLM_ENABLE_STARTUP_PLAN": "1",  # does not profile the KV cache's size again
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "FLASHINFER_WORKSPACE_BASE": folder,  # kernels that are compiled at the first start
    }

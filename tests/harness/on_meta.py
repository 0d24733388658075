"""One rank of a model built from vLLM's own classes on torch's meta device, as on a CUDA GPU.

A program of its own, because it makes vLLM take this machine for one with GPUs::

    python -m harness.on_meta < cases.json > bytes.json

A case is ``{"config": config.json, "capability": [9, 0], "engine": {…}}``. The answer has for each
case the bytes of rank 0's parameters and buffers once vLLM has repacked them, or what went wrong.
Kernels that only repack are played by tensors of the same size. No weights are allocated.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

_CUDA_LIBRARIES = (
    "_C_stable_libtorch", "_moe_C_stable_libtorch", "_moe_C",
    "vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C",
)  # fmt: skip


class _Group:
    """A group of ``size`` ranks that is only asked for its sizes."""

    def __init__(self, size: int) -> None:
        self.world_size, self.rank_in_group, self.local_rank = size, 0, 0
        self.ranks = list(range(size))
        self.is_first_rank, self.is_last_rank = True, True
        self.device_group = self.cpu_group = self

    def size(self) -> int:
        return self.world_size

    def rank(self) -> int:
        return 0


class _Operators:
    """Custom operators; those of CUDA exist, but are not called."""

    def __init__(self, there: Any) -> None:
        self._there = there

    def __getattr__(self, name: str) -> Any:
        return getattr(self._there, name, lambda *_, **__: None)


def pretend(capability: tuple[int, int] = (9, 0)) -> Any:
    """Make vLLM take this machine for one with GPUs; the platform, to set ``capability`` on."""
    os.environ.update(VLLM_LOGGING_LEVEL="CRITICAL", HF_HUB_OFFLINE="1")
    for name in _CUDA_LIBRARIES:
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
    import torch
    import vllm.platforms as platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Platform(CudaPlatformBase):  # type: ignore[misc]
        now = capability
        device_type = "meta"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*cls.now)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "a GPU"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def is_fully_connected(cls, device_ids: list[int]) -> bool:
            return True

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

        @classmethod
        def device_count(cls) -> int:
            return 8

        @classmethod
        def current_device(cls) -> str:
            return "meta"

    platform = Platform()
    platforms.current_platform = platforms._current_platform = platform
    import vllm.utils.import_utils as packages
    import vllm.utils.torch_utils as streams

    streams._aux_stream = object()
    packages.has_triton_kernels = packages.has_deep_gemm = lambda: True  # vLLM's image has both
    import vllm._custom_ops as ops

    for space in ("_C", "_moe_C", "_C_cache_ops"):
        setattr(torch.ops, space, _Operators(getattr(torch.ops, space)))
    ops.machete_prepack_B = lambda b, **_: torch.empty_like(b.contiguous())
    ops.gptq_marlin_repack = lambda b_q_weight, perm, size_k, size_n, num_bits, *_, **__: (
        torch.empty((size_k // 16, size_n * (num_bits // 2)), dtype=b_q_weight.dtype)
    )
    import vllm.model_executor.layers.fused_moe.expert_map_manager as experts
    import vllm.model_executor.model_loader.utils as loader
    import vllm.v1.attention.backends.flash_attn as flash

    loader.record_metadata_for_reloading = lambda _: None
    loader.device_loading_context = lambda *_: contextlib.nullcontext()
    loader.release_device_memory_under_pressure = lambda _: None
    flash.flash_attn_supports_sinks = lambda *_: True
    experts.ExpertMapManager.get_compressed_map_string = lambda _: ""
    return platform


def rank_bytes(config: dict[str, Any], engine: dict[str, Any], *, repack: bool = True) -> int:
    """Bytes of the first rank's parameters and buffers; call :func:`pretend` before."""
    import torch
    import vllm.distributed.parallel_state as parallel
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import (
        initialize_model,
        process_weights_after_loading,
    )
    from vllm.utils.torch_utils import set_default_torch_dtype

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        arguments = EngineArgs(
            model=folder, skip_tokenizer_init=True, load_format="dummy", enforce_eager=True,
            distributed_executor_backend="mp", **engine,
        )  # fmt: skip
        found = arguments.create_engine_config()
    tensor = found.parallel_config.tensor_parallel_size
    for name, size in {"_TP": tensor, "_EP": tensor, "_WORLD": tensor,
                       "_PP": 1, "_DP": 1, "_DCP": 1, "_PCP": 1}.items():  # fmt: skip
        setattr(parallel, name, _Group(size))
    meta = torch.device("meta")
    with set_current_vllm_config(found), meta:
        with set_default_torch_dtype(found.model_config.dtype):
            model = initialize_model(vllm_config=found)
        if repack:
            process_weights_after_loading(model, found.model_config, meta)
    storages = [one.untyped_storage() for one in [*model.parameters(), *model.buffers()]]
    return sum({one._cdata: one.nbytes() for one in storages}.values())


def main() -> None:
    said, sys.stdout = sys.stdout, sys.stderr
    platform = pretend()
    answers: list[int | str] = []
    for case in json.load(sys.stdin):
        type(platform).now = tuple(case["capability"])
        try:
            answers.append(rank_bytes(case["config"], case["engine"], repack=case["repack"]))
        except Exception as error:  # the other cases count all the same
            answers.append(f"{type(error).__name__}: {error}")
    json.dump(answers, said)


if __name__ == "__main__":
    main()

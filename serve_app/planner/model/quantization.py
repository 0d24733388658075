"""How a weight matrix is stored, and which GPUs can use it.

A scheme turns the logical matrix ``[out, in]`` of a checkpoint into the tensors that vLLM
keeps on the GPU: the packed weight and its scales and zero points.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from serve_app.errors import ConfigError
from serve_app.planner.model.tensors import Tensor

_INT32_BITS = 32


@dataclass(frozen=True)
class Quantization:
    """A weight format. ``bits`` is the width of one stored weight.

    ``block`` is the tile that shares a scale, as ``(out, in)``; ``group_size`` the number of
    consecutive inputs that do (-1: a whole row). ``ignored`` names modules left unquantized.
    """

    method: str
    bits: float
    group_size: int = -1
    block: tuple[int, int] | None = None
    zero_points: bool = False
    desc_act: bool = False
    spare: bool = False
    """GPTQ's own checkpoints hold zero points and an order of inputs even where neither is used."""
    lm_head: bool = False
    online: bool = False
    ignored: tuple[str, ...] = ()
    kv_cache_dtype: str | None = None
    """The KV cache's dtype, if the checkpoint has scales for it."""

    @property
    def min_capability(self) -> int:
        """The least compute capability that vLLM accepts for it, times ten (8.0 is 80)."""
        return _MIN_CAPABILITY.get(self.method, 75)

    @property
    def label(self) -> str:
        """Its usual name: ``fp8``, ``awq int4`` …"""
        if self.method in ("awq", "gptq"):
            return f"{self.method} int{self.bits:g}"
        if self.method == "compressed-tensors":
            return f"compressed-tensors {self.bits:g}-bit"
        return self.method

    def ignores(self, module: str) -> bool:
        """Whether ``module`` (a dotted name) stays in the model's own dtype."""
        for pattern in self.ignored:
            if pattern.startswith("re:"):
                if re.match(pattern[3:], module):
                    return True
            elif f".{pattern}." in f".{module}." or (self.method == "awq" and pattern in module):
                return True
        return False

    def pack(self, weight: Tensor) -> list[Tensor]:
        """The tensors that stand for a matrix ``[…, out, in]`` (leading axes are experts)."""
        *lead, out, inputs = weight.shape
        stem = weight.name.removesuffix(".weight")

        def tensor(suffix: str, dtype: str, *shape: int) -> Tensor:
            return replace(weight, name=f"{stem}.{suffix}", dtype=dtype, shape=(*lead, *shape))

        groups = 1 if self.group_size <= 0 else math.ceil(inputs / self.group_size)
        if self.method in ("awq", "gptq"):
            per_int = _INT32_BITS / self.bits
            packed = [
                tensor("qweight", "I32", inputs, math.ceil(out / per_int)),
                tensor("scales", weight.dtype, groups, out),
            ]
            if self.zero_points or self.spare:
                packed.append(tensor("qzeros", "I32", groups, math.ceil(out / per_int)))
            if self.desc_act or self.spare:
                packed.append(tensor("g_idx", "I32", inputs))
            return packed
        if self.bits == 4:
            # NVFP4 scales 16 inputs by one byte, MXFP4 32 of them (modelopt.py, mxfp4.py).
            span = self.group_size if self.group_size > 0 else 16
            scale = "F8_E4M3" if self.method in _BYTE_SCALES else weight.dtype
            return [
                tensor("weight_packed", "U8", out, math.ceil(inputs / 2)),
                tensor("weight_scale", scale, out, math.ceil(inputs / span)),
            ]
        if self.block:
            rows, columns = self.block
            scales = tensor(
                "weight_scale_inv", "F32", math.ceil(out / rows), math.ceil(inputs / columns)
            )
        elif self.method == "mxfp8":
            scales = tensor("weight_scale", "U8", out, math.ceil(inputs / 32))
        else:
            scales = tensor("weight_scale", "F32", out, groups)
        kind = "I8" if "int8" in self.method else "F8_E4M3"
        return [replace(weight, dtype=kind), scales]


_BYTE_SCALES = ("modelopt_fp4", "nvfp4_per_token", "mxfp4")

# get_min_capability() of each class in vllm/model_executor/layers/quantization/, where it is
# above the 75 that vLLM's wheels need for anything.
_MIN_CAPABILITY = {
    "fbgemm_fp8": 80, "modelopt": 80, "mxfp4": 80, "experts_int8": 80, "fp_quant": 100,
}  # fmt: skip

# Below this capability vLLM keeps fp8 weights but multiplies in 16 bits, through Marlin
# (vllm/model_executor/layers/quantization/fp8.py: `use_marlin`).
FP8_HARDWARE_CAPABILITY = 89

_METHOD_ALIASES = {
    "auto_awq": "awq", "awq_marlin": "awq", "auto_gptq": "gptq", "gptq_marlin": "gptq",
    "gptq_bitblas": "gptq", "compressed_tensors": "compressed-tensors",
}  # fmt: skip

# `--quantization` values that turn a 16-bit checkpoint into fewer bits while it loads
# (vllm/config/quantization.py: _ONLINE_SHORTHANDS).
ONLINE = {
    "fp8": Quantization("fp8", 8, online=True),
    "fp8_per_tensor": Quantization("fp8_per_tensor", 8, online=True),
    "fp8_per_channel": Quantization("fp8_per_channel", 8, online=True),
    "fp8_per_block": Quantization("fp8_per_block", 8, block=(128, 128), online=True),
    "mxfp8": Quantization("mxfp8", 8, online=True),
    "int8_per_channel_weight_only": Quantization("int8_per_channel_weight_only", 8, online=True),
    "experts_int8": Quantization("experts_int8", 8, online=True),
    "nvfp4_per_token": Quantization("nvfp4_per_token", 4, group_size=16, online=True),
}


def from_config(config: dict[str, Any]) -> Quantization | None:
    """The scheme that a checkpoint's ``quantization_config`` declares, if any.

    Raises:
        ConfigError: a scheme that vLLM 0.29 does not have.
    """
    raw = config.get("quantization_config") or config.get("compression_config")
    if raw is None:
        raw = (config.get("text_config") or {}).get("quantization_config")
    if not isinstance(raw, dict):
        return None
    method = str(raw.get("quant_method") or "").lower()
    method = _METHOD_ALIASES.get(method, method)
    ignored = _names(raw, "modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
    kv_cache_dtype = _kv_cache_dtype(raw)
    if method in ("awq", "gptq"):
        return Quantization(
            method,
            bits=int(raw.get("bits") or raw.get("w_bit") or 4),
            group_size=int(raw.get("group_size") or raw.get("q_group_size") or -1),
            zero_points=bool(raw.get("zero_point"))
            if method == "awq"
            else not raw.get("sym", True),
            spare=method == "gptq",
            desc_act=bool(raw.get("desc_act")),
            lm_head=bool(raw.get("lm_head")),
            ignored=ignored,
        )
    if method in ("fp8", "fbgemm_fp8", "deepseek_v4_fp8"):
        block = raw.get("weight_block_size")
        return Quantization(
            "fp8" if method == "deepseek_v4_fp8" else method,
            bits=8,
            block=(int(block[0]), int(block[1])) if block else None,
            ignored=ignored,
            kv_cache_dtype=kv_cache_dtype,
        )
    if method == "compressed-tensors":
        group: dict[str, Any] = next(iter((raw.get("config_groups") or {}).values()), {})
        weights = group.get("weights") or {}
        block = weights.get("block_structure")
        integer = weights.get("type") == "int"
        bits = int(weights.get("num_bits") or 8)
        if bits == 4 and integer:
            return Quantization(
                "gptq",  # the same packing: int32 words, one scale per group
                bits=4,
                group_size=int(weights.get("group_size") or -1),
                zero_points=not weights.get("symmetric", True),
                ignored=ignored,
                kv_cache_dtype=kv_cache_dtype,
            )
        return Quantization(
            "compressed-tensors",
            bits=bits,
            group_size=int(weights.get("group_size") or -1),
            block=(int(block[0]), int(block[1])) if block else None,
            ignored=ignored,
            kv_cache_dtype=kv_cache_dtype,
        )
    if method == "mxfp4":
        return Quantization("mxfp4", bits=4, group_size=32, ignored=ignored)
    if method.startswith("modelopt") or raw.get("quant_algo"):
        four = "FP4" in str(raw.get("quant_algo") or method).upper()
        return Quantization(
            "modelopt_fp4" if four else "modelopt",
            bits=4 if four else 8,
            group_size=16 if four else -1,
            ignored=ignored,
            kv_cache_dtype=kv_cache_dtype,
        )
    if method in ("experts_int8", "torchao", "quark", "inc", "fp_quant"):
        return Quantization(method, bits=8, ignored=ignored)
    raise ConfigError(
        f"the checkpoint's quantization '{method or 'unnamed'}' is not one that vLLM 0.29 loads; "
        "take an AWQ, GPTQ or fp8 checkpoint of the model, or the model itself with "
        "engine.quantization: fp8"
    )


def online(name: str) -> Quantization:
    """The scheme that ``engine.quantization`` asks for on a 16-bit checkpoint.

    Raises:
        ConfigError: a scheme that needs a checkpoint quantized in advance.
    """
    scheme = ONLINE.get(name)
    if scheme is None:
        raise ConfigError(
            f"engine.quantization: {name} needs a checkpoint that is quantized that way; "
            f"while loading, vLLM can make {', '.join(ONLINE)}"
        )
    return scheme


def _names(raw: dict[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(str(name) for key in keys for name in (raw.get(key) or ()))


def _kv_cache_dtype(raw: dict[str, Any]) -> str | None:
    scheme = raw.get("kv_cache_scheme")
    if isinstance(scheme, dict) and scheme.get("type") == "float" and scheme.get("num_bits") == 8:
        return "fp8"
    if "FP8" in str(raw.get("kv_cache_quant_algo") or "").upper():
        return "fp8"
    return None

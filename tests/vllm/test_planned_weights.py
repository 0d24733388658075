"""The planner's weights against vLLM's own model classes, built on torch's meta device.

Tensors are compared, without the rounding of CUDA's allocator. Models are cut to a few layers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from serve_app.planner import hardware
from serve_app.planner.model import metadata
from serve_app.planner.vllm import defaults, memory

ROOT = Path(__file__).parents[2]
LAYERS = 8


@dataclass(frozen=True)
class Case:
    """A model of the kept ones (or of benchmarks/shapes) on GPUs of one type.

    ``repack`` is False where vLLM's repacking needs a GPU's values, and changes no size.
    """

    model: str
    gpu: str = "H100"
    engine: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    repack: bool = True

    @property
    def id(self) -> str:
        name = self.model.rpartition("/")[2] or self.changed["model_type"]
        return f"{name}-{self.gpu}-{self.engine}-{','.join(self.changed)}"

    @property
    def config(self) -> dict[str, Any]:
        if not self.model:
            return self.changed
        kept = ROOT / "serve_app/data/models" / self.model.replace("/", "--") / "config.json"
        path = kept if kept.is_file() else ROOT / "benchmarks/shapes" / f"{self.model}.json"
        config: dict[str, Any] = json.loads(path.read_text())
        layers = min(LAYERS, config["num_hidden_layers"])
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:layers]
        return {**config, "num_hidden_layers": layers, **self.changed}


def tp(size: int, **more: Any) -> dict[str, Any]:
    return {"tensor_parallel_size": size, **more}


GPTQ = "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"
# vLLM reads from the weights which modules are quantized; here are none to read.
GPTQ_CONFIG: dict[str, Any] = {
    "quantization_config": {
        "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "quant_method": "gptq",
        "modules_in_block_to_quantize": [
            [f"self_attn.{name}_proj" for name in "qkvo"],
            [f"mlp.{name}_proj" for name in ("gate", "up", "down")],
        ],
    },
}  # fmt: skip
GEMMA_12B: dict[str, Any] = {
    "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}  # fmt: skip
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 8192,
    "rope_scaling": {
        "rope_type": "longrope", "factor": 16.0, "short_factor": [1.0] * 64,
        "long_factor": [4.0] * 64,
    },
}  # fmt: skip
YARN: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
    },
}  # fmt: skip
MINIMAX_M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "hidden_size": 3072,
    "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 48,
    "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64, "num_local_experts": 256,
    "num_experts_per_tok": 8, "shared_intermediate_size": 0, "use_qk_norm": True,
    "use_routing_bias": True, "scoring_func": "sigmoid", "vocab_size": 200064,
    "max_position_embeddings": 196608, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "quantization_config": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
}  # fmt: skip
MODERNBERT: dict[str, Any] = {
    "architectures": ["ModernBertModel"], "model_type": "modernbert", "hidden_size": 768,
    "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12,
    "vocab_size": 50368, "max_position_embeddings": 8192, "torch_dtype": "float32",
    "global_attn_every_n_layers": 3, "local_attention": 128, "norm_bias": False,
    "mlp_bias": False, "attention_bias": False,
}  # fmt: skip
NOMIC: dict[str, Any] = {
    "architectures": ["NomicBertModel"], "model_type": "nomic_bert", "n_embd": 768, "n_head": 12,
    "n_inner": 3072, "n_layer": 12, "n_positions": 8192, "max_trained_positions": 2048,
    "vocab_size": 30528, "type_vocab_size": 2, "activation_function": "swiglu",
    "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "prenorm": False,
    "layer_norm_epsilon": 1e-12, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
    "rotary_emb_scale_base": None, "rotary_emb_interleaved": False, "torch_dtype": "float32",
}  # fmt: skip
DEEPSEEK_V32: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32",
    "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048, "num_hidden_layers": 4,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
CASES = [
    Case("meta-llama/Llama-3.1-8B-Instruct", engine=tp(2)),
    Case("meta-llama/Llama-3.1-8B-Instruct", engine=tp(2, runner="pooling")),
    Case("Qwen/Qwen3-32B-FP8", engine=tp(4), repack=False),
    Case("Qwen/Qwen3-30B-A3B", engine=tp(4)),
    Case("Qwen/Qwen3-30B-A3B", engine=tp(4, enable_expert_parallel=True)),
    Case("gemma-3-1b-it"),
    Case("gemma-3-1b-it", engine=tp(2), changed=GEMMA_12B),
    Case("deepseek-v2-lite", engine=tp(4)),
    Case("Qwen/Qwen3-Next-80B-A3B-Instruct", engine=tp(4), repack=False),
    Case("meta-llama/Llama-3.1-8B-Instruct", changed=LONGROPE),
    Case("meta-llama/Llama-3.1-8B-Instruct", changed=YARN),
    Case("Qwen/Qwen2.5-32B-Instruct-AWQ"),
    Case("Qwen/Qwen2.5-32B-Instruct-AWQ", engine=tp(2)),
    Case(GPTQ, changed=GPTQ_CONFIG),
    Case(GPTQ, engine=tp(2), changed=GPTQ_CONFIG),
    Case(GPTQ, "L4", engine=tp(2), changed=GPTQ_CONFIG),
    Case("", changed=MINIMAX_M2, repack=False),
    Case("", changed=MODERNBERT),
    Case("", changed=NOMIC),
    Case("deepseek-ai/DeepSeek-V3", engine=tp(4), changed=DEEPSEEK_V32, repack=False),
    Case("openai/gpt-oss-20b", "L4"),
    Case("openai/gpt-oss-120b", "L4", engine=tp(4)),
    Case("openai/gpt-oss-120b", "L40S", engine=tp(2)),
    Case("openai/gpt-oss-120b", "L40S", engine=tp(2, enable_expert_parallel=True)),
]


@pytest.fixture(scope="module")
def by_vllm() -> dict[str, int]:
    """Bytes of each case's first rank."""
    cases = [
        {
            "config": case.config,
            "capability": divmod(hardware.gpus()[case.gpu].capability, 10),
            "engine": case.engine,
            "repack": case.repack,
        }
        for case in CASES
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-m", "harness.on_meta"],
        input=json.dumps(cases), capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip([case.id for case in CASES], json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_tensors_are_those_of_vllms_own_classes(case: Case, by_vllm: dict[str, int]) -> None:
    of = metadata._model("test", case.config, None, "test")
    engine = defaults.resolve(case.engine, of.shape, hardware.gpus()[case.gpu])
    [planned] = memory.tensor_bytes(of, engine)
    if not case.repack:
        planned -= of.shape.num_hidden_layers * memory.mla_copy_bytes(of.shape, engine)
    assert isinstance(by_vllm[case.id], int), by_vllm[case.id]
    assert planned == pytest.approx(by_vllm[case.id], rel=5e-4)

"""What the planner takes a model for, by the name of its architecture, against vLLM's registry."""

from __future__ import annotations

from harness.processes import REPO
from vllm.config import ModelConfig
from vllm.model_executor.models import registry

from serve_app.planner.model import metadata, shape

GENERATE = registry._TEXT_GENERATION_MODELS.keys() | registry._MULTIMODAL_MODELS.keys()
POOL = (
    registry._EMBEDDING_MODELS.keys()
    | registry._LATE_INTERACTION_MODELS.keys()
    | registry._REWARD_MODELS.keys()
    | registry._SEQUENCE_CLASSIFICATION_MODELS.keys()
    | registry._TOKEN_CLASSIFICATION_MODELS.keys()
) - GENERATE


def is_pooling(architecture: str) -> bool:
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10}
    return shape.from_config({**sizes, "architectures": [architecture]}).pooling


def test_a_model_pools_or_generates_as_vllms_registry_has_it() -> None:
    assert len(GENERATE) > 200 and len(POOL) > 40
    assert {name for name in GENERATE if is_pooling(name)} == set()
    assert {name for name in POOL if not is_pooling(name)} == set()


def test_a_sentence_transformers_context_is_the_one_that_vllm_reads() -> None:
    folder = str(REPO / "models/all-minilm-l6-v2")
    found = metadata.load(folder).shape.max_position_embeddings
    assert found == ModelConfig(model=folder).max_model_len == 256

"""A small random Llama: real work for vLLM, so little of it that the path around it shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rich.console import Console

from serve_app.fetch.demo import fetch_demo

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def tiny_model(into: Path, console: Console) -> Path:
    """The model's folder; made on the first call, from SmolLM2's tokenizer and a fixed seed."""
    made_of = into / "shape.json"
    wanted = json.dumps(SHAPE, sort_keys=True)
    if made_of.exists() and made_of.read_text() == wanted:
        return into
    tokenizer = next(
        p for p in fetch_demo(Path("models"), console=console) if p.name.startswith("smollm2")
    )
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    ids = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(ids),
        bos_token_id=ids.bos_token_id,
        eos_token_id=ids.eos_token_id,
        pad_token_id=ids.pad_token_id,
        dtype=torch.float32,
        **SHAPE,
    )
    torch.manual_seed(0)
    shutil.rmtree(into, ignore_errors=True)
    LlamaForCausalLM(config).save_pretrained(into)
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, into / name)
    made_of.write_text(wanted)
    return into

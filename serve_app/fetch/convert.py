"""A GGUF file of a Llama model, as a folder in the Hugging Face layout.

transformers can read GGUF too, but only with `accelerate`, which nothing else here needs, and
the tokenizer that it makes forgets that this model sets digits apart: spaces before a number
become other tokens than the model was trained on. What is left to do is small: rename and
dequantise the tensors, undo one permutation, and write the tokenizer down. None of it needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type


def gguf_to_hf(gguf_file: Path, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Write the model in `gguf_file` to the new folder `folder`, in bfloat16.

    bfloat16 is what the model was published in, and is finer than any 4- or 8-bit block format.

    Args:
        gguf_file: a Llama model with SmolLM2's kind of tokenizer.
        folder: created here; gets weights, configuration, tokenizer and chat template.
        progress: called with the bytes of weights written so far, and the bytes in all.

    Raises:
        ValueError: the file is not such a model.
        OSError: the file cannot be read, or the folder not written.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    kind = [value("general.architecture"), value("tokenizer.ggml.model")]
    kind.append(value("tokenizer.ggml.pre"))
    if kind != ["llama", "gpt2", "smollm"]:
        raise ValueError(f"{gguf_file.name} is {'/'.join(kind)}, not llama/gpt2/smollm")
    heads = {
        "attn_q": value("llama.attention.head_count"),
        "attn_k": value("llama.attention.head_count_kv"),
    }
    special = {
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": value("llama.context_length"),
        "rope_theta": value("llama.rope.freq_base"),
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        **special,
    }
    folder.mkdir()
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special)
    _write_tokenizer(folder, value)
    _write_safetensors(folder / "model.safetensors", reader.tensors, heads, progress)


def _write_tokenizer(folder: Path, value: Callable[[str], Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(dict(zip(tokens, range(len(tokens)), strict=True)), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, value("tokenizer.ggml.token_type"), strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[value("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[value("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[value("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[value("tokenizer.ggml.unknown_token_id")],
        "model_max_length": value("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": value("tokenizer.chat_template"),
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_safetensors(
    path: Path, tensors: list[Any], heads: dict[str, int], progress: Callable[[int, int], None]
) -> None:
    """Write the tensors one by one, so that one at a time is in memory.

    A safetensors file is the length of a JSON header in 8 bytes, that header, and the tensors.
    """
    from gguf import GGMLQuantizationType, dequantize, quantize

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for tensor in tensors:
        end = total + 2 * int(tensor.n_elements)
        header[_hf_name(tensor.name)] = {
            "dtype": "BF16",
            "shape": [int(size) for size in reversed(tensor.shape)],  # GGUF's innermost is first
            "data_offsets": [total, end],
        }
        total = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned

    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for tensor in tensors:
            progress(file.tell() - start, total)
            weights = dequantize(tensor.data, tensor.tensor_type)
            part = tensor.name.split(".")[-2]
            if part in heads:
                # GGUF has the two halves of each rotary head interleaved.
                rows, columns = weights.shape
                weights = weights.reshape(heads[part], -1, 2, columns)
                weights = weights.swapaxes(1, 2).reshape(rows, columns)
            file.write(quantize(weights, GGMLQuantizationType.BF16).tobytes())


def _hf_name(name: str) -> str:
    """`blk.7.attn_q.weight` is `model.layers.7.self_attn.q_proj.weight`."""
    *block, part, kind = name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{_TENSORS[part]}.{kind}"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")

"""The model of the GPU benchmarks: the shape of Llama-3.1-8B as a folder without weights.

Imports nothing but the standard library, so that a peer's environment can use it; writing the tokenizer takes
`tokenizers` and `transformers`, which every engine brings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
"""Its config.json. Weights are drawn at random by each engine (`load_format` dummy)."""


def save_shape(folder: Path, config: Mapping[str, Any] = SHAPE) -> Path:
    """Write config.json and a tokenizer of the whole vocabulary to `folder`, if it has none; returns the folder.

    The tokenizer turns bytes into tokens one by one, and every other id into a text of its own: ids that a random
    model draws can be turned into text by any engine, at the usual cost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        _save_tokenizer(folder, int(config["vocab_size"]))
        (folder / "config.json").write_text(json.dumps(dict(config), indent=1), encoding="utf-8")
    return folder


def _save_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{number}" for number in range(vocab_size - len(symbols))]
    vocab = {symbol: number for number, symbol in enumerate([*symbols, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

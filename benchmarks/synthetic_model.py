"""A model of about 100 million parameters with random weights, as a checkpoint folder, made where it is needed."""

from __future__ import annotations

from pathlib import Path

import torch

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
"""Llama's shape at 100,092,672 parameters. The weights are drawn wide enough that generated tokens vary: with the usual
0.02 a random model repeats its last token, and two engines would agree without having attended to anything."""


def save_checkpoint(folder: Path, seed: int = 0) -> int:
    """Write config, float32 weights and a tokenizer to `folder`; returns the number of parameters."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _save_tokenizer(folder: Path) -> None:
    """One token per byte: a served model has a tokenizer, though prompts here are token ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

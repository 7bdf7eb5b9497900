"""Byte-level BPE ("gpt2"): Llama 3, Qwen, SmolLM2, Mistral's Tekken."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers

from cluster.text.gguf.splits import SPLITS, Split
from cluster.text.gguf.vocabulary import Vocabulary


def split_of(vocabulary: Vocabulary) -> Split:
    """How it splits a text.

    Raises:
        CheckpointError: in a way that is not known; names it.
    """
    split = SPLITS.get(vocabulary.split or "")
    if split is None:
        raise vocabulary.error("pre", f"{vocabulary.split!r} is not supported, only {', '.join(SPLITS)}")
    return split


def byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer, without special tokens.

    Raises:
        CheckpointError: the merges are missing, or the split is not known.
    """
    split = split_of(vocabulary)
    if not vocabulary.merges:
        raise vocabulary.error("merges", "is missing")
    vocab = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(vocabulary.merges), ignore_merges=split.whole_words))
    if split.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

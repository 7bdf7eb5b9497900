"""SentencePiece's BPE ("llama"): Llama 2, Mistral, Gemma. Files have scores of the pieces and no merges."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer, decoders, models, normalizers

from cluster.text.gguf.vocabulary import TokenType, Vocabulary

_SPACE = "▁"
_MERGED_BY_ID = ("gemma", "gemma2", "gemma3")
"""Architectures whose scores are not in the order in which pieces are merged, but whose ids are."""
_MERGED = (TokenType.NORMAL, TokenType.USER_DEFINED)


def adds_space(vocabulary: Vocabulary) -> bool:
    """Whether a space is put before a text."""
    return vocabulary.flags.get("add_space_prefix", True)


def sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer, without special tokens.

    Raises:
        CheckpointError: there are no scores.
    """
    if not vocabulary.scores:
        raise vocabulary.error("scores", "is missing")
    vocab = {_spelled(token): token_id for token_id, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.special.get("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocabulary, vocab),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in vocabulary.types,
        )
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_space(vocabulary):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def is_spaces(token: str) -> bool:
    """Whether a token is several spaces, which files spell as they are and merges with the sign for a space."""
    return len(token) > 1 and not token.strip(" ")


def _spelled(token: str) -> str:
    return _SPACE * len(token) if is_spaces(token) else token


def _merges(vocabulary: Vocabulary, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way in which two pieces make a third one, those of the piece that is merged first before all others."""
    by_id = vocabulary.architecture in _MERGED_BY_ID

    def order(piece: str) -> tuple[float, int]:
        token_id = vocab[piece]
        return (0.0 if by_id else -vocabulary.scores[token_id], token_id)

    merged = [piece for piece in vocab if len(piece) > 1 and vocabulary.types[vocab[piece]] in _MERGED]
    return [
        (piece[:i], piece[i:])
        for piece in sorted(merged, key=order)
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]

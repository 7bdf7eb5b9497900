"""What a request adds to the logits and which tokens it rules out, on the device."""

from __future__ import annotations

import torch

from workers.sampling.ops.choice_rows import ChoiceRows
from workers.sampling.ops.row_params import RowParams

WORD_BITS = 32


def num_words(vocab_size: int) -> int:
    """The 32-bit words of a mask with a bit for each token."""
    return -(-vocab_size // WORD_BITS)


def restrict(scores: torch.Tensor, rows: ChoiceRows, params: RowParams) -> torch.Tensor:
    """Add the biases, then give every token that a mask rules out the score minus infinity.

    Args:
        scores: float32 (N, V).
        rows: with their biases and masks.
        params: the words of `rows`.
    """
    if rows.bias is not None and len(biased := (params.bias_slot >= 0).nonzero().squeeze(1)):
        scores = scores.index_add(0, biased, rows.bias[params.bias_slot[biased].long()])
    if rows.masks is not None and len(masked := (params.masked != 0).nonzero().squeeze(1)):
        allowed = unpack_bits(rows.masks[masked], scores.shape[1])
        scores = scores.index_copy(0, masked, scores[masked].masked_fill(~allowed, float("-inf")))
    return scores


def unpack_bits(masks: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """bool (n, V) of int32 (n, ⌈V / 32⌉): bit i % 32 of word i // 32 is token i."""
    bits = torch.arange(WORD_BITS, dtype=torch.int32, device=masks.device)
    return ((masks.unsqueeze(-1) >> bits) & 1).flatten(1)[:, :vocab_size] != 0

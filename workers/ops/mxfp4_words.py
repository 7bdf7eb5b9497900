"""MXFP4 in the order in which the kernels read it: words of four numbers, blocks of inputs outermost.

A word has number j of each quarter of a block: 8 words make a block of 32. The bits of three of its numbers are where
one shift and one mask make a bfloat16 of them, which is wrong by a factor of 2^126 that goes with the scale: sign,
exponent and mantissa are those of bfloat16 in bit 15 and bits 8 to 6, whose other bits of the exponent are zero. What
is left of the word has the fourth, which takes three shifts. A kernel's two neighbouring words are two neighbours of
each quarter, as the matrix instruction has them in a register.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from workers.loading.dequantize import MXFP4_BLOCK, dequantize_mxfp4

QUARTERS = 4
"""Numbers of a word."""
BLOCK_WORDS = MXFP4_BLOCK // QUARTERS
LARGEST_SCALE = 128
"""Stored, which means 2: what the kernels' factor of 2^126 still leaves to bfloat16."""


def to_words(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks of a checkpoint as words.

    Args:
        blocks: (E, M, G, 16) uint8: of G blocks of 32 inputs, two numbers a byte, the lower four bits first.

    Returns:
        (E, G, M, 8) int16, contiguous: word j of a block has the numbers j, 8 + j, 16 + j and 24 + j.

    Raises:
        ValueError: blocks of another kind.
    """
    if blocks.dtype != torch.uint8 or blocks.dim() != 4 or 2 * blocks.shape[-1] != MXFP4_BLOCK:
        raise ValueError(f"MXFP4 blocks of {blocks.dtype} {tuple(blocks.shape)}: needs uint8 (E, M, G, 16)")
    num_experts, num_outputs, num_blocks, _ = blocks.shape
    words = torch.empty(num_experts, num_blocks, num_outputs, BLOCK_WORDS, dtype=torch.int16, device=blocks.device)
    for place, expert in zip(words, blocks, strict=True):  # one at a time: what is needed beside them is small
        place.copy_(_packed(expert).transpose(0, 1))
    return words


def to_exponents(scales: torch.Tensor) -> torch.Tensor:
    """Scales of a checkpoint as the kernels read them: of four blocks in a word, the first in its lowest byte.

    Args:
        scales: (E, M, G) uint8, at most `LARGEST_SCALE`.

    Returns:
        (E, ceil(G / 4), M) int32, contiguous. A byte is the exponent, as bfloat16 has it, of 2^126 times the scale.
    """
    fours = F.pad(scales, (0, -scales.shape[-1] % 4)) + 126
    return fours.view(torch.int32).transpose(1, 2).contiguous()


def from_exponents(exponents: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The opposite of `to_exponents`, of one expert: (ceil(G / 4), M) to (M, G)."""
    return exponents.t().contiguous().view(torch.uint8)[:, :num_blocks] - 126


def from_words(words: torch.Tensor) -> torch.Tensor:
    """The opposite of `to_words`, of one expert: (G, M, 8) to (M, G, 16)."""
    word = words.int()
    first = (word >> 12 & 8) | (word >> 6 & 7)
    second = (word >> 9 & 8) | (word >> 3 & 7)
    third = (word >> 6 & 8) | (word & 7)
    fourth = (word >> 8 & 8) | (word >> 12 & 6) | (word >> 10 & 1)
    numbers = torch.stack([first, second, third, fourth], dim=-2).flatten(-2)  # (G, M, 32)
    pairs = numbers.unflatten(-1, (MXFP4_BLOCK // 2, 2))
    blocks: torch.Tensor = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    return blocks.transpose(0, 1).contiguous()


def dequantized_words(words: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One expert's numbers, (M, K), in plain torch.

    Args:
        words: (G, M, 8) int16.
        exponents: (ceil(G / 4), M) int32.
        dtype: of the result.
    """
    return dequantize_mxfp4(from_words(words), from_exponents(exponents, words.shape[0]), dtype)


def _packed(blocks: torch.Tensor) -> torch.Tensor:
    """(M, G, 16) bytes as (M, G, 8) words."""
    numbers: torch.Tensor = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).int()
    quarters = numbers.unflatten(-1, (QUARTERS, BLOCK_WORDS))
    first, second, third, fourth = quarters.unbind(-2)
    word: torch.Tensor = (first & 8) << 12 | (first & 7) << 6
    word |= (second & 8) << 9 | (second & 7) << 3
    word |= (third & 8) << 6 | (third & 7)
    word |= (fourth & 8) << 8 | (fourth & 6) << 12 | (fourth & 1) << 10
    return word.to(torch.int16)

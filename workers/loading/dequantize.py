"""Quantised weights of checkpoints as numbers again, on any device. Arithmetic is float32, rounded once."""

from __future__ import annotations

import functools

import torch

MXFP4_BLOCK = 32
"""Numbers that share a scale (OCP Microscaling Formats specification 1.0, section 5)."""

FP8_BLOCK = (128, 128)
"""Rows and columns that share a scale in DeepSeek-V3's checkpoints."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the three lower bits of an FP4 number mean; the fourth is its sign."""


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """FP4 numbers (E2M1) with a power of two (E8M0) for each 32 of them, as gpt-oss's checkpoints hold them.

    Args:
        blocks: (..., G, 16) uint8: two numbers a byte, the lower four bits first.
        scales: (..., G) uint8: 2 ** (scale - 127); 255 is NaN.
        dtype: of the result. bfloat16 and float32 hold every such number that is not subnormal there exactly.

    Returns:
        (..., 32 * G).

    Raises:
        ValueError: blocks and scales that do not fit each other.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"MXFP4 blocks of {blocks.dtype} and scales of {scales.dtype}: needs uint8")
    if blocks.dim() < 2 or blocks.shape[-1] * 2 != MXFP4_BLOCK or blocks.shape[:-1] != scales.shape:
        raise ValueError(f"MXFP4 blocks of shape {tuple(blocks.shape)} with scales of {tuple(scales.shape)}")
    numbers = _byte_pairs(blocks.device).index_select(0, blocks.reshape(-1).int())
    factors = scales.contiguous().view(torch.float8_e8m0fnu).float()
    scaled = numbers.view(*scales.shape, MXFP4_BLOCK).mul_(factors[..., None])
    return scaled.flatten(-2).to(dtype)


def dequantize_fp8_blocks(
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    dtype: torch.dtype,
    block: tuple[int, int] = FP8_BLOCK,
    first: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """FP8 numbers times the scale of their block: `weight_scale_inv` of DeepSeek-V3's checkpoints.

    Args:
        weight: (M, K) float8_e4m3fn, or a part of such a matrix.
        scale_inv: of every block that the part touches, floating or as powers of two (float8_e8m0fnu).
        dtype: of the result.
        block: rows and columns that share a scale; those at the end may be cut off.
        first: where the part's first row and column are in their block.

    Returns:
        (M, K).

    Raises:
        ValueError: a weight that is no matrix of FP8, or scales of another number of blocks.
    """
    if weight.dim() != 2 or weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"a weight of {weight.dtype} {tuple(weight.shape)}: needs a matrix of float8_e4m3fn")
    spans = [(begin, begin + size) for begin, size in zip(first, weight.shape, strict=True)]
    needed = tuple(-(-end // size) - begin // size for (begin, end), size in zip(spans, block, strict=True))
    if scale_inv.shape != needed:
        raise ValueError(f"scales of shape {tuple(scale_inv.shape)} for {needed} blocks of {block} in {spans}")
    scales = scale_inv.float()
    for dimension, ((begin, end), size) in enumerate(zip(spans, block, strict=True)):
        index = torch.arange(begin, end, device=weight.device) // size - begin // size
        scales = scales.index_select(dimension, index)
    return weight.float().mul_(scales).to(dtype)


@functools.cache
def _byte_pairs(device: torch.device) -> torch.Tensor:
    """(256, 2) float32: the two numbers that each byte holds."""
    numbers = torch.tensor([*_E2M1, *(-number for number in _E2M1)])
    pairs = torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], dim=-1)
    return pairs.to(device)

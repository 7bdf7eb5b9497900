"""MXFP4 that stays packed, as the numbers that it means."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from workers.loading.dequantize import MXFP4_BLOCK, dequantize_mxfp4


@dataclass(frozen=True)
class Mxfp4Numbers:
    """Numbers that are made when they are asked for, some at a time: a `weight_digest.LazyNumbers`.

    Attributes:
        blocks: (..., G, 16) uint8, contiguous.
        scales: (..., G) uint8, contiguous.
        dtype: what they are made in.
    """

    blocks: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., 32 * G)."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * MXFP4_BLOCK)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.blocks.device

    @property
    def nbytes(self) -> int:
        """Of the numbers, were they all made."""
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, begin: int, end: int) -> torch.Tensor:
        """Numbers `begin` to `end`, in row-major order; both multiples of 32."""
        own = slice(begin // MXFP4_BLOCK, end // MXFP4_BLOCK)
        blocks = self.blocks.reshape(-1, MXFP4_BLOCK // 2)[own]
        return dequantize_mxfp4(blocks, self.scales.reshape(-1)[own], self.dtype)

"""How checkpoints store quantised weights: which parts of two tensors make a part of the numbers that they mean.

Regions and shapes of what is meant are *logical*; a storage says what has to be read for them, and turns it into
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from workers.loading.checkpoint import Region
from workers.loading.dequantize import FP8_BLOCK, MXFP4_BLOCK, dequantize_fp8_blocks, dequantize_mxfp4


class QuantizedStorage(Protocol):
    """Numbers as values of few bits and scales that several of them share."""

    @property
    def value_dtypes(self) -> Mapping[str, torch.dtype]:
        """What the values' tensor may be stored as, by safetensors' names."""

    @property
    def scale_dtypes(self) -> Mapping[str, torch.dtype]:
        """What the scales' tensor may be stored as."""

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the values' tensor of a logical one."""

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the scales' tensor."""

    def values_region(self, region: Region) -> Region:
        """What of the values a logical region needs."""

    def scales_region(self, region: Region) -> Region:
        """What of the scales."""

    def dequantize(
        self, values: torch.Tensor, scales: torch.Tensor, region: Region, dtype: torch.dtype
    ) -> torch.Tensor:
        """A logical region, of the shape of the region, out of what was read for it."""


@dataclass(frozen=True)
class Mxfp4Storage:
    """gpt-oss's `*_blocks`, (..., G, 16), and `*_scales`, (..., G), for (..., 32 * G) numbers."""

    @property
    def value_dtypes(self) -> Mapping[str, torch.dtype]:
        """Bytes."""
        return {"U8": torch.uint8}

    @property
    def scale_dtypes(self) -> Mapping[str, torch.dtype]:
        """Bytes."""
        return {"U8": torch.uint8}

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(..., K) to (..., K / 32, 16).

        Raises:
            ValueError: 32 does not divide K.
        """
        return (*self.scales_shape(shape), MXFP4_BLOCK // 2)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(..., K) to (..., K / 32)."""
        if shape[-1] % MXFP4_BLOCK:
            raise ValueError(f"MXFP4 stores multiples of {MXFP4_BLOCK} inputs, not {shape[-1]}")
        return (*shape[:-1], shape[-1] // MXFP4_BLOCK)

    def values_region(self, region: Region) -> Region:
        """Whole blocks."""
        return (*self.scales_region(region), (0, MXFP4_BLOCK // 2))

    def scales_region(self, region: Region) -> Region:
        """Of every block that is touched."""
        return (*region[:-1], _blocks(region[-1], MXFP4_BLOCK))

    def dequantize(
        self, values: torch.Tensor, scales: torch.Tensor, region: Region, dtype: torch.dtype
    ) -> torch.Tensor:
        """Of the whole blocks, cut to the region."""
        begin, end = region[-1]
        skipped = begin % MXFP4_BLOCK
        return dequantize_mxfp4(values, scales, dtype)[..., skipped : skipped + end - begin]


@dataclass(frozen=True)
class Fp8BlockStorage:
    """A matrix of FP8 and its `weight_scale_inv` (DeepSeek-V3, Qwen3's FP8 checkpoints).

    Attributes:
        block: rows and columns that share a scale (`weight_block_size`).
    """

    block: tuple[int, int] = FP8_BLOCK

    @property
    def value_dtypes(self) -> Mapping[str, torch.dtype]:
        """One format."""
        return {"F8_E4M3": torch.float8_e4m3fn}

    @property
    def scale_dtypes(self) -> Mapping[str, torch.dtype]:
        """Floats, or powers of two."""
        return {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu}

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The logical one.

        Raises:
            ValueError: it is no matrix.
        """
        if len(shape) != 2:
            raise ValueError(f"FP8 in blocks stores matrices, not {shape}")
        return shape

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """One for each block, those that the edge cuts off too."""
        return tuple(-(-size // block) for size, block in zip(shape, self.block, strict=True))

    def values_region(self, region: Region) -> Region:
        """The logical one."""
        return region

    def scales_region(self, region: Region) -> Region:
        """Of every block that is touched."""
        return tuple(_blocks(bounds, block) for bounds, block in zip(region, self.block, strict=True))

    def dequantize(
        self, values: torch.Tensor, scales: torch.Tensor, region: Region, dtype: torch.dtype
    ) -> torch.Tensor:
        """The values times their blocks' scales."""
        first_row, first_column = (begin % block for (begin, _), block in zip(region, self.block, strict=True))
        return dequantize_fp8_blocks(values, scales, dtype, self.block, (first_row, first_column))


def _blocks(bounds: tuple[int, int], size: int) -> tuple[int, int]:
    begin, end = bounds
    return begin // size, -(-end // size)

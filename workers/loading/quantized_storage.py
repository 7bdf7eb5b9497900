"""How checkpoints store quantised weights: which parts of two tensors make a part of the numbers that they mean.

Regions and shapes of what is meant are *logical*; a storage says what has to be read for them, and turns it into
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from workers.loading.dequantize import FP8_BLOCK, MXFP4_BLOCK, dequantize_fp8_blocks, dequantize_mxfp4
from workers.loading.stored_tensor import Region


class QuantizedStorage(Protocol):
    """Numbers as values of few bits, and scales that several of them share.

    Scales are a tensor of their own, or they are among the values: then there are no `scale_dtypes`, and no shape and
    region of theirs is asked for.
    """

    @property
    def on_host(self) -> bool:
        """Whether `dequantize` works on the CPU alone."""

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
        self, values: torch.Tensor, scales: torch.Tensor | None, region: Region, dtype: torch.dtype
    ) -> torch.Tensor:
        """A logical region, of the shape of the region, out of what was read for it; in memory of its own."""


@dataclass(frozen=True)
class Mxfp4Storage:
    """gpt-oss's `*_blocks`, (..., G, 16), and `*_scales`, (..., G), for (..., 32 * G) numbers."""

    on_host: ClassVar[bool] = False

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
        return (*region[:-1], blocks_of(region[-1], MXFP4_BLOCK))

    def dequantize(
        self, values: torch.Tensor, scales: torch.Tensor | None, region: Region, dtype: torch.dtype
    ) -> torch.Tensor:
        """Of the whole blocks, cut to the region."""
        assert scales is not None
        begin, end = region[-1]
        skipped = begin % MXFP4_BLOCK
        return dequantize_mxfp4(values, scales, dtype)[..., skipped : skipped + end - begin]


@dataclass(frozen=True)
class Fp8BlockStorage:
    """A matrix of FP8 and its `weight_scale_inv` (DeepSeek-V3, Qwen3's FP8 checkpoints).

    Attributes:
        block: rows and columns that share a scale (`weight_block_size`).
    """

    on_host: ClassVar[bool] = False
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
        return tuple(blocks_of(bounds, block) for bounds, block in zip(region, self.block, strict=True))

    def dequantize(
        self, values: torch.Tensor, scales: torch.Tensor | None, region: Region, dtype: torch.dtype
    ) -> torch.Tensor:
        """The values times their blocks' scales."""
        assert scales is not None
        first_row, first_column = (begin % block for (begin, _), block in zip(region, self.block, strict=True))
        return dequantize_fp8_blocks(values, scales, dtype, self.block, (first_row, first_column))


def blocks_of(bounds: tuple[int, int], size: int) -> tuple[int, int]:
    """The first block of `size` that the bounds touch, and one past the last."""
    begin, end = bounds
    return begin // size, -(-end // size)

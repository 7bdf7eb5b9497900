"""How GGUF stores numbers, beside plain floats: in blocks with scales of their own, and norms with 1 added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from workers.loading.pieces import FLOATS
from workers.loading.quantized_storage import blocks_of
from workers.loading.stored_tensor import Region


def is_block_format(name: str) -> bool:
    """Whether tensors of a type, such as "Q4_1", are blocks of numbers that share a scale."""
    kind = GGMLQuantizationType.__members__.get(name)
    return kind is not None and GGML_QUANT_SIZES[kind][0] > 1


def is_dequantized(name: str) -> bool:
    """Whether numbers can be made of blocks of a format, by its name such as "Q4_1"."""
    kind = GGMLQuantizationType[name]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class _OwnScales:
    """Values that no other tensor scales; numbers are made on the CPU, by numpy."""

    on_host: ClassVar[bool] = True
    scale_dtypes: ClassVar[Mapping[str, torch.dtype]] = {}

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """None are stored."""
        raise NotImplementedError

    def scales_region(self, region: Region) -> Region:
        """None are stored."""
        raise NotImplementedError


@dataclass(frozen=True)
class GgufBlocks(_OwnScales):
    """Rows of blocks: some numbers that follow each other in a row, and what scales them.

    Attributes:
        name: of the format, such as "Q4_1".
    """

    name: str

    @property
    def value_dtypes(self) -> Mapping[str, torch.dtype]:
        """Bytes."""
        return {self.name: torch.uint8}

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(..., K) to the bytes of a row's blocks."""
        block, size = self._sizes
        return (*shape[:-1], shape[-1] // block * size)

    def values_region(self, region: Region) -> Region:
        """Of every block that is touched."""
        block, size = self._sizes
        begin, end = blocks_of(region[-1], block)
        return (*region[:-1], (begin * size, end * size))

    def dequantize(
        self, values: torch.Tensor, scales: torch.Tensor | None, region: Region, dtype: torch.dtype
    ) -> torch.Tensor:
        """Of the whole blocks, cut to the region. Arithmetic is float32, rounded once."""
        begin, end = region[-1]
        skipped = begin % self._sizes[0]
        numbers = torch.from_numpy(dequantize(values.numpy(), GGMLQuantizationType[self.name]))
        return numbers[..., skipped : skipped + end - begin].to(dtype)

    @property
    def _sizes(self) -> tuple[int, int]:
        """Of a block the numbers, and the bytes."""
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.name]]


@dataclass(frozen=True)
class OneAdded(_OwnScales):
    """Floats, one more than what is meant: the weights of Gemma's norms."""

    value_dtypes: ClassVar[Mapping[str, torch.dtype]] = FLOATS

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same."""
        return shape

    def values_region(self, region: Region) -> Region:
        """The same."""
        return region

    def dequantize(
        self, values: torch.Tensor, scales: torch.Tensor | None, region: Region, dtype: torch.dtype
    ) -> torch.Tensor:
        """Subtracted in float32, rounded once."""
        return values.float().sub(1.0).to(dtype)

"""What is read of each tensor of a checkpoint, where it goes, and the pieces that it is read in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from workers.loading.quantized_storage import QuantizedStorage
from workers.loading.runs import Runs, as_one_run, cut, region_shape
from workers.loading.stored_tensor import Region, StoredTensor, whole

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that weights may be stored in, as safetensors writes them."""

BYTES = {"U8": torch.uint8}
"""What is kept as it is stored."""

_PLAIN = {**FLOATS, **BYTES}


@dataclass(frozen=True)
class Quantized:
    """What makes a placement's stored tensor quantised.

    Attributes:
        storage: how its values and scales belong together.
        scales: the tensor of scales; None: they are among the values.
    """

    storage: QuantizedStorage
    scales: StoredTensor | None = None


@dataclass(frozen=True)
class Placement:
    """A stored tensor, of a dtype in `FLOATS`, in `BYTES` or quantised, and where its numbers go.

    Attributes:
        stored: the tensor.
        target: of the region's shape. A view with any strides may stand for another arrangement in the parameter:
            transposed, de-interleaved, or split. Or contiguous, of that shape with more dimensions before it: then what
            is read is repeated.
        region: what is read, as part of `view`; None: all.
        view: a shape that the numbers are seen as, in row-major order; None: as they are stored.
        quantized: of a quantised tensor, which is dequantised piece by piece.
    """

    stored: StoredTensor
    target: torch.Tensor
    region: Region | None = None
    view: tuple[int, ...] | None = None
    quantized: Quantized | None = None

    @property
    def viewed(self) -> tuple[int, ...]:
        """The shape that `region` is a part of."""
        return self.stored.shape if self.view is None else self.view

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is read."""
        return region_shape(self.region or whole(self.viewed))

    @property
    def nbytes(self) -> int:
        """How much is read, without scales."""
        return self.values(self.region or whole(self.viewed)).nbytes

    def values(self, region: Region) -> Runs:
        """The bytes of the numbers in a region."""
        if self.quantized is None:
            return Runs(self.stored, self.viewed, region, _PLAIN[self.stored.dtype].itemsize)
        storage = self.quantized.storage
        shape, region = storage.values_shape(self.viewed), storage.values_region(region)
        return Runs(self.stored, shape, region, storage.value_dtypes[self.stored.dtype].itemsize)


@dataclass(frozen=True)
class Piece:
    """What is read at a time: some numbers as they are, or some values and their scales."""

    region: Region
    target: torch.Tensor
    values: Runs
    dtype: torch.dtype
    storage: QuantizedStorage | None = None
    scales: Runs | None = None
    scale_dtype: torch.dtype | None = None

    @property
    def scales_begin(self) -> int:
        """Where in a buffer the scales are put: aligned for any dtype."""
        return -(-self.values.nbytes // 16) * 16

    @property
    def buffer_bytes(self) -> int:
        """Of all that is read."""
        return self.values.nbytes if self.scales is None else self.scales_begin + self.scales.nbytes


def pieces_of(placement: Placement, piece_bytes: int) -> Iterator[Piece]:
    """What is read of a tensor, cut into elements where all of them follow each other here and there, else into rows.

    What is repeated stays whole.

    Raises:
        ValueError: a target of another shape than what is read.
    """
    target, shape = placement.target, placement.shape
    if target.shape[-len(shape) :] != shape:
        raise ValueError(f"{shape} of tensor {placement.stored.name} for a target of shape {tuple(target.shape)}")
    if not placement.nbytes:
        return
    region = placement.region or whole(placement.viewed)
    if target.shape != shape:
        yield _piece(placement, region, target)
        return
    flat = as_one_run(placement.viewed, region) if placement.quantized is None and target.is_contiguous() else None
    if flat is not None:
        stored = placement.stored
        region, target = flat, target.view(-1)
        placement = Placement(stored, target, flat, (math.prod(stored.shape),))
    num_dimensions = 1 if flat is not None else len(region) - 1  # rows are not cut
    for part in cut(region, piece_bytes, num_dimensions, lambda part: placement.values(part).nbytes):
        bounds = zip(part, region, strict=True)
        yield _piece(
            placement, part, target[tuple(slice(begin - first, end - first) for (begin, end), (first, _) in bounds)]
        )


def _piece(placement: Placement, region: Region, target: torch.Tensor) -> Piece:
    values, quantized = placement.values(region), placement.quantized
    if quantized is None:
        return Piece(region, target, values, _PLAIN[placement.stored.dtype])
    storage, scales = quantized.storage, quantized.scales
    piece = Piece(region, target, values, storage.value_dtypes[placement.stored.dtype], storage)
    if scales is None:
        return piece
    dtype = storage.scale_dtypes[scales.dtype]
    runs = Runs(scales, storage.scales_shape(placement.viewed), storage.scales_region(region), dtype.itemsize)
    return replace(piece, scales=runs, scale_dtype=dtype)

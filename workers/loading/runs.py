"""A part of a tensor in a file: cut into pieces, and as the runs of bytes that it consists of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from workers.loading.stored_tensor import Region, StoredTensor


def region_shape(region: Region) -> tuple[int, ...]:
    """Of what the region holds."""
    return tuple(end - begin for begin, end in region)


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of each dimension how many elements lie from one index to the next."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def as_one_run(shape: tuple[int, ...], region: Region) -> Region | None:
    """A region whose elements follow each other in the tensor, as a region of it flattened; None: they do not."""
    lengths = region_shape(region)
    first = next((i for i, length in enumerate(lengths) if length != 1), len(shape))
    if lengths[first + 1 :] != shape[first + 1 :]:
        return None
    begin = sum(begin * stride for (begin, _), stride in zip(region, row_major_strides(shape), strict=True))
    return ((begin, begin + math.prod(lengths)),)


def cut(region: Region, most_bytes: int, num_dimensions: int, nbytes: Callable[[Region], int]) -> Iterator[Region]:
    """The region in pieces of at most so many bytes, or as few as cutting its first dimensions allows.

    Args:
        region: what is cut.
        most_bytes: of a piece.
        num_dimensions: those that may be cut, the first first.
        nbytes: of a region.
    """
    longest = next((i for i in range(num_dimensions) if region[i][1] - region[i][0] > 1), None)
    if longest is None or nbytes(region) <= most_bytes:
        yield region
        return
    begin, end = region[longest]
    unit = nbytes((*region[:longest], (begin, begin + 1), *region[longest + 1 :]))
    step = max(1, most_bytes // unit)
    for first in range(begin, end, step):
        piece = (*region[:longest], (first, min(first + step, end)), *region[longest + 1 :])
        yield from cut(piece, most_bytes, num_dimensions, nbytes)


@dataclass(frozen=True)
class Runs:
    """The bytes of a region, in row-major order.

    Attributes:
        stored: the tensor.
        shape: what its elements are seen as, in row-major order.
        region: the part of that.
        itemsize: bytes of an element.
    """

    stored: StoredTensor
    shape: tuple[int, ...]
    region: Region
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Of all runs."""
        return math.prod(region_shape(self.region)) * self.itemsize

    @property
    def run_bytes(self) -> int:
        """Of each run."""
        return math.prod(region_shape(self.region)[self._depth :]) * self.itemsize

    def offsets(self) -> Iterator[int]:
        """Where in the file each run begins."""
        strides = [stride * self.itemsize for stride in row_major_strides(self.shape)]
        depth, start = self._depth, self.stored.offset
        steps = [
            range(begin * stride, end * stride, stride)
            for (begin, end), stride in zip(self.region, strides, strict=True)
        ]
        start += sum(step.start for step in steps[depth:])
        if depth == 0:
            yield start
            return
        inner = steps[depth - 1]
        for places in itertools.product(*steps[: depth - 1]):
            first = start + sum(places)
            yield from range(first + inner.start, first + inner.stop, inner.step)

    @property
    def _depth(self) -> int:
        """The dimension from which on elements follow each other: the last that is not whole."""
        partial = (i for i in reversed(range(len(self.shape))) if self.region[i] != (0, self.shape[i]))
        return next(partial, 0)

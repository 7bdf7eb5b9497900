"""A place that a checkpoint's tensor fills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from workers.loading.quantized_storage import QuantizedStorage
from workers.loading.stored_tensor import Region


@dataclass(frozen=True)
class QuantizedSource:
    """What a checkpoint holds beside a quantised tensor.

    Attributes:
        storage: how values and scales belong together.
        scales: the name of the scales' tensor; None: they are among the values.
        scales_shape: what the checkpoint must hold of that name.
    """

    storage: QuantizedStorage
    scales: str | None = None
    scales_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class WeightTarget:
    """A checkpoint tensor's place.

    Attributes:
        parameter: the model's parameter.
        shape: what the checkpoint must hold.
        region: the part of that which this rank holds, as `view` sees it; may be empty.
        begin: first row of the parameter that it fills.
        end: one past the last; a tensor of fewer dimensions than the parameter is repeated in each row.
        index: of the parameter's leading dimensions, such as an expert; rows are those of the dimension behind.
        view: a shape that the tensor's numbers are seen as, in row-major order; None: `shape`. Of a quantised tensor it
            is the shape of its numbers.
        arrange: from those rows of the parameter to a view of them that has the region's shape, where the checkpoint
            holds its numbers in another order (transposed, interleaved); None: they are in the parameter's.
        quantized: None: the tensor holds its numbers themselves.
        raw: whether it holds bytes, which are kept as they are.
    """

    parameter: str
    shape: tuple[int, ...]
    region: Region
    begin: int
    end: int
    index: tuple[int, ...] = ()
    view: tuple[int, ...] | None = None
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None
    quantized: QuantizedSource | None = None
    raw: bool = False

    @property
    def viewed(self) -> tuple[int, ...]:
        """The shape that `region` is a part of."""
        return self.shape if self.view is None else self.view

    def place(self, parameter: torch.Tensor) -> torch.Tensor:
        """The part of the parameter that it fills, as a view of the region's shape (or to be repeated)."""
        rows = parameter[self.index][self.begin : self.end]
        return rows if self.arrange is None else self.arrange(rows)


def of_layer(target: WeightTarget, checkpoint_prefix: str, parameter_prefix: str) -> WeightTarget:
    """A target whose names are within a layer, as one of the whole model."""
    quantized = target.quantized
    if quantized is not None and quantized.scales is not None:
        quantized = replace(quantized, scales=checkpoint_prefix + quantized.scales)
    return replace(target, parameter=parameter_prefix + target.parameter, quantized=quantized)

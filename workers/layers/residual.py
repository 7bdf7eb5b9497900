"""The residual stream of a forward pass, and the two operations on it that are fused with their neighbours.

A layer owns its residual structure: it normalises the stream and adds to it as its family does. Where an addition comes
right before a norm the two are one kernel; where it comes right behind a product, of one rank, the product adds before
it rounds. What is added may be a sum over experts that the same kernel computes.
"""

from __future__ import annotations

from typing import Protocol

import torch

from workers.layers.linear import RowParallelLinear
from workers.ops.weighted_sum import WeightedRows, summed


class Norm(Protocol):
    """A normalisation over the last dimension."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H) to (T, H)."""
        ...

    def add(self, x: torch.Tensor | WeightedRows, residual: torch.Tensor) -> torch.Tensor:
        """`residual += summed(x)`, in place, and that normalised."""
        ...


class ResidualStream:
    """(T, H), of which the last summand may still be waiting for the norm that it is added with.

    Args:
        value: (T, H), contiguous; owned by the stream, which changes it in place.
    """

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value
        self._summand: torch.Tensor | WeightedRows | None = None

    @property
    def value(self) -> torch.Tensor:
        """(T, H), with all that was added."""
        if self._summand is not None:
            self._value.add_(summed(self._summand))
            self._summand = None
        return self._value

    def add(self, summand: torch.Tensor | WeightedRows) -> None:
        """Add (T, H), the same on all ranks."""
        self._value, self._summand = self.value, summand

    def add_product(self, projection: RowParallelLinear, x: torch.Tensor, scale: float = 1.0) -> None:
        """Add `scale` times the product of (T, K), this rank's share of the features, with a projection."""
        if scale != 1.0:
            self.value.add_(projection(x), alpha=scale)
        elif projection.group.size > 1:
            self.add(projection(x))
        elif (summands := projection.summands(x)) is not None:
            self.add(summands)
        else:
            self._value = projection.add_to(self.value, x)

    def add_products(self, *factors: tuple[RowParallelLinear, torch.Tensor]) -> None:
        """Add several products, of a parallel block (GPT-J): several ranks sum all of them in one collective."""
        group = factors[0][0].group
        if group.size == 1:
            for projection, x in factors:
                self.add_product(projection, x)
            return
        first, *others = (projection.partial(x) for projection, x in factors)
        for other in others:
            first.add_(other)
        self.add(group.all_reduce(first))

    def normalized(self, norm: Norm) -> torch.Tensor:
        """(T, H), the stream behind a norm."""
        if self._summand is None:
            return norm(self._value)
        summand, self._summand = self._summand, None
        return norm.add(summand, self._value)

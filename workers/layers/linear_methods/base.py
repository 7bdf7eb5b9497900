"""What a linear method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import nn

from workers.ops.weighted_sum import WeightedRows


class Projection(Protocol):
    """The module that a method works for: it holds the parameters, the method what is done with them.

    Attributes:
        weight: (out_features, in_features), of the model's dtype; None where the method keeps it in another form.
        packed: the weight in the method's own form; None: there is none.
    """

    weight: torch.Tensor | None
    packed: torch.Tensor | None


class LinearMethod(ABC):
    """Makes a projection's parameters, brings them into the form that is multiplied with, and multiplies.

    A method has no state of its own: one object serves all projections of a model.
    """

    @abstractmethod
    def create_weights(
        self, module: nn.Module, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Register what a loader fills, uninitialised, as parameters of `module`."""

    def process_weights(self, module: Projection) -> None:
        """Bring the loaded weight into the form that is multiplied with; after this none can be loaded."""
        return

    @abstractmethod
    def apply(
        self,
        module: Projection,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x @ weight.T + bias + residual`.

        Args:
            module: with its parameters.
            x: (T, in_features).
            bias: (out_features,).
            residual: (T, out_features), contiguous; may be overwritten with the result.
            out: where to write, of the result's shape and dtype, contiguous; not together with `residual`.

        Returns:
            (T, out_features).
        """

    def apply_gated(self, module: Projection, x: torch.Tensor) -> torch.Tensor | None:
        """`silu(x @ gate.T) * (x @ up.T)` in one kernel, gate above up in the weight; None where there is no such."""
        return None

    def apply_split(self, module: Projection, x: torch.Tensor, bias: torch.Tensor | None) -> WeightedRows | None:
        """`x @ weight.T + bias` as summands yet to be added up, where that is faster; None where it is not."""
        return None


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter that asks for no gradient; a loader fills it."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)

"""Projections, of one rank and of several."""

from __future__ import annotations

import torch
from torch import nn

from workers.layers.context import LayerContext
from workers.layers.linear_methods.base import empty_parameter
from workers.ops.weighted_sum import WeightedRows


class Linear(nn.Module):
    """`x @ weight.T + bias`; how the weight is kept and multiplied with is the linear method's.

    Args:
        in_features: K.
        out_features: N; of several ranks this one's share, where the features are shared out.
        bias: whether there is one.
        context: of the model.

    Attributes:
        weight: (N, K); None once it is packed, or where the method keeps it in another form.
        packed: the weight in the method's own form.
    """

    weight: torch.Tensor | None
    packed: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, context: LayerContext) -> None:
        super().__init__()
        self.packed = None
        self.method = context.linear_method
        self.method.create_weights(self, in_features, out_features, context.dtype, context.device)
        self.bias = empty_parameter(out_features, dtype=context.dtype, device=context.device) if bias else None

    def process_weights(self) -> None:
        """Call after loading; see `LinearMethod.process_weights`."""
        self.method.process_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, K) to (T, N)."""
        return self.method.apply(self, x, self.bias)


class RowParallelLinear(Linear):
    """A `Linear` into the residual stream whose input features the ranks of a group share out among them.

    Each rank multiplies with its columns of the weight, and the products are summed (Shoeybi et al., 2019,
    arXiv:1909.08053). Every rank has the whole bias, rank 0 adds it.

    Args:
        in_features: this rank's.
        out_features: of the residual stream.
        bias: whether there is one.
        context: of the model.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, context: LayerContext) -> None:
        super().__init__(in_features, out_features, bias, context)
        self.group = context.group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, K) of this rank to (T, N), the same bit for bit on all ranks."""
        return self.group.all_reduce(self.method.apply(self, x, self.bias if self.group.rank == 0 else None))

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """(T, K) of this rank to (T, N), this rank's summand of `forward`."""
        return self.method.apply(self, x, self.bias if self.group.rank == 0 else None)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual + self(x)`, of a group of one, in one call where there is one; may overwrite `residual`."""
        return self.method.apply(self, x, self.bias, residual=residual)

    def summands(self, x: torch.Tensor) -> WeightedRows | None:
        """`self(x)` of a group of one as a sum yet to be computed, where that is faster; None where it is not."""
        return self.method.apply_split(self, x, self.bias)

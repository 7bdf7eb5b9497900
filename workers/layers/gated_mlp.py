"""The gated MLP of a decoder layer."""

from __future__ import annotations

import torch
from torch import nn

from workers.layers.activation import SILU, GatedActivation
from workers.layers.context import LayerContext
from workers.layers.linear import Linear, RowParallelLinear
from workers.layers.residual import ResidualStream


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer, 2020, arXiv:2002.05202), gate and up in one multiplication.

    Args:
        hidden_size: of the residual stream.
        intermediate_size: this rank's share.
        context: of the model.
        bias: whether all three projections have one.
        activation: SiLU unless said otherwise.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        context: LayerContext,
        *,
        bias: bool = False,
        activation: GatedActivation = SILU,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias, context)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias, context)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """(T, hidden_size) to (T, intermediate_size): what `down_proj` multiplies with."""
        projection = self.gate_up_proj
        if self.activation == SILU and projection.bias is None:
            fused = projection.method.apply_gated(projection, x)
            if fused is not None:
                return fused
        return self.activation(projection(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, hidden_size) to (T, hidden_size), the same on all ranks."""
        out: torch.Tensor = self.down_proj(self.inner(x))
        return out

    def add_to(self, stream: ResidualStream, x: torch.Tensor) -> None:
        """Add what it makes of (T, hidden_size), the normalised stream, to the stream."""
        stream.add_product(self.down_proj, self.inner(x))

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """(T, hidden_size) to (T, hidden_size): this rank's summand of `forward`."""
        return self.down_proj.partial(self.inner(x))

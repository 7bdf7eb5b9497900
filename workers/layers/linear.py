"""The building blocks of a decoder layer that are not attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from workers.ops.rms_norm import add_rms_norm, rms_norm
from workers.ops.silu_and_mul import silu_and_mul
from workers.ops.skinny_linear import skinny_gated_linear, skinny_linear
from workers.ops.skinny_tiles import skinny_tile
from workers.parallel.group import TensorParallelGroup


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter that asks for no gradient; a loader fills it."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last dimension (Zhang and Sennrich, 2019, arXiv:1910.07467).

    Args:
        shape: of the weight; its last dimension is the one that is normalised, the others must match the input's.
        eps: added to the mean square.
    """

    def __init__(self, *shape: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = empty_parameter(*shape, dtype=dtype, device=device)
        self._normalized = (shape[-1],)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and scale; of the input's shape and dtype."""
        if self.weight.dim() == 1:
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self._normalized, None, self.eps) * self.weight

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual += x`, in place, and that normalised; for a weight of one dimension and a contiguous residual."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class Linear(nn.Module):
    """`x @ weight.T + bias`, with a weight that can be packed for the CPU's matrix kernels.

    `pack` gives the weight to oneDNN in the order in which its kernels read it, once instead of at every call; in
    decode, where a weight is read for a handful of rows, that is worth a factor of two. Packed or not, results agree
    to rounding.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = empty_parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = empty_parameter(out_features, dtype=dtype, device=device) if bias else None
        self._packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Replace the weight by its packed form where this device and dtype have one; call after loading."""
        if self.weight is not None:
            self._packed = pack_weight(self.weight)
            if self._packed is not None:
                self.weight = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in_features) to (T, out_features)."""
        return self._multiply(x, self.bias)

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._packed is not None:
            return packed_linear(x, self._packed, bias)
        weight = self._unpacked()
        tile = skinny_tile(x.shape[0], *weight.shape, weight.dtype, weight.device)
        return F.linear(x, weight, bias) if tile is None else skinny_linear(x, weight, tile, bias=bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual + self(x)` in one call where there is one; may overwrite `residual`."""
        if self._packed is not None:
            return packed_linear_add(residual, x, self._packed, self.bias)
        weight = self._unpacked()
        tile = skinny_tile(x.shape[0], *weight.shape, weight.dtype, weight.device)
        if tile is not None:
            return skinny_linear(x, weight, tile, bias=self.bias, residual=residual, out=residual)
        if x.is_cuda and self.bias is None:  # cuBLAS adds before the result is rounded, and needs no copy to add to
            return torch.addmm(residual, x, weight.t(), out=residual)
        return residual + F.linear(x, weight, self.bias)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in_features) to (T, out_features / 2): `silu` of the product's first half, times the other."""
        if self._packed is None and self.bias is None:
            weight = self._unpacked()
            tile = skinny_tile(x.shape[0], *weight.shape, weight.dtype, weight.device, gated=True)
            if tile is not None:
                return skinny_gated_linear(x, weight, tile)
        return silu_and_mul(self(x))

    def _unpacked(self) -> nn.Parameter:
        assert self.weight is not None
        return self.weight


class RowParallelLinear(Linear):
    """A `Linear` into the residual stream whose input features the ranks of a group share out among them.

    Each rank multiplies with its columns of the weight, and the products are summed (Shoeybi et al., 2019,
    arXiv:1909.08053). Every rank has the whole bias, rank 0 adds it.

    Args:
        in_features: this rank's.
        out_features: of the residual stream.
        bias: whether there is one.
        dtype: of the weight.
        device: where it is.
        group: the ranks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: TensorParallelGroup,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype, device)
        self._group = group

    def add_and_norm(self, residual: torch.Tensor, x: torch.Tensor, norm: RMSNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """`residual` plus the ranks' sum of their products, and that normalised; may overwrite `residual`.

        Args:
            residual: (T, out_features), contiguous, the same on all ranks.
            x: (T, in_features), this rank's.
            norm: what comes next in the model.

        Returns:
            Two (T, out_features), the same bit for bit on all ranks.
        """
        if self._group.size == 1:
            residual = self.add_to(residual, x)
            return residual, norm(residual)
        product = self._multiply(x, self.bias if self._group.rank == 0 else None)
        return residual, norm.add(self._group.all_reduce(product), residual)


def pack_weight(weight: torch.Tensor) -> torch.Tensor | None:
    """A (out, in) weight in oneDNN's own order for `packed_linear`; None where this device or dtype has none."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        packed_linear(torch.zeros(1, weight.shape[1], dtype=weight.dtype), packed, None)
    except (RuntimeError, AttributeError):  # this processor has no kernel for the dtype, or this build no such operator
        return None
    return packed


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `F.linear` with a weight from `pack_weight`."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return out


def packed_linear_add(
    residual: torch.Tensor, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`residual + packed_linear(x, packed, bias)`, added before the result is rounded."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
    return out


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (SwiGLU; Shazeer, 2020, arXiv:2002.05202), gate and up in one multiplication.

    Args:
        hidden_size: of the residual stream.
        intermediate_size: this rank's share.
        bias: whether all three projections have one.
        dtype: of the weights.
        device: where they are.
        group: the ranks that share the MLP.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: TensorParallelGroup,
    ) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias, dtype, device)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias, dtype, device, group)

    def add_and_norm(self, residual: torch.Tensor, x: torch.Tensor, norm: RMSNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """`residual` plus the MLP of `x`, all (T, hidden_size), and that normalised; may overwrite `residual`."""
        return self.down_proj.add_and_norm(residual, self.gate_up_proj.gated(x), norm)

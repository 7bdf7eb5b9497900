"""The building blocks of a decoder layer that are not attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from workers.fused_ops.rms_norm import rms_norm
from workers.fused_ops.silu_and_mul import silu_and_mul


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
        if self._packed is not None:
            return packed_linear(x, self._packed, self.bias)
        return F.linear(x, self._unpacked(), self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual + self(x)` in one call where there is one; may overwrite `residual`."""
        if self._packed is not None:
            return packed_linear_add(residual, x, self._packed, self.bias)
        if x.is_cuda and self.bias is None:  # cuBLAS adds before the result is rounded, and needs no copy to add to
            return torch.addmm(residual, x, self._unpacked().t(), out=residual)
        return residual + F.linear(x, self._unpacked(), self.bias)

    def _unpacked(self) -> nn.Parameter:
        assert self.weight is not None
        return self.weight


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
    """`down(silu(gate(x)) * up(x))` (SwiGLU; Shazeer, 2020, arXiv:2002.05202), gate and up in one multiplication."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias, dtype, device)
        self.down_proj = Linear(intermediate_size, hidden_size, bias, dtype, device)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual` plus the MLP of `x`, both (T, hidden_size); may overwrite `residual`."""
        return self.down_proj.add_to(residual, silu_and_mul(self.gate_up_proj(x)))

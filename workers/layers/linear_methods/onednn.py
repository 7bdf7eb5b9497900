"""Weights in oneDNN's own order, for CPUs."""

from __future__ import annotations

import torch

from workers.layers.linear_methods.base import Projection
from workers.layers.linear_methods.plain import PlainLinear


class OneDnnLinear(PlainLinear):
    """Gives a weight to oneDNN in the order in which its kernels read it, once instead of at every call.

    In decode, where a weight is read for a handful of rows, that is worth a factor of two. Packed or not, results agree
    to rounding. Where the processor has no kernel for the dtype, or this build no such operator, the weight stays as
    it is.
    """

    def process_weights(self, module: Projection) -> None:
        """Replace the weight by its packed form."""
        if module.weight is not None:
            module.packed = _pack(module.weight)
            if module.packed is not None:
                module.weight = None

    def apply(
        self,
        module: Projection,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `LinearMethod.apply`."""
        packed = module.packed
        if packed is None:
            return super().apply(module, x, bias, residual=residual, out=out)
        if residual is not None:  # added before the result is rounded
            summed: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
            return summed
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
        return result if out is None else out.copy_(result)

    def apply_gated(self, module: Projection, x: torch.Tensor) -> torch.Tensor | None:
        """See `LinearMethod.apply_gated`."""
        return None if module.packed is not None else super().apply_gated(module, x)


def _pack(weight: torch.Tensor) -> torch.Tensor | None:
    """A (out, in) weight in oneDNN's own order; None where this processor or dtype has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        x = torch.zeros(1, weight.shape[1], dtype=weight.dtype)
        torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return None
    return packed

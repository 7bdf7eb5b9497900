"""Weights in oneDNN's own order, for CPUs."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F  # noqa: N812

from workers.layers.linear_methods.base import Projection
from workers.layers.linear_methods.plain import PlainLinear
from workers.ops.weighted_sum import WeightedRows

_KEPT_KERNELS = 256
"""How many kernels oneDNN and PyTorch's layer above it keep each. One takes about 1 MB and is for one number of rows
and one weight's shape; their own bounds are 1024, which prompts of ever new lengths fill."""
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_EXACT_ROWS = 16
"""Up to which every number of rows, a batch in decode, has a kernel of its own."""


class OneDnnLinear(PlainLinear):
    """Gives a weight to oneDNN in the order in which its kernels read it, once instead of at every call.

    In decode, where a weight is read for a handful of rows, that is worth a factor of two. Packed or not, results agree
    to rounding. Where the processor has no kernel for the dtype, or this build no such operator, the weight stays as
    it is. oneDNN compiles a kernel for each number of rows, in milliseconds: rows are filled up to one of few numbers.
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
        num_rows = x.shape[-2]
        missing = kernel_rows(num_rows) - num_rows
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        if residual is not None:  # added before the result is rounded
            residual = F.pad(residual, (0, 0, 0, missing)) if missing else residual
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
        else:
            result = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
        result = result[..., :num_rows, :]
        return result if out is None else out.copy_(result)

    def apply_gated(self, module: Projection, x: torch.Tensor) -> torch.Tensor | None:
        """See `LinearMethod.apply_gated`."""
        return None if module.packed is not None else super().apply_gated(module, x)

    def apply_split(self, module: Projection, x: torch.Tensor, bias: torch.Tensor | None) -> WeightedRows | None:
        """See `LinearMethod.apply_split`."""
        return None if module.packed is not None else super().apply_split(module, x, bias)


def kernel_rows(num_rows: int) -> int:
    """The rows of the kernel that multiplies so many: eight numbers from each power of two to the next."""
    if num_rows <= _EXACT_ROWS:
        return num_rows
    step: int = 2 ** ((num_rows - 1).bit_length() - 4)
    return -(-num_rows // step) * step


def _pack(weight: torch.Tensor) -> torch.Tensor | None:
    """A (out, in) weight in oneDNN's own order; None where this processor or dtype has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    for name in _CAPACITIES:  # read at the first product
        os.environ.setdefault(name, str(_KEPT_KERNELS))
    try:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        x = torch.zeros(1, weight.shape[1], dtype=weight.dtype)
        torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return None
    return packed

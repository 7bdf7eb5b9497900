"""Root mean square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467), alone or after a residual addition.

Rounding is that of `torch.nn.functional.rms_norm`: the input is normalised and multiplied by the weight in float32 and
rounded once. (The modules of `transformers` round to the input's dtype before they multiply by the weight, too.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension.

    Args:
        x: (..., H), at most two dimensions before H unless contiguous; the elements of a row contiguous.
        weight: (H,), of x's dtype, or float32.
        eps: added to the mean square.
        out: where to write, of x's shape and dtype, and contiguous; may be `x`. None: a new tensor.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    _check(x, weight, out)
    if not x.is_cuda:
        return rms_norm_torch(x, weight, eps, out)
    from workers.ops.triton.rms_norm import launch_rms_norm

    result = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    launch_rms_norm(x, weight, eps, result)
    return result


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`residual += x`, then `rms_norm(residual)`.

    The sum is rounded to the residual's dtype before it is normalised, as if the two were separate operations.

    Args:
        x: (..., H), as for `rms_norm`; not changed unless it is `out`.
        residual: of x's shape and dtype, contiguous; changed in place.
        weight: (H,), of x's dtype, or float32.
        eps: added to the mean square.
        out: as for `rms_norm`; not `residual`.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    _check(x, weight, out)
    _check_written("residual", residual, x)
    if not x.is_cuda:
        return add_rms_norm_torch(x, residual, weight, eps, out)
    from workers.ops.triton.rms_norm import launch_rms_norm

    result = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    launch_rms_norm(x, weight, eps, result, residual)
    return result


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """`rms_norm` in plain torch."""
    if weight.dtype == x.dtype:
        result = F.rms_norm(x, weight.shape, weight, eps)
    else:
        result = F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
    return result if out is None else out.copy_(result)


def add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`add_rms_norm` in plain torch."""
    return rms_norm_torch(residual.add_(x), weight, eps, out)


def _check(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> None:
    fits = weight.dim() == 1 and x.dim() > 0 and x.shape[-1] == weight.shape[0]
    if not fits or weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"weight of {weight.dtype} {tuple(weight.shape)} for rows of {x.dtype} {tuple(x.shape)}: "
            "needs the last dimension of the rows, and their dtype or float32"
        )
    if out is not None:
        _check_written("out", out, x)


def _check_written(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    if tensor.shape != x.shape or tensor.dtype != x.dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} of {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}: "
            f"needs a contiguous tensor of {x.dtype} {tuple(x.shape)}"
        )

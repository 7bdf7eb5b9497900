"""The sum over a token's experts, or over the parts of a product: in a fixed order, in float32, rounded once; alone, or
where a norm follows.

A `WeightedRows` is such a sum that nobody has computed yet. Where what comes next is a residual addition and a norm,
one kernel does all three, and the sum is never in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers.ops.rms_norm import add_rms_norm_torch


@dataclass(frozen=True)
class WeightedRows:
    """`sum_j weights[t, j] * rows[t * k + j] + added[t]` for each token t, yet to be computed.

    Attributes:
        rows: (T * k, H), contiguous; in float32 the sum is not rounded before it is added to something.
        top_k: k.
        weights: (T, k) float32; None: all 1.
        added: (T, H) of the dtype of `rows`, such as what shared experts computed.
    """

    rows: torch.Tensor
    top_k: int
    weights: torch.Tensor | None = None
    added: torch.Tensor | None = None


def summed(summand: torch.Tensor | WeightedRows) -> torch.Tensor:
    """The tensor itself, or the sum."""
    if isinstance(summand, torch.Tensor):
        return summand
    return weighted_sum(summand.rows, summand.top_k, summand.weights, summand.added)


def add_weighted_rms_norm(
    summand: WeightedRows, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`residual += summed(summand)`, then `rms_norm(residual)`, with the roundings of the operations one by one.

    Args:
        summand: of T tokens.
        residual: (T, H) of the rows' dtype, or any where that is float32, contiguous; changed in place.
        weight: (H,), of the residual's dtype, or float32.
        eps: added to the mean square.

    Returns:
        (T, H) of the residual's dtype.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    rows, weights, added = summand.rows, summand.weights, summand.added
    _check(rows, summand.top_k, weights, added)
    shape = (rows.shape[0] // summand.top_k, rows.shape[1])
    fits = rows.dtype in (residual.dtype, torch.float32)
    if residual.shape != shape or not fits or not residual.is_contiguous():
        raise ValueError(
            f"residual of {residual.dtype} {tuple(residual.shape)} with strides {residual.stride()}: "
            f"needs a contiguous tensor of {rows.dtype} {shape}"
        )
    if weight.shape != shape[1:] or weight.dtype not in (residual.dtype, torch.float32):
        raise ValueError(
            f"weight of {weight.dtype} {tuple(weight.shape)}: needs {shape[1:]} of {residual.dtype} or float32"
        )
    if not rows.is_cuda:
        return add_rms_norm_torch(weighted_sum_torch(rows, summand.top_k, weights, added), residual, weight, eps)
    from workers.ops.triton.weighted_sum import launch_add_weighted_rms_norm

    out = torch.empty_like(residual)
    launch_add_weighted_rms_norm(
        out,
        rows.contiguous(),
        summand.top_k,
        None if weights is None else weights.contiguous(),
        None if added is None else added.contiguous(),
        residual,
        weight,
        eps,
    )
    return out


def weighted_sum(
    rows: torch.Tensor, top_k: int, weights: torch.Tensor | None = None, added: torch.Tensor | None = None
) -> torch.Tensor:
    """`sum_j weights[t, j] * rows[t * k + j] + added[t]` for each token t.

    The same bit for bit whatever else is in the batch: nothing is added atomically.

    Args:
        rows: (T * k, H), contiguous.
        top_k: k.
        weights: (T, k) float32; None: all 1.
        added: (T, H) of the dtype of `rows`, such as what shared experts computed.

    Returns:
        (T, H) of the dtype of `rows`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(rows, top_k, weights, added)
    if not rows.is_cuda:
        return weighted_sum_torch(rows, top_k, weights, added)
    from workers.ops.triton.weighted_sum import launch_weighted_sum

    out = rows.new_empty(rows.shape[0] // top_k, rows.shape[1])
    launch_weighted_sum(
        out,
        rows.contiguous(),
        top_k,
        None if weights is None else weights.contiguous(),
        None if added is None else added.contiguous(),
    )
    return out


def weighted_sum_torch(
    rows: torch.Tensor, top_k: int, weights: torch.Tensor | None = None, added: torch.Tensor | None = None
) -> torch.Tensor:
    """`weighted_sum` in plain torch; no more than one row of each token is in float32 at a time."""
    grouped = rows.unflatten(0, (-1, top_k))
    result = torch.zeros(grouped.shape[0], rows.shape[1], dtype=torch.float32, device=rows.device)
    for i in range(top_k):
        if weights is None:
            result += grouped[:, i]
        else:
            result.addcmul_(grouped[:, i].float(), weights[:, i : i + 1])
    if added is not None:
        result += added
    return result.to(rows.dtype)


def _check(rows: torch.Tensor, top_k: int, weights: torch.Tensor | None, added: torch.Tensor | None) -> None:
    num_tokens = rows.shape[0] // top_k
    if weights is not None and (weights.shape != (num_tokens, top_k) or weights.dtype != torch.float32):
        raise ValueError(f"weights of {weights.dtype} {tuple(weights.shape)}: needs float32 {(num_tokens, top_k)}")
    if added is not None and (added.shape != (num_tokens, rows.shape[1]) or added.dtype != rows.dtype):
        raise ValueError(
            f"{added.dtype} {tuple(added.shape)} to be added to {rows.dtype} {(num_tokens, rows.shape[1])}"
        )

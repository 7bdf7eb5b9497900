"""The sum over a token's experts: in a fixed order, in float32, rounded once."""

from __future__ import annotations

import torch


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
    num_tokens = rows.shape[0] // top_k
    if weights is not None and (weights.shape != (num_tokens, top_k) or weights.dtype != torch.float32):
        raise ValueError(f"weights of {weights.dtype} {tuple(weights.shape)}: needs float32 {(num_tokens, top_k)}")
    if added is not None and (added.shape != (num_tokens, rows.shape[1]) or added.dtype != rows.dtype):
        raise ValueError(
            f"{added.dtype} {tuple(added.shape)} to be added to {rows.dtype} {(num_tokens, rows.shape[1])}"
        )
    if not rows.is_cuda:
        return weighted_sum_torch(rows, top_k, weights, added)
    from workers.ops.triton.weighted_sum import launch_weighted_sum

    out = rows.new_empty(num_tokens, rows.shape[1])
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

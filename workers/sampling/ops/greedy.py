"""Greedy sampling for a whole batch, left on the device."""

from __future__ import annotations

import torch


def greedy_sample(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The most likely token of every row, of equal ones the lowest id; -1 where no token can be chosen.

    None can be chosen where a logit is NaN or plus infinity, or all are minus infinity. The caller looks for -1 when
    it brings the tokens to the host; until then nothing waits for the device.

    Args:
        logits: (N, V) bf16, fp16 or fp32; the elements of a row contiguous.
        out: (N,) int64, contiguous. None: a new tensor.

    Returns:
        (N,) int64.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} with strides {logits.stride()}: "
            "needs (rows, vocabulary) with contiguous rows"
        )
    if out is not None and (out.shape != logits.shape[:1] or out.dtype != torch.int64 or not out.is_contiguous()):
        raise ValueError(f"out of {out.dtype} {tuple(out.shape)}: needs contiguous int64 ({logits.shape[0]},)")
    if not logits.is_cuda:
        return greedy_sample_torch(logits, out)
    from workers.sampling.ops.triton.greedy import launch_greedy_sample

    result = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device) if out is None else out
    launch_greedy_sample(logits, result)
    return result


def greedy_sample_torch(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`greedy_sample` in plain torch."""
    best, token_ids = logits.max(dim=-1)
    chosen = torch.where(best.isfinite(), token_ids, -1)
    return chosen if out is None else out.copy_(chosen)

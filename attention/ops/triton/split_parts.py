"""Memory for what the splits of a decode kernel leave to be put together, and for how many have."""

from __future__ import annotations

import torch

MOST_COUNTED = 1024
"""Sequences of a batch of which the splits that have ended are counted."""


def make_counters(num_kv_heads: int, device: torch.device) -> torch.Tensor:
    """Of each sequence and KV head: int32 (`MOST_COUNTED` * Hkv,), zeros."""
    return torch.zeros(MOST_COUNTED * num_kv_heads, dtype=torch.int32, device=device)


def make_parts(
    batch: int, num_heads: int, num_splits: int, size: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Outputs (B, Hq, splits, D) and their log-sum-exps, base 2, (B, Hq, splits), both float32; None of one split."""
    if num_splits == 1:
        return None, None
    parts = torch.empty(batch, num_heads, num_splits, size, dtype=torch.float32, device=device)
    return parts, torch.empty(batch, num_heads, num_splits, dtype=torch.float32, device=device)

"""Decoder attention written out in float32, one sequence at a time: what a kernel's output is checked against."""

from __future__ import annotations

import torch

from attention.spec import AttentionSpec


def reference_attention(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend as `AttentionSpec` defines it. Holds all scores in memory: for short sequences.

    Args:
        spec: the layer, a decoder's.
        query: (n, Hq, D), the last n of the sequence's tokens.
        key: (S, Hkv, D).
        value: (S, Hkv, D).
        sinks: (Hq,), where the layer has them.

    Returns:
        (n, Hq, D) float32.
    """
    group = spec.num_heads // spec.num_kv_heads
    keys, values = (t.float().repeat_interleave(group, dim=1) for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * spec.scale
    if spec.logits_soft_cap is not None:
        scores = spec.logits_soft_cap * torch.tanh(scores / spec.logits_soft_cap)
    positions = torch.arange(key.shape[0], device=query.device)
    distance = positions[key.shape[0] - query.shape[0] :, None] - positions
    if spec.alibi_slopes is not None:
        slopes = torch.tensor(spec.alibi_slopes, dtype=torch.float32, device=query.device)
        scores = scores - slopes[:, None, None] * distance.abs()
    hidden = distance < 0
    if spec.sliding_window is not None:
        hidden = hidden | (distance >= spec.sliding_window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(-1, query.shape[0], 1)
        scores = torch.cat((scores, column), dim=2)
    weights = scores.softmax(-1)[:, :, : key.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, values)

"""Attention written out in float64, one sequence at a time: what every backend is held against."""

from __future__ import annotations

import torch

from attention.spec import AttentionSpec, AttentionType

_MOST_SCORES = 1 << 25
"""Scores that are held at a time; more heads than that are done one group after the other."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: AttentionSpec,
    visible: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One sequence's attention in float64; a query that sees no key gives zeros.

    Args:
        query: (n, Hq, D), the last n of the sequence's tokens, except in cross attention.
        key: (S, Hkv, D), all of the sequence's keys.
        value: (S, Hkv, D).
        spec: scale, soft cap and ALiBi slopes. What is masked comes from `visible` alone.
        visible: (n, S) bool, True where a query sees a key.
        sinks: (Hq,), one logit more in every softmax of a head, without a value.

    Returns:
        (n, Hq, D) float64.
    """
    queries = query.double().transpose(0, 1)
    keys, values = (
        tensor.double().repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1).transpose(0, 1)
        for tensor in (key, value)
    )
    heads_at_once = max(1, _MOST_SCORES // max(1, visible.numel()))
    attended = [
        _weights(queries[heads], keys[heads], heads, spec, visible, sinks) @ values[heads]
        for heads in torch.arange(spec.num_heads, device=query.device).split(heads_at_once)
    ]
    return torch.cat(attended).transpose(0, 1)


def _weights(
    queries: torch.Tensor,
    keys: torch.Tensor,
    heads: torch.Tensor,
    spec: AttentionSpec,
    visible: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """(heads, n, S) float64: how much each query takes of each value."""
    scores = spec.scale * (queries @ keys.mT)
    if spec.logits_soft_cap is not None:
        scores = spec.logits_soft_cap * torch.tanh(scores / spec.logits_soft_cap)
    if spec.alibi_slopes is not None:
        slopes = torch.tensor(spec.alibi_slopes, dtype=torch.float64, device=scores.device)
        scores = scores - slopes[heads, None, None] * behind(visible.shape[0], visible.shape[1], scores.device).abs()
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.double()[heads, None, None].expand(-1, visible.shape[0], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., : visible.shape[1]]
    return weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)


def behind(num_queries: int, num_keys: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(n, S) int64: how many tokens each key is behind each query, the queries being the last tokens."""
    positions = torch.arange(num_keys, device=device)
    return positions[num_keys - num_queries :, None] - positions if num_queries else positions.new_zeros(0, num_keys)


def visible_keys(
    spec: AttentionSpec,
    num_queries: int,
    num_keys: int,
    device: torch.device | str = "cpu",
    tree_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """(n, S) bool, True where a query sees a key by the rules of the layer and the draft tree."""
    if spec.attn_type is AttentionType.ENCODER_DECODER:
        return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    distance = behind(num_queries, num_keys, device)
    seen = distance >= 0 if spec.causal else torch.ones_like(distance, dtype=torch.bool)
    if spec.sliding_window is not None:
        seen &= distance.abs() < spec.sliding_window
    if tree_mask is not None:
        seen[:, num_keys - num_queries :] = tree_mask
    return seen


def fp8_round_trip(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """What an FP8 (e4m3) cache gives back of a tensor: stored divided by the scale, at most ±448, read times it."""
    divisor = torch.full((), scale, device=tensor.device)  # by a number, PyTorch would not divide on a GPU
    return (tensor.float() / divisor).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).double() * scale

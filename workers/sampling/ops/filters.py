"""Filters that leave only the likelier tokens: min-p, top-k, top-p. A dropped token gets the logit -inf.

Each keeps a head of the tokens in one order: the likelier first, of equally likely ones the lower id first.
"""

from __future__ import annotations

import torch

_DROPPED = float("-inf")
_HEAD = 1024
"""So many of the likeliest tokens are tried before the whole vocabulary is sorted."""

MASS_UNIT = 2.0**-32
"""Probabilities are added as integers, in this part of the most likely token's, cut off below: a sum of integers is
the same in any order, hence the same set of tokens is kept however the work is split."""


def filter_min_p(logits: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Keep tokens at least `min_p` times as likely as the likeliest (Nguyen et al. 2024, "Turning Up the Heat").

    The test p < min_p × p_max is made on logits, logit < max + ln(min_p), which needs no softmax.

    Args:
        logits: float32 (N, V), after temperature.
        min_p: float32 (N,), in [0, 1].
    """
    threshold = logits.amax(dim=-1, keepdim=True) + min_p.log().unsqueeze(1)
    return logits.masked_fill(logits < threshold, _DROPPED)


def filter_top_k(logits: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Keep the k likeliest tokens (Fan et al. 2018); tokens as likely as the k-th stay too.

    Args:
        logits: float32 (N, V).
        top_k: int64 (N,), each at least 1; values above V keep everything.
    """
    top_k = top_k.clamp(max=logits.shape[1])
    largest = logits.topk(int(top_k.max()), dim=-1).values
    threshold = largest.gather(1, (top_k - 1).unsqueeze(1))
    return logits.masked_fill(logits < threshold, _DROPPED)


def filter_top_p(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of tokens whose probability reaches `top_p` (Holtzman et al. 2020, nucleus sampling).

    Of equally likely tokens at the border the lower ids are kept. At least one token always is. Where the likeliest
    tokens suffice, as they nearly always do, only they are sorted; the set is the same.

    Args:
        logits: float32 (N, V), after the filters that come before: probabilities are those among their survivors.
        top_p: float32 (N,), in (0, 1].
    """
    largest = logits.amax(dim=-1, keepdim=True)
    needed = token_mass(logits - largest).sum(dim=-1).double() * top_p.double()
    head = logits.topk(min(_HEAD, logits.shape[1]), dim=-1).values
    num_kept = _nucleus_size(head - largest, needed)
    kept = _keep_largest(logits, head, num_kept)
    beyond = (num_kept == head.shape[1]).nonzero().squeeze(1)
    if head.shape[1] < logits.shape[1] and len(beyond) > 0:
        rows = logits[beyond]
        ordered = rows.sort(dim=-1, descending=True).values
        kept[beyond] = _keep_largest(rows, ordered, _nucleus_size(ordered - largest[beyond], needed[beyond]))
    return kept


def token_mass(relative: torch.Tensor) -> torch.Tensor:
    """Probabilities in `MASS_UNIT`s: int64, of logits less their row's largest."""
    return (relative.exp() / MASS_UNIT).long()


def _nucleus_size(ordered: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """How many of the logits, less the largest and in falling order, it takes to reach the mass: int64 (N,), from 1."""
    mass = token_mass(ordered)
    reached_before = mass.cumsum(dim=-1) - mass
    return (reached_before < needed.unsqueeze(1)).sum(dim=-1).clamp(min=1)


def _keep_largest(logits: torch.Tensor, ordered: torch.Tensor, num_kept: torch.Tensor) -> torch.Tensor:
    """Drop all but the `num_kept` largest logits of each row; `ordered` are the largest ones in falling order."""
    border = ordered.gather(1, (num_kept - 1).unsqueeze(1))
    num_equal_kept = num_kept - (ordered > border).sum(dim=-1)
    equal = logits == border
    kept_equal = equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= num_equal_kept.unsqueeze(1))
    return logits.masked_fill(~(kept_equal | (logits > border)), _DROPPED)

"""Keeps one sequence's broken logits from harming the rest of its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.errors import SamplingError
from workers.sampling.sampler import SampledToken, sample
from workers.sampling.state import SamplingState


def sample_isolated(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[SampledToken | SamplingError]:
    """As `sample`, with the error in the place of each sequence that has no valid token.

    Args:
        logits: float32 (N, V).
        states: N sequences.
    """
    try:
        return list(sample(logits, states))
    except SamplingError:
        return [_sample_one(logits[row : row + 1], state) for row, state in enumerate(states)]


def _sample_one(logits: torch.Tensor, state: SamplingState) -> SampledToken | SamplingError:
    try:
        return sample(logits, [state])[0]
    except SamplingError as error:
        return error

"""How a simulated answer ends: its length is its request's seed, if `max_tokens` allows it."""

from __future__ import annotations

from workers.messages import FinishReason
from workers.sampling_params import SamplingParams


def answer_tokens(sampling: SamplingParams) -> int:
    """How long the answer will be."""
    longest = sampling.max_tokens or 1
    return longest if sampling.seed is None else max(1, min(longest, sampling.seed))


def finish_reason(sampling: SamplingParams) -> FinishReason:
    """Why it ends."""
    return FinishReason.LENGTH if answer_tokens(sampling) == sampling.max_tokens else FinishReason.STOP

"""Compiles the kernels that choose tokens before the first request asks for them."""

from __future__ import annotations

import torch

from workers.sampling.sampler import launch_sample
from workers.sampling.state import SamplingState
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

_BATCHES = (
    (SamplingParams(seed=0),),
    (SamplingParams(seed=0, top_k=2, logprobs=1, presence_penalty=1.0), SamplingParams(seed=0)),
)
"""Together they run every variant of every kernel."""


def warm_up_sampling(vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Choose some tokens from logits of this size and dtype; nothing is compiled on a CPU, and nothing done."""
    if device.type != "cuda":
        return
    for batch in _BATCHES:
        states = [SamplingState(params, as_token_ids((0,)), frozenset(), 2) for params in batch]
        launch_sample(torch.zeros(len(states), vocab_size, dtype=dtype, device=device), states).tokens(states)

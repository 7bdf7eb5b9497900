"""How each row of a batch wants its token chosen, as the device reads it: `WORDS` 32-bit words a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from workers.sampling.ops.noise import noise_stream
from workers.sampling.state import SamplingState

STREAM, PROMPT_LEN, MIN_TOKENS, SLOT, TOP_K, LOGPROBS, BIAS_SLOT, MASKED = 0, 2, 3, 4, 5, 6, 7, 8
TEMPERATURE, TOP_P, LOG_MIN_P, REPETITION, FREQUENCY, PRESENCE = 9, 10, 11, 12, 13, 14
WORDS = 15
"""The places of the words. `STREAM` takes two; from `TEMPERATURE` on they are float32, before that int32."""

NO_SLOT = NO_LOGPROBS = -1


class RowParams(NamedTuple):
    """The same, taken apart: (N,) each.

    Attributes:
        stream: int64, of the row's noise, see `workers.sampling.ops.noise`.
        prompt_len: tokens of its prompt.
        min_tokens: output tokens before which no stop token may come.
        slot: its row of the token marks; `NO_SLOT`: no token of it is treated in a special way.
        top_k: 0 keeps all.
        logprobs: most likely tokens wanted with the chosen one; `NO_LOGPROBS`: not even that one's.
        bias_slot: its row of what is added to logits; `NO_SLOT`: nothing is.
        masked: not 0: the row of the masks in the same place says which tokens may come.
        temperature: float32, as are all that follow; 0 is greedy.
        top_p: 1 keeps all.
        log_min_p: natural logarithm; minus infinity keeps all.
        repetition: penalty; 1 for none.
        frequency: penalty; 0 for none.
        presence: penalty; 0 for none.
    """

    stream: torch.Tensor
    prompt_len: torch.Tensor
    min_tokens: torch.Tensor
    slot: torch.Tensor
    top_k: torch.Tensor
    logprobs: torch.Tensor
    bias_slot: torch.Tensor
    masked: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor


def pack(
    states: Sequence[SamplingState], slots: Sequence[int], vocab_size: int, bias_slots: Sequence[int] | None = None
) -> torch.Tensor:
    """The words of these sequences, int32 (N, WORDS) on the host; a `top_k` that keeps everything becomes 0.

    A row with a mask has `min_tokens` 0: its mask sees to that, see `workers.sampling.token_masks`.
    """
    bias_slots = [NO_SLOT] * len(states) if bias_slots is None else bias_slots
    words = np.zeros((len(states), WORDS), dtype=np.int32)
    floats = words.view(np.float32)
    words[:, STREAM : STREAM + 2] = (
        np.array([noise_stream(s.seed) for s in states], np.uint64).view(np.int32).reshape(-1, 2)
    )
    for word, real, state, slot, bias_slot in zip(words, floats, states, slots, bias_slots, strict=True):
        params = state.params
        word[PROMPT_LEN] = len(state.prompt_token_ids)
        word[MIN_TOKENS] = 0 if state.masked else params.min_tokens
        word[SLOT] = slot
        word[TOP_K] = params.top_k if params.top_k < vocab_size else 0
        word[LOGPROBS] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        word[BIAS_SLOT] = bias_slot
        word[MASKED] = state.masked
        real[TEMPERATURE] = 0.0 if params.greedy else params.temperature
        real[TOP_P] = params.top_p
        real[LOG_MIN_P] = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
        real[REPETITION:] = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
    return torch.from_numpy(words)


def unpack(words: torch.Tensor) -> RowParams:
    """The words of `pack`, on whatever device they are."""
    streams = words[:, STREAM : STREAM + 2].reshape(-1).view(torch.int64)
    floats = words.view(torch.float32)
    return RowParams(streams, *words[:, PROMPT_LEN:TEMPERATURE].unbind(dim=1), *floats[:, TEMPERATURE:].unbind(dim=1))

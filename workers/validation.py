"""What a worker refuses at its door, so that one wrong request cannot harm those it would share a batch with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from workers.errors import CapacityError, InvalidRequestError
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids


class SizedCache(Protocol):
    """A worker's KV cache, as far as its door asks it; `workers.kv_cache.manager.KVCacheManager` is one."""

    def too_small(self, num_tokens: int, *, computed: bool) -> tuple[int, int] | None:
        """The blocks that so many tokens need and those there are; None: they fit."""
        ...


SMALLEST_FLOAT32 = 2.0**-126
"""What is above 0 must be so in float32: less is 0 there, or is taken for it."""
MIN_REPETITION_PENALTY = 1e-6
"""A logit divided by it must stay finite in float32: those of up to 1e32 do, which no model gives."""


def check_prompt(num_tokens: int, sampling: SamplingParams, max_model_len: int) -> None:
    """Refuse what cannot run on any worker.

    Raises:
        InvalidRequestError: the prompt is empty or leaves no room for a token, or the sampling has no seed.
    """
    if num_tokens == 0:
        raise InvalidRequestError("the prompt is empty")
    if num_tokens >= max_model_len:
        raise InvalidRequestError(f"the prompt has {num_tokens} tokens, the context window {max_model_len}")
    if sampling.seed is None:
        raise InvalidRequestError("the sampling parameters have no seed; both workers must draw with the same one")


def check_sampling(sampling: SamplingParams, eos_token_ids: Iterable[int], vocab_size: int) -> None:
    """Refuse parameters that leave no token to choose.

    Args:
        sampling: the request's.
        eos_token_ids: of the model.
        vocab_size: of the model.

    Raises:
        InvalidRequestError: a number that float32, in which tokens are sampled, cannot reckon with, or `min_tokens`
            rules out every token there is, because each ends the text.
    """
    for name, value, least in (
        ("top_p", sampling.top_p, SMALLEST_FLOAT32),
        ("repetition_penalty", sampling.repetition_penalty, MIN_REPETITION_PENALTY),
    ):
        if value < least:
            raise InvalidRequestError(
                f"{name} is {value}, it must be at least {least:.3g}: tokens are sampled in float32"
            )
    if not sampling.min_tokens:
        return
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(eos_token_ids))
    if len(ends) >= vocab_size and all(token_id in ends for token_id in range(vocab_size)):
        raise InvalidRequestError(
            f"min_tokens is {sampling.min_tokens}, but all {vocab_size} tokens of the vocabulary end the text: none of "
            "them may come first"
        )


def check_token_ids(token_ids: npt.NDArray[np.integer], vocab_size: int, what: str = "prompt token") -> None:
    """Refuse ids outside the vocabulary; the message calls one of them `what`.

    Raises:
        InvalidRequestError: an id out of range.
    """
    if len(token_ids) and (token_ids.min() < 0 or token_ids.max() >= vocab_size):
        wrong = token_ids[(token_ids < 0) | (token_ids >= vocab_size)][0]
        raise InvalidRequestError(f"{what} {wrong} is out of range: the vocabulary has {vocab_size} tokens")


def check_sampling_tokens(sampling: SamplingParams, vocab_size: int) -> None:
    """Refuse token ids outside the vocabulary wherever the sampling parameters name one.

    Raises:
        InvalidRequestError: an id out of range.
    """
    named = {
        "stop token": sampling.stop_token_ids,
        "logit_bias token": tuple(token_id for token_id, _ in sampling.logit_bias),
        "allowed_token_ids token": sampling.allowed_token_ids,
        "bad_words token": tuple(token_id for word in sampling.bad_words_token_ids for token_id in word),
    }
    for what, token_ids in named.items():
        if token_ids:
            check_token_ids(as_token_ids(token_ids, what), vocab_size, what)


def check_local(is_local: bool, computes_prompts: bool) -> None:
    """Refuse a prompt without a prefill worker that the decode worker cannot compute either.

    Raises:
        InvalidRequestError: it computes none.
    """
    if is_local and not computes_prompts:
        raise InvalidRequestError("the request names no prefill worker, and this decode worker computes no prompts")


def check_capacity(cache: SizedCache, num_tokens: int, role: str, *, computed: bool) -> None:
    """Refuse what needs more blocks than there are.

    Args:
        cache: the worker's.
        num_tokens: of the prompt, with those behind it for which there must be room.
        role: the worker's.
        computed: whether the prompt is computed there.

    Raises:
        CapacityError: with both numbers.
    """
    if lacking := cache.too_small(num_tokens, computed=computed):
        needed, num_blocks = lacking
        raise CapacityError(f"the prompt needs {needed} KV blocks, a {role} worker has {num_blocks}")

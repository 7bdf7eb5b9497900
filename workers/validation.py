"""What a worker refuses at its door, so that one wrong request cannot harm those it would share a batch with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.errors import CapacityError, InvalidRequestError
from workers.kv_cache.manager import KVCacheManager
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids


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


def check_samples(num_samples: int, max_num_seqs: int) -> None:
    """Refuse more samples than sequences can run at once.

    Raises:
        CapacityError: with both numbers.
    """
    if num_samples > max_num_seqs:
        raise CapacityError(f"n is {num_samples}, the decode worker runs at most {max_num_seqs} sequences at once")


def check_capacity(cache: KVCacheManager, num_tokens: int, role: str, *, computed: bool, samples: int = 1) -> None:
    """Refuse what needs more blocks than there are.

    Args:
        cache: the worker's.
        num_tokens: of the prompt, with those behind it for which there must be room.
        role: the worker's.
        computed: whether the prompt is computed there.
        samples: sequences that go on from its end.

    Raises:
        CapacityError: with both numbers.
    """
    if lacking := cache.too_small(num_tokens, computed=computed, samples=samples):
        needed, num_blocks = lacking
        what = "the prompt needs" if samples == 1 else f"the prompt and n = {samples} samples need"
        raise CapacityError(f"{what} {needed} KV blocks, a {role} worker has {num_blocks}")

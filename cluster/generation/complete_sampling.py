"""Sampling parameters made whole: what a request leaves open, and what the served model and the prompt allow."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace

from cluster.api import ModelInfo
from cluster.generation.prompt_positions import check_prompt_logprobs
from cluster.generation.whole_answer import bounded_answer
from cluster.text.stop_tokens import stop_token_ids
from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams
from workers.structured_output import StructuredOutput
from workers.validation import check_sampling


def complete_sampling(
    sampling: SamplingParams,
    prompt_len: int,
    model: ModelInfo,
    special_token_ids: Mapping[str, int],
    max_n: int,
    gathered: int = 0,
) -> SamplingParams:
    """Turn stop strings that are tokens into these, keep `max_tokens` within the window, draw a missing seed.

    Args:
        sampling: as it was asked for.
        prompt_len: tokens of the prompt.
        model: the served one, for its limits.
        special_token_ids: of its tokenizer, by text.
        max_n: samples of one request at most.
        gathered: answers that are held until all are whole; 0: what there is is sent at once.

    Raises:
        InvalidRequestError: the request cannot be served; names the value and the limit.
    """
    if sampling.n > max_n:
        raise InvalidRequestError(f"n is {sampling.n}, at most {max_n} samples of a prompt are served")
    check_prompt_logprobs(sampling, prompt_len)
    room = model.max_model_len - prompt_len
    if sampling.min_tokens > room:
        raise InvalidRequestError(
            f"min_tokens is {sampling.min_tokens}, but after a prompt of {prompt_len} tokens the context window "
            f"of {model.max_model_len} has room for {room}"
        )
    if gathered:
        sampling = bounded_answer(sampling, room, gathered)
    max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    # Where special tokens are shown, a stop string is found in the text, whatever it has.
    stops = stop_token_ids(sampling, special_token_ids if sampling.skip_special_tokens else {})
    complete = replace(sampling, max_tokens=max_tokens, seed=seed, stop_token_ids=stops)
    check_sampling(complete, model.eos_token_ids, model.vocab_size)
    return complete


def obliged(sampling: SamplingParams, grammar: str) -> SamplingParams:
    """The same, with an answer that must call a function."""
    if sampling.structured_output is not None:
        raise InvalidRequestError("tool_choice wants a call, and response_format or structured_output another answer")
    return replace(sampling, structured_output=StructuredOutput.grammar(grammar))

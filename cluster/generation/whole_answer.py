"""How much an answer in one piece may have: all of it is held until its end, and then built at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.generation.text_chunk import TextChunk
from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams

MAX_ANSWER_LOGPROBS = 2**18
"""Log-probabilities of generated tokens in one answer: some 80 MB while it is built."""


_TOKEN_BYTES = 8
_LOGPROB_BYTES = 16


def held_bytes(chunks: Sequence[TextChunk]) -> int:
    """How much work an answer is to build, as `Intake.run` counts it."""
    tokens = [token for chunk in chunks for token in chunk.tokens]
    scored = sum(len(token.top_logprobs) + 1 for token in tokens if token.logprob is not None)
    prompts = sum(1 + len(position.top) for chunk in chunks for position in chunk.prompt_logprobs or ())
    return _TOKEN_BYTES * len(tokens) + _LOGPROB_BYTES * (scored + prompts)


def bounded_answer(sampling: SamplingParams, room: int, answers: int) -> SamplingParams:
    """The same for an answer in one piece, whose log-probabilities are bounded.

    A `max_tokens` that the request gives is kept or refused; one that it leaves open becomes what the bound leaves.

    Args:
        sampling: as it was asked for.
        room: tokens that the context window has behind the prompt.
        answers: that are held together, samples and prompts.

    Raises:
        InvalidRequestError: with the numbers.
    """
    if sampling.logprobs is None:
        return sampling
    each = sampling.logprobs + 1
    most = max(1, MAX_ANSWER_LOGPROBS // (each * answers))
    if sampling.max_tokens is None:
        return replace(sampling, max_tokens=max(min(most, room), sampling.min_tokens, 1))
    if (longest := min(sampling.max_tokens, room)) > most:
        raise InvalidRequestError(
            f"max_tokens is {longest} with logprobs {sampling.logprobs} in {answers} answers: that is up to "
            f"{longest * each * answers} log-probabilities in one piece, at most {MAX_ANSWER_LOGPROBS} are returned; "
            "stream the answer, or ask for less"
        )
    return sampling

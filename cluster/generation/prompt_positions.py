"""Log-probabilities of a prompt as its client is given them: each token with its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workers.errors import InvalidRequestError
from workers.messages import PromptLogprobs
from workers.sampling_params import SamplingParams
from workers.token_ids import TokenIds

MAX_PROMPT_LOGPROBS = 2**18
"""Log-probabilities in one answer: that many are built and sent in a fraction of a second, as some megabytes."""


@dataclass(frozen=True)
class ScoredToken:
    """A token, its log-probability (natural logarithm), and its text by itself."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True)
class PromptPosition:
    """The prompt's own token at one place, and the most likely ones there, most likely first."""

    chosen: ScoredToken
    top: tuple[ScoredToken, ...]


def check_prompt_logprobs(sampling: SamplingParams, num_tokens: int) -> None:
    """Refuse what would be too much for one answer.

    Raises:
        InvalidRequestError: with the numbers.
    """
    if sampling.prompt_logprobs is None:
        return
    if (wanted := (num_tokens - 1) * (sampling.prompt_logprobs + 1)) > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"prompt_logprobs is {sampling.prompt_logprobs}: of a prompt of {num_tokens} tokens that is {wanted} "
            f"log-probabilities, at most {MAX_PROMPT_LOGPROBS} are returned"
        )


def prompt_positions(
    token_ids: TokenIds, logprobs: PromptLogprobs, token_text: Callable[[int], str]
) -> tuple[PromptPosition, ...]:
    """One for each token of the prompt from the second on.

    Args:
        token_ids: (T,), the prompt.
        logprobs: of its last T - 1 tokens.
        token_text: a token's text by itself.
    """
    texts: dict[int, str] = {}

    def scored(token_id: int, logprob: float) -> ScoredToken:
        if (text := texts.get(token_id)) is None:
            text = texts[token_id] = token_text(token_id)
        return ScoredToken(token_id, logprob, text)

    return tuple(
        PromptPosition(scored(token_id, logprob), tuple(map(scored, top_ids, top)))
        for token_id, logprob, top_ids, top in zip(
            token_ids[1:].tolist(),
            logprobs.logprobs.tolist(),
            logprobs.top_token_ids.tolist(),
            logprobs.top_logprobs.tolist(),
            strict=True,
        )
    )

"""A request to /v1/completions."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from cluster.server.openai.requests.model import Prompts
from cluster.server.openai.requests.sampling import MAX_N, SamplingFields, StreamOptions
from workers.sampling_params import MAX_LOGPROBS

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for completions alone."""


class CompletionRequest(SamplingFields):
    """One prompt or several, each continued `n` times."""

    prompt: Prompts
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    best_of: int | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Of the prompt's most likely tokens, so many have log-probabilities; None: none, its own tokens neither.

        An answer that begins with its prompt has there as many as for its own tokens.
        """
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in asked if number is not None), default=None)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each a text or token ids."""
        prompts: list[Any] = self.prompt
        return prompts

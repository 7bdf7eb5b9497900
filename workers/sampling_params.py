"""How a request wants its tokens chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from workers.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MIN_TEMPERATURE = 1e-5
"""Below this, dividing by the temperature leaves one token anyway, so sampling is greedy."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters, with the names and meanings that vLLM's users know.

    Attributes:
        temperature: 0 (anything below `MIN_TEMPERATURE`) is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches it, in (0, 1].
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than `min_p` times the most likely one, in [0, 1].
        seed: the same seed gives the same tokens whatever else is in the batch; None draws one.
        presence_penalty: subtracted once from the logit of every token already generated, in [-2, 2].
        frequency_penalty: subtracted for each time that a token was generated, in [-2, 2].
        repetition_penalty: logits of tokens in prompt or output are divided (if positive) or multiplied by it, > 0.
        stop: strings that end the text; the match itself is not returned.
        stop_token_ids: tokens that end the text.
        ignore_eos: go on past the end-of-sequence token.
        max_tokens: the most tokens to generate; None goes on to the end of the context window.
        min_tokens: no end-of-sequence or stop token before this many were generated.
        logprobs: log-probabilities of the chosen and of this many most likely tokens; None returns none.
        include_stop_str_in_output: what ended the text, a stop string or a token, is part of the text.
        skip_special_tokens: special tokens have no text.

    Raises:
        InvalidRequestError: a value outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0.0, 100.0)
        _require("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _require("top_k", self.top_k, 0, 2**31 - 1)
        _require("min_p", self.min_p, 0.0, 1.0)
        _require("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _require("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.seed is not None:
            _require("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _require("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.max_tokens is not None:
            _require("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequestError(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"{len(self.stop)} stop strings given, at most {MAX_STOP_STRINGS} are allowed")
        if any(not text for text in self.stop):
            raise InvalidRequestError("a stop string is empty")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < MIN_TEMPERATURE


def _require(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside or math.isnan(value):
        bounds = f"{'(' if open_low else '['}{low}, {high}]"
        raise InvalidRequestError(f"{name} is {value}, it must be in {bounds}")

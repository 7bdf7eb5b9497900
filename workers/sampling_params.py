"""How a request wants its tokens chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from workers.errors import InvalidRequestError
from workers.structured_output import StructuredOutput

_Item = TypeVar("_Item", str, int)

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 4096
"""Of all stop strings together, as UTF-8: each is prepared for each sample."""
MAX_STOP_TOKEN_IDS = 1024
_SEEDS = 2**64
MAX_LOGIT_BIAS = 100.0
MAX_LISTED_TOKENS = 131_072
"""Of `allowed_token_ids`, and of `logit_bias`."""
MAX_BAD_WORDS = 1024
MAX_BAD_WORDS_BYTES = 64 * 1024
"""Of all of them together, as UTF-8."""
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
        stop: strings that end the text; the match itself is not returned. A single one may be given as it is.
        stop_token_ids: tokens that end the text.
        ignore_eos: go on past the end-of-sequence token.
        max_tokens: the most tokens to generate; None goes on to the end of the context window.
        min_tokens: no end-of-sequence or stop token before this many were generated.
        logprobs: log-probabilities of the chosen and of this many most likely tokens; None returns none.
        n: samples, answers to one prompt; see `of_sample`. Where every token is the most likely one they are all the
            same, and the gateway has one computed.
        prompt_logprobs: of each token of the prompt but the first, log-probabilities of the token and of this many most
            likely ones; None returns none.
        include_stop_str_in_output: what ended the text, a stop string or a token, is part of the text.
        skip_special_tokens: special tokens have no text.
        structured_output: the form of the answer; None leaves it free.
        logit_bias: (token id, what is added to its logit) pairs, the latter in [-100, 100].
        allowed_token_ids: the only tokens that may be generated; empty allows all.
        bad_words: texts that are not generated: the last token of each never follows the others.
        bad_words_token_ids: the same as tokens, each word in every way that it is to be kept out. The gateway fills it
            in, which has the tokenizer.

    Raises:
        InvalidRequestError: a value outside its range, or of another type.
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
    n: int = 1
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_output: StructuredOutput | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0.0, 100.0)
        _require("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _require_int("top_k", self.top_k, 0, 2**31 - 1)
        _require("min_p", self.min_p, 0.0, 1.0)
        _require("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _require_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.seed is not None:
            _require_int("seed", self.seed, 0, _SEEDS - 1)
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _require_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _require_int("n", self.n, 1, 2**31 - 1)
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequestError(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}")
        self._set_stops()
        self._check_restrictions()

    def _set_stops(self) -> None:
        """Check what ends the text; lists become tuples, and a single string is one stop string."""
        stop = _items("stop", self.stop, str)
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"{len(stop)} stop strings given, at most {MAX_STOP_STRINGS} are allowed")
        if not all(stop):
            raise InvalidRequestError("a stop string is empty")
        _require_bytes("stop", stop, MAX_STOP_BYTES)
        object.__setattr__(self, "stop", stop)
        ids = _items("stop_token_ids", self.stop_token_ids, int)
        _require_at_most("stop_token_ids", len(ids), MAX_STOP_TOKEN_IDS)
        object.__setattr__(self, "stop_token_ids", ids)

    def _check_restrictions(self) -> None:
        object.__setattr__(self, "allowed_token_ids", _items("allowed_token_ids", self.allowed_token_ids, int))
        object.__setattr__(self, "bad_words", _items("bad_words", self.bad_words, str))
        _require_at_most("logit_bias", len(self.logit_bias), MAX_LISTED_TOKENS)
        for _, bias in self.logit_bias:
            _require("a logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        _require_at_most("allowed_token_ids", len(self.allowed_token_ids), MAX_LISTED_TOKENS)
        _require_at_most("bad_words", len(self.bad_words), MAX_BAD_WORDS)
        _require_bytes("bad_words", self.bad_words, MAX_BAD_WORDS_BYTES)
        if any(not text.strip() for text in self.bad_words):
            raise InvalidRequestError("a text in bad_words is empty")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < MIN_TEMPERATURE

    def of_sample(self, index: int) -> SamplingParams:
        """The parameters of one sample as those of a request of its own, whose tokens are the same.

        Its seed is the request's plus `index`, modulo 2^64; so the first sample is what `n` = 1 gives. Noise is made of
        the mixed bits of a seed, so that neighbours have nothing in common.

        Args:
            index: of the sample, 0 to `n` - 1.
        """
        seed = None if self.seed is None else (self.seed + index) % _SEEDS
        return replace(self, n=1, seed=seed) if index or self.n > 1 else self


def _require(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    bounds = f"{'(' if open_low else '['}{low}, {high}]"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidRequestError(f"{name} is {value!r}, it must be a number in {bounds}")
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside or math.isnan(value):
        raise InvalidRequestError(f"{name} is {value}, it must be in {bounds}")


def _require_int(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequestError(f"{name} is {value!r}, it must be an integer in [{low}, {high}]")
    if not low <= value <= high:
        raise InvalidRequestError(f"{name} is {value}, it must be in [{low}, {high}]")


def _items(name: str, given: object, kind: type[_Item]) -> tuple[_Item, ...]:
    """A value, or those of a collection, all of one kind."""
    items = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else None
    if items is None:
        raise InvalidRequestError(f"{name} is {given!r}, it must be a list")
    for item in items:
        if not isinstance(item, kind) or isinstance(item, bool):
            raise InvalidRequestError(f"{name} has {item!r}, expected {'text' if kind is str else 'integers'}")
    return items


def _require_at_most(name: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidRequestError(f"{name} has {count} entries, at most {most} are allowed")


def _require_bytes(name: str, texts: Iterable[str], most: int) -> None:
    size = sum(len(text.encode(errors="surrogatepass")) for text in texts)
    if size > most:
        raise InvalidRequestError(f"{name} has {size} bytes in all, at most {most} are allowed")

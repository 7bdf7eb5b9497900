"""What a request asks of its answer's tokens: checked before it costs anything, and put in the workers' terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.generation.grammar_check import GrammarCheck
from cluster.generation.intake import Intake
from cluster.text.tokenizer import Tokenizer
from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams
from workers.validation import check_sampling_tokens


class Restrictions:
    """Checks requests' `structured_output`, `logit_bias`, `allowed_token_ids` and `bad_words`.

    Args:
        grammars: says which grammars the workers can compile; None: they are sent none.
        tokenizer: of the served checkpoint.
        vocab_size: of the model.
        intake: where long work is done; None: one of its own.
    """

    def __init__(
        self, grammars: GrammarCheck | None, tokenizer: Tokenizer, vocab_size: int, intake: Intake | None = None
    ) -> None:
        self._grammars = grammars
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._intake = intake or Intake()

    async def resolve(self, sampling: SamplingParams) -> SamplingParams:
        """The same with its bad words as tokens; long work is done elsewhere than on the event loop.

        Raises:
            InvalidRequestError: a grammar that cannot be used, an id out of range, or no token is left.
        """
        if sampling.structured_output is not None:
            if self._grammars is None:
                raise InvalidRequestError("this server takes no structured_output")
            await self._grammars.check(sampling.structured_output)
        return await self._intake.call(_listed_bytes(sampling), self._resolved, sampling)

    def _resolved(self, sampling: SamplingParams) -> SamplingParams:
        if sampling.bad_words:
            words = bad_words_token_ids(self._tokenizer, sampling.bad_words)
            sampling = replace(sampling, bad_words_token_ids=words)
        check_sampling_tokens(sampling, self._vocab_size)
        _require_a_token(sampling)
        return sampling


def bad_words_token_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of words that are kept out, as vLLM has them: at the beginning of a text, and behind a space.

    The latter counts where it begins with another token and is as long: else it is not the word that the space changes.
    """
    kept_out = dict[tuple[int, ...], None]()
    for word in words:
        bare, spaced = (
            tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " ")
        )
        kept_out[bare] = None
        if spaced[0] != bare[0] and len(spaced) == len(bare):
            kept_out[spaced] = None
    return tuple(word for word in kept_out if word)


def _listed_bytes(sampling: SamplingParams) -> int:
    """How much a request lists, reckoning a token as 4 bytes and a text as its length and what each costs."""
    numbers = len(sampling.logit_bias) + len(sampling.allowed_token_ids) + len(sampling.stop_token_ids)
    return 4 * numbers + sum(16 + len(text) for text in sampling.bad_words)


def _require_a_token(sampling: SamplingParams) -> None:
    """Refuse what rules out every token; what only a grammar leaves none of is found out when it comes to that."""
    if not sampling.allowed_token_ids:
        return
    left = set(sampling.allowed_token_ids) - {word[0] for word in sampling.bad_words_token_ids if len(word) == 1}
    if sampling.min_tokens and sampling.structured_output is None:
        left -= set(sampling.stop_token_ids)
    if not left:
        raise InvalidRequestError("bad_words and stop tokens before min_tokens leave none of allowed_token_ids")

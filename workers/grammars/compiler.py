"""Compiles grammars for a vocabulary, within limits, and keeps what it has compiled."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from workers.errors import CheckpointError, InvalidRequestError
from workers.grammars.matcher import TokenMatcher, short_reason
from workers.grammars.sources import source_of
from workers.grammars.vocabulary import load_vocabulary
from workers.structured_output import StructuredOutput

_LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Counted in steps and states, not in seconds, so that every worker draws the same line: tens of milliseconds for a
token, and about 100 MB for a grammar, at the most. Compiling is bounded in seconds where a request comes in, see
`workers.grammars.check`."""
_KEPT, _KEPT_BYTES = 256, 8 * 2**20


class Grammar:
    """A compiled form: where every text of it begins.

    Args:
        start: a matcher that has followed nothing.
    """

    def __init__(self, start: LLMatcher) -> None:
        self._start = start
        self._lock = threading.Lock()

    def matcher(self) -> TokenMatcher:
        """For one more sequence; takes microseconds."""
        with self._lock:
            return TokenMatcher(self._start.deep_copy())


class GrammarCompiler:
    """Compiled grammars, by what was asked for. Threads may share one.

    Args:
        load: the vocabulary; called once, when the first grammar is wanted.
    """

    def __init__(self, load: Callable[[], LLTokenizer]) -> None:
        self._load = load
        self._vocabulary: LLTokenizer | None = None
        self._compiling = threading.Lock()
        self._lock = threading.Lock()
        self._kept: OrderedDict[StructuredOutput, Grammar | str] = OrderedDict()
        self._kept_bytes = 0

    @classmethod
    def of_checkpoint(cls, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> GrammarCompiler:
        """For the vocabulary of a checkpoint; see `load_vocabulary`."""
        return cls(lambda: load_vocabulary(folder, vocab_size, eos_token_ids))

    @classmethod
    def without_vocabulary(cls) -> GrammarCompiler:
        """Refuses every grammar."""

        def load() -> LLTokenizer:
            raise CheckpointError("there is no vocabulary")

        return cls(load)

    def matcher(self, wanted: StructuredOutput | None) -> TokenMatcher | None:
        """For one more sequence that wants this form; None if it wants none. Errors are those of `compile`."""
        return None if wanted is None else self.compile(wanted).matcher()

    def has(self, wanted: StructuredOutput) -> bool:
        """Whether `compile` would answer at once."""
        with self._lock:
            return wanted in self._kept

    def compile(self, wanted: StructuredOutput) -> Grammar:
        """The grammar of a form, compiled now or before.

        What is refused is remembered, too. Lets other threads run.

        Raises:
            InvalidRequestError: it is no form, has features that are not known, allows no text, or is too complex; or
                the checkpoint has no vocabulary to compile it for.
        """
        if (known := self._recall(wanted)) is None:
            with self._compiling:  # one after the other: many at once would take memory and cores from the rest
                if (known := self._recall(wanted)) is None:
                    known = self._compile(wanted)
                    self._keep(wanted, known)
        if isinstance(known, str):
            raise InvalidRequestError(known)
        return known

    def _recall(self, wanted: StructuredOutput) -> Grammar | str | None:
        with self._lock:
            if (known := self._kept.get(wanted)) is not None:
                self._kept.move_to_end(wanted)
            return known

    def _keep(self, wanted: StructuredOutput, known: Grammar | str) -> None:
        with self._lock:
            self._kept[wanted] = known
            self._kept_bytes += wanted.num_bytes
            while len(self._kept) > 1 and (len(self._kept) > _KEPT or self._kept_bytes > _KEPT_BYTES):
                self._kept_bytes -= self._kept.popitem(last=False)[0].num_bytes

    def _compile(self, wanted: StructuredOutput) -> Grammar | str:
        if self._vocabulary is None:
            try:
                self._vocabulary = self._load()
            except CheckpointError as error:
                raise InvalidRequestError(f"this model takes no structured_output: {error}") from error
        try:
            source = source_of(wanted)
        except InvalidRequestError as error:
            return str(error)
        start = LLMatcher(self._vocabulary, source, log_level=0, limits=_LIMITS)
        if not start.is_error():
            start.compute_bitmask()  # what only the first mask finds out is found out here
        if start.is_error():
            return f"structured_output.{wanted.kind.value} cannot be used: {short_reason(start)}"
        return Grammar(start)

"""Where sequences are in their grammars, and what may come next."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

_MAX_THREADS = 8


class TokenMatcher:
    """Follows the tokens of one sequence through a grammar.

    It depends on the grammar and the tokens alone: on another worker, or after a pause, it is made anew and follows
    the output so far.

    Attributes:
        error: why the sequence cannot go on; None while it can. Once set it stays.

    Args:
        matcher: at the beginning of the grammar, and nobody else's.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.error: str | None = None
        self._num_taken = 0

    @property
    def accepting(self) -> bool:
        """Whether the text may end here."""
        return self.error is None and bool(self.matcher.is_accepting())

    def follow(self, output_token_ids: Sequence[int]) -> None:
        """Take the tokens that are new; none of them ends a text.

        Args:
            output_token_ids: those that were followed before, and perhaps more.
        """
        for token_id in output_token_ids[self._num_taken :]:
            if self.error is not None:
                return
            self.matcher.consume_token(token_id)
            self._num_taken += 1
            self.look_for_error()

    def look_for_error(self) -> None:
        """Set `error` if the grammar has met a limit, or a token that it does not allow."""
        if self.matcher.is_error():
            self.error = short_reason(self.matcher)


def fill_masks(rows: Sequence[tuple[int, TokenMatcher, Sequence[int]]], masks: npt.NDArray[np.int32]) -> None:
    """Write which tokens may come next, on several threads; none may where a matcher has an error.

    Tokens that end a text are among them where the grammar is complete.

    Args:
        rows: of each sequence its row of the masks, its matcher, and its output so far, see `TokenMatcher.follow`.
        masks: (n, ⌈V / 32⌉), contiguous: bit i % 32 of word i // 32 is token i.
    """
    for _, matcher, output_token_ids in rows:
        matcher.follow(output_token_ids)
    able = [(matcher.matcher, row) for row, matcher, _ in rows if matcher.error is None]
    if len(able) == 1:
        ((only, row),) = able
        only.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks[row].nbytes)
    elif able:
        _executor().unsafe_compute_mask_ptr(able, masks.ctypes.data, masks.strides[0], len(masks))
    for row, matcher, _ in rows:
        matcher.look_for_error()
        if matcher.error is not None:
            masks[row].fill(0)


@functools.cache
def _executor() -> LLExecutor:
    return LLExecutor(num_threads=max(1, min(_MAX_THREADS, (os.cpu_count() or 1) - 1)))


def short_reason(matcher: LLMatcher) -> str:
    """What a matcher's error is, in one line of bounded length: of a regex what is wrong, not all of it."""
    lines = [line.strip() for line in matcher.get_error().strip().splitlines()] or ["unknown"]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{(named or lines)[0]:.300}"

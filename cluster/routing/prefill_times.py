"""How long each worker of a pool needs for a prompt, and for what it has not cached of one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from workers.runner.step_times import StepTimes

PROMPT_LENGTHS = tuple(1 << n for n in range(4, 21))
"""Prompt lengths, tokens, at which each worker's prefill time is kept; between two of them it is a line."""

_BREAKS = np.array(PROMPT_LENGTHS[:-1], dtype=np.float64)
_BITS = PROMPT_LENGTHS[0].bit_length() - 1
_Floats = npt.NDArray[np.float64]


class PrefillTimes:
    """By row, as the workers stand in their table: seconds = start + slope × tokens, on the line of that many tokens.

    Prompts that are shorter than all that are kept take as long as the shortest; the last line goes on for ever. What a
    worker saves is the time of a prompt of the cached tokens, but the rest takes no less than a prompt of its own
    length: it attends to all tokens before it, and has to be launched.

    Args:
        rows: that there is room for.
    """

    def __init__(self, rows: int) -> None:
        self._start, self._slope = np.zeros((len(PROMPT_LENGTHS), rows)), np.zeros((len(PROMPT_LENGTHS), rows))

    def grow(self, rows: int) -> None:
        """Make room for so many."""
        room = ((0, 0), (0, rows - self._start.shape[1]))
        self._start, self._slope = np.pad(self._start, room), np.pad(self._slope, room)

    def put(self, row: int, step_times: StepTimes) -> None:
        """A worker with these measurements is in that row."""
        points = [(n, step_times.prefill_seconds(n)) for n in PROMPT_LENGTHS]
        self._start[0, row], self._slope[0, row] = points[0][1], 0.0
        for line, ((n, seconds), (more, seconds_more)) in enumerate(pairwise(points), 1):
            slope = (seconds_more - seconds) / (more - n)
            self._start[line, row], self._slope[line, row] = seconds - slope * n, slope

    def move(self, row: int, to: int) -> None:
        """The worker of one row is in another one now."""
        self._start[:, to], self._slope[:, to] = self._start[:, row], self._slope[:, row]

    def whole(self, num_rows: int, num_tokens: int) -> _Floats:
        """Of a prompt of so many tokens, for each of the first rows."""
        line = _line(num_tokens)
        seconds: _Floats = self._slope[line, :num_rows] * float(num_tokens)
        seconds += self._start[line, :num_rows]
        return seconds

    def rest(self, num_tokens: int, cached: _Floats) -> _Floats:
        """Of a prompt of which so much is cached, for each of the first rows.

        Args:
            num_tokens: of the prompt.
            cached: of it, for each worker; fewer than `num_tokens`.
        """
        seconds = self.whole(len(cached), num_tokens)
        (rows,) = cached.nonzero()
        if len(rows):
            parts = np.empty((2, len(rows)))  # what is there, and what is not
            parts[0] = cached[rows]
            np.subtract(float(num_tokens), parts[0], out=parts[1])
            at = _BREAKS.searchsorted(parts, "right"), rows
            parts *= self._slope[at]
            parts += self._start[at]
            seconds[rows] = np.maximum(seconds[rows] - parts[0], parts[1])
        return seconds

    def whole_of(self, row: int, num_tokens: int) -> float:
        """As `whole`, of one worker."""
        line = _line(num_tokens)
        return float(self._slope[line, row]) * num_tokens + float(self._start[line, row])

    def rest_of(self, row: int, num_tokens: int, cached: int) -> float:
        """As `rest`, of one worker."""
        seconds = self.whole_of(row, num_tokens)
        if not cached:
            return seconds
        return max(seconds - self.whole_of(row, cached), self.whole_of(row, num_tokens - cached))


def _line(num_tokens: int) -> int:
    """As `_BREAKS.searchsorted(num_tokens, "right")`: the breaks are the powers of two from the first on."""
    return min(max(num_tokens.bit_length() - _BITS, 0), len(_BREAKS))

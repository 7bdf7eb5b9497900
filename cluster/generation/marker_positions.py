"""Where special tokens stand in a text that is sent in parts, and that is held back at times."""

from __future__ import annotations

from collections import deque

Markers = tuple[tuple[int, str], ...]
"""Special tokens as (characters of the text before it, its own text), in order."""


class MarkerPositions:
    """Keeps markers until the text before them has been sent."""

    def __init__(self) -> None:
        self._sent = 0
        self._waiting: deque[tuple[int, str]] = deque()

    def add(self, marker: str, num_unsent: int) -> None:
        """A marker behind so many characters that have not been sent."""
        self._waiting.append((self._sent + num_unsent, marker))

    def send(self, num_characters: int) -> Markers:
        """So much text is sent; return the markers in it and right behind it, by their places in it."""
        start, self._sent = self._sent, self._sent + num_characters
        sent = []
        while self._waiting and self._waiting[0][0] <= self._sent:
            position, marker = self._waiting.popleft()
            sent.append((position - start, marker))
        return tuple(sent)

"""Markers of a format, found in text that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable


class Marker(str):
    """A marker that was found, or a special token that is one; any other string is plain text."""

    __slots__ = ()


class MarkerScanner:
    """Cuts text into plain text and markers; text that may turn out to be the beginning of a marker waits.

    No marker contains another, so that where one begins and ends depends on the text alone and not on how it is cut.

    Args:
        markers: what is looked for; none may contain another.

    Raises:
        ValueError: a marker is empty or contains another.
    """

    def __init__(self, markers: Iterable[str]) -> None:
        self._markers = tuple(sorted(set(markers)))
        for marker in self._markers:
            if not marker or any(other in marker for other in self._markers if other != marker):
                raise ValueError(f"marker {marker!r} is empty or contains another")
        self._pattern = re.compile("|".join(map(re.escape, self._markers)) or r"(?!)")
        self._beginnings = frozenset(marker[:size] for marker in self._markers for size in range(1, len(marker)))
        self._longest = max(map(len, self._markers), default=1) - 1
        firsts = "".join(sorted({re.escape(marker[0]) for marker in self._markers}))
        self._first = re.compile(f"[{firsts}]" if firsts else r"(?!)")
        self._held = ""

    def push(self, text: str) -> list[str]:
        """Take more text; return plain text and `Marker`s, in order."""
        if not self._held and self._first.search(text) is None:
            return [text] if text else []
        pending, parts, at = self._held + text, list[str](), 0
        for match in self._pattern.finditer(pending):
            if match.start() > at:
                parts.append(pending[at : match.start()])
            parts.append(Marker(match.group()))
            at = match.end()
        end = len(pending) - self._num_held(pending, at)
        if end > at:
            parts.append(pending[at:end])
        self._held = pending[end:]
        return parts

    def finish(self) -> list[str]:
        """What has waited, as plain text: nothing follows that could complete it."""
        held, self._held = self._held, ""
        return [held] if held else []

    def _num_held(self, pending: str, at: int) -> int:
        """The length of the longest end of the text that a marker may begin with."""
        for first in self._first.finditer(pending, max(at, len(pending) - self._longest)):
            if pending[first.start() :] in self._beginnings:
                return len(pending) - first.start()
        return 0

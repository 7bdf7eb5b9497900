"""Stop strings, found in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string.

    The match that is complete first ends the text; if several end at the same character, the longest of them. That
    depends on the text alone and not on how it is cut into pieces. Text that may turn out to be the beginning of a
    stop string is held back until it is known, so no part of a match is ever returned.

    Every stop string is followed with the automaton of Knuth, Morris and Pratt ("Fast Pattern Matching in Strings",
    1977), so the cost is linear in the text whatever the strings are.

    Args:
        stops: the stop strings.
        include: the match itself is part of the text.

    Attributes:
        found: the stop string that ended the text; None while it goes on.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string is empty")
        self.found: str | None = None
        self._include = include
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""

    def push(self, text: str, *, may_end: bool = True) -> tuple[str, bool]:
        """Take more text.

        Args:
            text: what comes next.
            may_end: whether a stop string may be completed in it; one that is does not count otherwise.

        Returns:
            The text that may be shown now, and whether a stop string was found: then it is the last of the text,
            and whatever comes later is dropped.
        """
        if self.found is not None:
            return "", True
        if not self._automata:
            return text, False
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            match = max((automaton.stop for automaton in self._automata if automaton.step(char)), key=len, default="")
            if match and may_end:
                self._held, self.found = "", match
                return pending[: end if self._include else end - len(match)], True
        keep = len(pending) - max(automaton.num_matched for automaton in self._automata)
        self._held = pending[keep:]
        return pending[:keep], False

    @property
    def num_held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def finish(self) -> str:
        """The text that was held back, now that no stop string can be completed any more."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """How much of the beginning of one stop string the text ends with at the moment."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._failure = [0] * len(stop)
        """For every prefix, the length of its longest proper suffix that is a prefix too."""
        matched = 0
        for i in range(1, len(stop)):
            while matched and stop[i] != stop[matched]:
                matched = self._failure[matched - 1]
            matched += stop[i] == stop[matched]
            self._failure[i] = matched

    def step(self, char: str) -> bool:
        """Take one character; whether it completes the stop string. The end of a match may begin another."""
        while self.num_matched and self.stop[self.num_matched] != char:
            self.num_matched = self._failure[self.num_matched - 1]
        self.num_matched += self.stop[self.num_matched] == char
        if self.num_matched < len(self.stop):
            return False
        self.num_matched = self._failure[-1]
        return True

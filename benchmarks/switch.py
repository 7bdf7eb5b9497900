"""A mechanism behind a promise, and the change that switches it off."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Switch:
    """A mechanism, and how it is switched off.

    Attributes:
        name: in docs/guarantees.md.
        file: that has it, from the repository's root.
        on: a piece of the file's text; stands there once.
        off: what takes its place.
        test: file and function of the test that fails then.
    """

    name: str
    file: str
    on: str
    off: str
    test: str

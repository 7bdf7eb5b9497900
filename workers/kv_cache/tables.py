"""The block tables of one sequence, one for each cache group. Plain integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

NULL_BLOCK = 0
"""Stands in a table for a block that the sequence does not hold; nothing that a query sees lies there."""


@dataclass(eq=False)
class BlockTable:
    """The blocks of a sequence in one cache group.

    Attributes:
        blocks: one for each place; `NULL_BLOCK` before `start`. Grows in place.
        start: the first place whose block the sequence holds.
        promised: the most blocks that it was promised to hold at once; 0: it grows as long as there are free ones.
        owner: whose the blocks are that it takes.
    """

    blocks: list[int] = field(default_factory=list)
    start: int = 0
    promised: int = 0
    owner: str = ""

    @property
    def held(self) -> list[int]:
        """The blocks that the sequence holds, in order."""
        return self.blocks[self.start :] if self.start else self.blocks

    @property
    def num_held(self) -> int:
        """How many these are."""
        return len(self.blocks) - self.start

    def drop(self, end: int) -> list[int]:
        """Forget the blocks at the places before `end`, and return them."""
        dropped = self.blocks[self.start : end]
        self.blocks[self.start : end] = [NULL_BLOCK] * len(dropped)
        self.start += len(dropped)
        return dropped


class SequenceTables:
    """All block tables of one sequence. Told apart by identity: who comes back from host memory has others.

    Attributes:
        groups: one table a cache group.
        num_slots: tokens for which there are blocks in every group.
        release_at: as soon as so many tokens are in the cache, a block lies behind a window.
    """

    __slots__ = ("groups", "num_slots", "release_at")

    def __init__(self, groups: Sequence[BlockTable] = ()) -> None:
        self.groups = tuple(groups)
        self.num_slots = 0
        self.release_at: float = math.inf

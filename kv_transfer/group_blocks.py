"""Which blocks of a sequence are meant in one cache group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupBlocks:
    """Blocks of one cache group for a sequence's blocks from `first_block` to its last.

    Attributes:
        first_block: the place of the first of them in the sequence. Those before it are here already, or not needed.
        block_ids: in the order of the sequence. None at all is in order.

    Raises:
        ValueError: `first_block` is negative.
    """

    first_block: int
    block_ids: Sequence[int]

    def __post_init__(self) -> None:
        if self.first_block < 0:
            raise ValueError(f"first_block is {self.first_block}, it cannot be negative")
        object.__setattr__(self, "block_ids", tuple(self.block_ids))

    @property
    def end(self) -> int:
        """The place behind the last of them in the sequence."""
        return self.first_block + len(self.block_ids)

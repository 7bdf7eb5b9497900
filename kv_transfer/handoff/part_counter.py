"""Counting what has arrived of one handoff."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kv_transfer.handoff.messages import Final, Part


@dataclass(frozen=True)
class Wanted:
    """What is to arrive of one cache group.

    Attributes:
        num_layers: layers of the group that this rank is sent.
        blocks: places in the sequence of the blocks to receive in each layer.
    """

    num_layers: int
    blocks: range

    def contains(self, part: Part) -> bool:
        """Whether a part lies within it."""
        return (
            self.blocks.start <= part.first_block
            and part.first_block + part.num_blocks <= self.blocks.stop
            and part.first_layer + part.num_layers <= self.num_layers
        )


class PartCounter:
    """Knows when every wanted block of every layer of every cache group has landed, in whatever order parts arrive.

    Each (layer, block) is counted once, whatever parts name it: a sender that repeats a part, under its index or
    another, completes nothing by it. Where no block is wanted, the last message alone completes the handoff.

    Args:
        wanted: by cache group.
    """

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self._wanted = tuple(wanted)
        self._landed = [[0] * group.num_layers for group in wanted]  # of each layer a bit for each block
        self._missing = [group.num_layers * len(group.blocks) for group in wanted]
        self._indices: set[int] = set()
        self._final: Final | None = None
        self._contradicted = False

    @property
    def contradicted(self) -> bool:
        """Whether two last messages came that say different things: nothing will be complete."""
        return self._contradicted

    def count(self, part: Part) -> None:
        """Take note of a part; a repeated one, or one that reaches beyond what is wanted, counts for nothing."""
        if part.index in self._indices or part.group >= len(self._wanted):
            return
        wanted, landed = self._wanted[part.group], self._landed[part.group]
        if not wanted.contains(part):
            return
        self._indices.add(part.index)
        blocks = ((1 << part.num_blocks) - 1) << (part.first_block - wanted.blocks.start)
        for layer in range(part.first_layer, part.first_layer + part.num_layers):
            self._missing[part.group] -= (blocks & ~landed[layer]).bit_count()
            landed[layer] |= blocks

    def close(self, final: Final) -> None:
        """Take note of the last message. Repeated it counts for nothing."""
        self._contradicted = self._contradicted or self._final not in (None, final)
        self._final = self._final or final

    @property
    def first_token(self) -> int | None:
        """The first token, once every part and the last message have been counted."""
        final = self._final
        if final is None or self._contradicted:
            return None
        if len(self._indices) < final.num_parts or any(missing > 0 for missing in self._missing):
            return None
        return final.first_token

    @property
    def other_tokens(self) -> tuple[int, ...]:
        """What came with it: the first tokens of the prompt's other samples."""
        return () if self._final is None else self._final.other_tokens

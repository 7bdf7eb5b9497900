"""Counting what has arrived of one handoff."""

from __future__ import annotations

from kv_transfer.handoff.messages import Final, Part


class PartCounter:
    """Knows when every wanted block of every layer has landed, in whatever order the parts arrive, repeated or not.

    Where no block is wanted, the last message alone completes the handoff.

    Args:
        num_layers: layers to receive.
        num_blocks: blocks of the sequence to receive in each layer.
        first_block: the place of the first of them in the sequence.
    """

    def __init__(self, num_layers: int, num_blocks: int, first_block: int = 0) -> None:
        self._num_layers = num_layers
        self._wanted = range(first_block, first_block + num_blocks)
        self._expected = num_layers * num_blocks
        self._landed = 0
        self._indices: set[int] = set()
        self._final: Final | None = None

    def count(self, part: Part) -> None:
        """Take note of a part; a repeated one, or one that reaches beyond what is wanted, counts for nothing."""
        if part.index not in self._indices and self._contains(part):
            self._indices.add(part.index)
            self._landed += part.num_layers * part.num_blocks

    def close(self, final: Final) -> None:
        """Take note of the last message."""
        self._final = final

    @property
    def first_token(self) -> int | None:
        """The first token, once every part and the last message have been counted."""
        final = self._final
        if final is None or len(self._indices) < final.num_parts or self._landed < self._expected:
            return None
        return final.first_token

    def _contains(self, part: Part) -> bool:
        last_block = part.first_block + part.num_blocks
        return (
            self._wanted.start <= part.first_block
            and last_block <= self._wanted.stop
            and part.first_layer + part.num_layers <= self._num_layers
        )

"""Counting what has arrived of one handoff."""

from __future__ import annotations

from kv_transfer.messages import Final, Part


class PartLedger:
    """Knows when every block of every layer has landed, in whatever order the parts arrive, repeated or not.

    Args:
        num_layers: layers to receive.
        num_blocks: blocks of the sequence to receive in each layer.
    """

    def __init__(self, num_layers: int, num_blocks: int) -> None:
        self._expected = num_layers * num_blocks
        self._landed = 0
        self._indices: set[int] = set()
        self._final: Final | None = None

    def count(self, part: Part) -> None:
        """Take note of a part; a repeated one changes nothing."""
        if part.index not in self._indices:
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

"""Rows with an entry for each token of the vocabulary, on the device, which sequences take and give back."""

from __future__ import annotations

import torch

from workers.host_copies import to_device

_FIRST_SLOTS = 8


class VocabularyRows:
    """A row of zeros for whoever takes one. Memory is taken when the first one is, and doubled.

    Args:
        vocab_size: V, entries of a row.
        dtype: of an entry.
        device: where they are.
    """

    def __init__(self, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(1, vocab_size, dtype=dtype, device=device)[:0]
        """(slots, V); another tensor after `take`."""
        self._free: list[int] = []

    @torch.inference_mode()
    def take(self, count: int) -> list[int]:
        """So many slots, all zero."""
        while len(self._free) < count:
            self._grow()
        slots = [self._free.pop() for _ in range(count)]
        self.tensor.index_fill_(0, to_device(torch.tensor(slots), self.tensor.device), 0)
        return slots

    def release(self, slot: int) -> None:
        """Nobody needs the slot from the next step on."""
        self._free.append(slot)

    def _grow(self) -> None:
        old = self.tensor
        grown = old.new_zeros(max(_FIRST_SLOTS, 2 * len(old)), old.shape[1])
        grown[: len(old)] = old
        self._free += range(len(grown) - 1, len(old) - 1, -1)
        self.tensor = grown

"""Which sequence of a batch has which row of marks or biases on the device."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from workers.sampling.ops.row_params import NO_SLOT
from workers.sampling.state import SamplingState

S = TypeVar("S")


class _Rows(Protocol):
    """`TokenMarks` or `TokenBias`."""

    def claim(self, states: Sequence[SamplingState]) -> list[int]: ...

    def release(self, slot: int) -> None: ...


class Slots(Generic[S]):
    """The rows that sequences hold while they are in the batch.

    Args:
        rows: whose slots they are.
    """

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        self._held: dict[S, int] = {}

    def keep(self, batch: Collection[S]) -> None:
        """Take them back from who is not in the batch: it comes back, if at all, with all tokens known."""
        if self._held:
            here = set(batch)
            for sequence in [sequence for sequence in self._held if sequence not in here]:
                self._rows.release(self._held.pop(sequence))

    def claim(self, wanting: Iterable[tuple[S, SamplingState]]) -> None:
        """Give one to each of these that has none."""
        new = [(sequence, state) for sequence, state in wanting if sequence not in self._held]
        if new:
            slots = self._rows.claim([state for _, state in new])
            self._held.update((sequence, slot) for (sequence, _), slot in zip(new, slots, strict=True))

    def of(self, sequence: S) -> int:
        """Its slot; `NO_SLOT` if it has none."""
        return self._held.get(sequence, NO_SLOT)

"""The decode batch as the device holds it: one row a sequence, kept from step to step.

A step reads and advances the rows on the device: its tokens become the next step's input there. The host sends only
what the device cannot know: rows of sequences that join, new blocks of those that grow, and which blocks lie behind a
window: these are out of a row before they can become another sequence's, because kernels load more than they see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

import torch

from attention.kv_cache import KVCacheSpec
from workers.host_copies import to_device
from workers.kv_cache.block_pool import blocks_for
from workers.kv_cache.tables import NULL_BLOCK, SequenceTables
from workers.kv_cache.windows import first_needed_block
from workers.ops.decode_input_types import PADDING_LEN, DecodeInputs
from workers.ops.decode_inputs import decode_inputs, decode_slots


class Decoding(Protocol):
    """A sequence, as a decode step sees it. It is told apart from others by identity."""

    tables: SequenceTables
    """Its block tables, with a block for the token that is computed next.

    They grow in place: another object is other tables."""

    @property
    def num_scheduled(self) -> int:
        """Its tokens, with those in flight: the keys that the next token attends to."""
        ...

    @property
    def last_token(self) -> int | None:
        """The last of them; None while it is in flight."""
        ...


S = TypeVar("S", bound=Decoding)


@dataclass
class _Row(Generic[S]):
    """A sequence in its row.

    Attributes:
        sequence: whose it is.
        tables: its block tables, the very object.
        num_slots: tokens for which the device has its blocks.
        num_sent: of each group, how many places of its table the device has.
        starts: of each group, the first place that is not null there.
    """

    sequence: S
    tables: SequenceTables
    num_slots: int
    num_sent: list[int]
    starts: list[int]


@dataclass
class _Updates:
    """What the device is to be told, as (place, value) pairs; `moves` are pairs of rows."""

    moves: list[tuple[int, int]] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)
    state: list[tuple[int, int]] = field(default_factory=list)


class DecodeRows(Generic[S]):
    """Rows 0 to n - 1 are the batch; all others are padding, which a step may compute and nobody looks at.

    Attributes:
        tokens: (max_num_seqs,) int64, the token of each row that is computed next; -1 where none could be chosen.
        seq_lens: (max_num_seqs,) int32, tokens of each row with that one.
        block_tables: for each cache group (max_num_seqs, blocks of the longest sequence) int32.

    Args:
        max_num_seqs: rows.
        max_model_len: tokens of the longest sequence.
        groups: the model's cache groups.
        device: of the tensors.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, groups: Sequence[KVCacheSpec], device: torch.device
    ) -> None:
        self.tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        sizes = [max_num_seqs, *(max_num_seqs * blocks_for(max_model_len, group.block_size) for group in groups)]
        self._state = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        lens, *tables = self._state.split(sizes)
        self.seq_lens = lens.fill_(PADDING_LEN)
        self.block_tables = tuple(table.view(max_num_seqs, -1) for table in tables)
        self._begins = list(accumulate(sizes))[:-1]
        self._groups = tuple(groups)
        self._windows = [(i, group.window, group.block_size) for i, group in enumerate(groups) if group.window]
        self._rows: list[_Row[S]] = []

    def arrange(self, sequences: Sequence[S]) -> list[S]:
        """Make the rows those of `sequences`, in an order of their own, which is returned.

        A sequence that was in the last step's batch keeps its row or is moved to a lower one, with its token, which
        only the device may know.

        Raises:
            RuntimeError: a sequence joins while its last token is in flight in a row that is gone.
        """
        updates = _Updates()
        wanted = set(sequences)
        stays = [row.sequence in wanted and row.tables is row.sequence.tables for row in self._rows]
        if not all(stays) or len(stays) < len(sequences):
            self._place(sequences, stays, updates)
        if self._windows:
            self._move_windows(updates)
        for place, row in enumerate(self._rows):
            if row.tables.num_slots > row.num_slots:
                self._send_blocks(place, row, updates)
        self._send(updates)
        return [row.sequence for row in self._rows]

    def inputs(self, num_rows: int) -> DecodeInputs:
        """Queue what the first rows compute next, and count it in their lengths."""
        return decode_inputs(
            self.tokens[:num_rows],
            self.seq_lens[:num_rows],
            self.block_tables[0][:num_rows],
            self._groups[0].block_size,
        )

    def slot_mappings(self, inputs: DecodeInputs) -> list[torch.Tensor]:
        """For each cache group, (n,) int64, where the n tokens of `inputs` are stored."""
        lens = inputs.seq_lens
        others = zip(self.block_tables[1:], self._groups[1:], strict=True)
        return [
            inputs.slot_mapping,
            *(decode_slots(lens, tables[: len(lens)], group.block_size) for tables, group in others),
        ]

    def _place(self, sequences: Sequence[S], stays: list[bool], updates: _Updates) -> None:
        """Fill the rows of those who have left: with the last rows, then with those who join."""
        count = len(sequences)
        here = {row.sequence for row, kept in zip(self._rows, stays, strict=True) if kept}
        joining = iter([sequence for sequence in sequences if sequence not in here])
        movers = iter([place for place in range(count, len(self._rows)) if stays[place]])
        for place in range(count, len(self._rows)):
            updates.state.append((place, PADDING_LEN))
        rows: list[_Row[S]] = []
        for place in range(count):
            if place < len(self._rows) and stays[place]:
                rows.append(self._rows[place])
                continue
            source = next(movers, None)
            sequence = next(joining) if source is None else self._rows[source].sequence
            none = [0] * len(self._groups)
            rows.append(_Row(sequence, sequence.tables, 0, none, none.copy()))
            updates.state.append((place, sequence.num_scheduled))
            if source is not None:
                updates.moves.append((source, place))
            elif sequence.last_token is None:
                raise RuntimeError("a sequence whose last token is in flight left the batch and came back")
            else:
                updates.tokens.append((place, sequence.last_token))
        self._rows = rows

    def _send_blocks(self, place: int, row: _Row[S], updates: _Updates) -> None:
        """The places of its tables that the device does not have."""
        for group, table in enumerate(row.tables.groups):
            begin = self._begins[group] + place * self.block_tables[group].shape[1]
            first = max(row.num_sent[group], row.starts[group])
            updates.state += enumerate(table.blocks[first:], begin + first)
            row.num_sent[group] = len(table.blocks)
        row.num_slots = row.tables.num_slots

    def _move_windows(self, updates: _Updates) -> None:
        """Take out of the tables what the next query of a row does not see."""
        for place, row in enumerate(self._rows):
            position = row.sequence.num_scheduled - 1
            for group, window, block_size in self._windows:
                if (start := first_needed_block(position, window, block_size)) > row.starts[group]:
                    begin = self._begins[group] + place * self.block_tables[group].shape[1]
                    updates.state += [(begin + i, NULL_BLOCK) for i in range(row.starts[group], start)]
                    row.starts[group] = start

    @torch.inference_mode()
    def _send(self, updates: _Updates) -> None:
        """One copy to the device, and there up to three scatters."""
        parts = (updates.moves, updates.tokens, updates.state)
        if not any(parts):
            return
        packed = torch.tensor([pair for part in parts for pair in part]).t().contiguous()
        moves, tokens, state = to_device(packed, self.tokens.device).split([len(part) for part in parts], dim=1)
        if updates.moves:
            self.tokens.index_copy_(0, moves[1], self.tokens[moves[0]])
        if updates.tokens:
            self.tokens.index_copy_(0, tokens[0], tokens[1])
        if updates.state:
            self._state.index_copy_(0, state[0], state[1].int())

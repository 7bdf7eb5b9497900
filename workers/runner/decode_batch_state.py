"""The decode batch as the device holds it: one row a sequence, kept from step to step.

A step reads and advances the rows on the device: its tokens become the next step's input there. The host sends only
what the device cannot know: rows of sequences that join, and new blocks of those that grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from workers.host_copies import to_device
from workers.ops.decode_input_types import PADDING_LEN, DecodeInputs
from workers.ops.decode_inputs import decode_inputs


class Decoding(Protocol):
    """A sequence, as a decode step sees it. It is told apart from others by identity."""

    blocks: list[int]
    """Its block table, with a block for the token that is computed next.

    It grows in place: another list is another table."""

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
        blocks: its block table, the very list.
        num_sent: how many of them the device has.
    """

    sequence: S
    blocks: list[int]
    num_sent: int


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
        block_tables: (max_num_seqs, max_blocks) int32.

    Args:
        max_num_seqs: rows.
        max_blocks: blocks that the longest sequence has.
        block_size: tokens in a block.
        device: of the tensors.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._state = torch.zeros(max_num_seqs * (1 + max_blocks), dtype=torch.int32, device=device)
        self.seq_lens = self._state[:max_num_seqs].fill_(PADDING_LEN)
        self.block_tables = self._state[max_num_seqs:].view(max_num_seqs, max_blocks)
        self._block_size = block_size
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
        stays = [row.sequence in wanted and row.blocks is row.sequence.blocks for row in self._rows]
        if not all(stays) or len(stays) < len(sequences):
            self._place(sequences, stays, updates)
        for place, row in enumerate(self._rows):
            if len(row.blocks) > row.num_sent:
                self._send_blocks(place, row, updates)
        self._send(updates)
        return [row.sequence for row in self._rows]

    def inputs(self, num_rows: int) -> DecodeInputs:
        """Queue what the first rows compute next, and count it in their lengths."""
        return decode_inputs(
            self.tokens[:num_rows], self.seq_lens[:num_rows], self.block_tables[:num_rows], self._block_size
        )

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
            rows.append(_Row(sequence, sequence.blocks, 0))
            updates.state.append((place, sequence.num_scheduled))
            if source is not None:
                updates.moves.append((source, place))
            elif sequence.last_token is None:
                raise RuntimeError("a sequence whose last token is in flight left the batch and came back")
            else:
                updates.tokens.append((place, sequence.last_token))
        self._rows = rows

    def _send_blocks(self, place: int, row: _Row[S], updates: _Updates) -> None:
        begin = self.seq_lens.shape[0] + place * self.block_tables.shape[1]
        updates.state += enumerate(row.blocks[row.num_sent :], begin + row.num_sent)
        row.num_sent = len(row.blocks)

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

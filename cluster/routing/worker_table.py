"""The workers of one pool as columns, a row each, so that a request is weighed against all of them at once."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from workers.block_manager import blocks_for
from workers.capability import Capability

PROMPT_LENGTHS = tuple(2**n for n in range(4, 21))
"""Prompt lengths, tokens, at which each worker's prefill time is kept; between two of them it is a line."""

_FIRST_ROWS = 8


@dataclass(frozen=True)
class WorkerTraits:
    """What does not change while a worker lives.

    Attributes:
        engine_id: its name.
        max_model_len: context window, tokens.
        block_size: tokens in a KV block.
        total_blocks: of its cache.
        max_num_seqs: sequences that it takes at once.
        capability: measured costs.
    """

    engine_id: str
    max_model_len: int
    block_size: int
    total_blocks: int
    max_num_seqs: int
    capability: Capability = field(default_factory=Capability)


class WorkerTable:
    """Rows 0 to `len(table) - 1` are the workers, in no order; a row moves when another one is removed.

    Columns, as arrays of that length: `ready`, `max_model_len`, `block_size`, `total_blocks`, `free_blocks`,
    `free_slots`, `running` (requests), `queued_s` (predicted seconds of the prompts that it has to compute first) and
    `step_s` (predicted seconds of a decode step with one sequence more).
    """

    def __init__(self) -> None:
        self._traits: list[WorkerTraits] = []
        self._rows: dict[str, int] = {}
        self._columns = np.zeros(_FIRST_ROWS, dtype=_COLUMNS)

    def __len__(self) -> int:
        return len(self._traits)

    def __contains__(self, engine_id: str) -> bool:
        return engine_id in self._rows

    @property
    def engine_ids(self) -> list[str]:
        """Who is in which row."""
        return [traits.engine_id for traits in self._traits]

    def row(self, engine_id: str) -> int | None:
        """The row of a worker; None if it is not here."""
        return self._rows.get(engine_id)

    def column(self, name: str) -> npt.NDArray[Any]:
        """One column; see the class."""
        return self._columns[name][: len(self._traits)]

    def prefill_seconds(self, num_tokens: int) -> npt.NDArray[np.float64]:
        """How long each worker needs for a prompt of so many tokens."""
        right = min(max(1, bisect_right(PROMPT_LENGTHS, num_tokens)), len(PROMPT_LENGTHS) - 1)
        low, high = PROMPT_LENGTHS[right - 1], PROMPT_LENGTHS[right]
        share = max(0.0, (num_tokens - low) / (high - low))
        curve = self.column("prefill_s")
        seconds: npt.NDArray[np.float64] = curve[:, right - 1] * (1.0 - share) + curve[:, right] * share
        return seconds

    def prefill_seconds_of(self, engine_id: str, num_tokens: int) -> float:
        """The same of one worker."""
        return float(self.prefill_seconds(num_tokens)[self._rows[engine_id]])

    def add(self, traits: WorkerTraits, *, ready: bool = True) -> None:
        """A worker is here, with nothing to do."""
        row = len(self._traits)
        if row == len(self._columns):
            self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)])
        self._traits.append(traits)
        self._rows[traits.engine_id] = row
        self._columns[row] = (
            ready,
            traits.max_model_len,
            traits.block_size,
            traits.total_blocks,
            traits.total_blocks,
            traits.max_num_seqs,
            0,
            0.0,
            traits.capability.decode_seconds(1),
            [traits.capability.prefill_seconds(n) for n in PROMPT_LENGTHS],
        )

    def remove(self, engine_id: str) -> None:
        """A worker is gone."""
        row, last = self._rows.pop(engine_id), len(self._traits) - 1
        moved = self._traits.pop()
        if row != last:
            self._traits[row] = moved
            self._rows[moved.engine_id] = row
            self._columns[row] = self._columns[last]

    def set_ready(self, engine_id: str, ready: bool) -> None:
        """Whether it takes requests."""
        self._columns["ready"][self._rows[engine_id]] = ready

    def blocks(self, engine_id: str, num_tokens: int) -> int:
        """KV blocks of that worker's size for so many tokens and the next one."""
        return blocks_for(num_tokens + 1, self._traits[self._rows[engine_id]].block_size)

    def take(self, engine_id: str, *, blocks: int = 0, requests: int = 0, queued_s: float = 0.0) -> None:
        """A worker has more to do; with negative figures, less."""
        row = self._rows[engine_id]
        columns, traits = self._columns, self._traits[row]
        columns["free_blocks"][row] -= blocks
        if queued_s:
            columns["queued_s"][row] = max(0.0, columns["queued_s"][row] + queued_s)
        if requests:
            columns["free_slots"][row] -= requests
            columns["running"][row] += requests
            columns["step_s"][row] = traits.capability.decode_seconds(int(columns["running"][row]) + 1)


_COLUMNS = np.dtype(
    [
        ("ready", np.bool_),
        ("max_model_len", np.int64),
        ("block_size", np.int64),
        ("total_blocks", np.int64),
        ("free_blocks", np.int64),
        ("free_slots", np.int64),
        ("running", np.int64),
        ("queued_s", np.float64),
        ("step_s", np.float64),
        ("prefill_s", np.float64, (len(PROMPT_LENGTHS),)),
    ]
)

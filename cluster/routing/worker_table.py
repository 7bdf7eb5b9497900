"""The workers of one pool as columns, a row each, so that a request is weighed against all of them at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.routing.output_lengths import HORIZONS, likely_peak
from cluster.routing.prefix_index import PrefixIndex, PromptPrefix
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
        kv_token_bytes: of the KV cache of a token, in all layers and ranks.
        num_layers: that have a cache.
        chunk_tokens: of prompts, that it computes in one step.
    """

    engine_id: str
    max_model_len: int
    block_size: int
    total_blocks: int
    max_num_seqs: int
    capability: Capability = field(default_factory=Capability)
    kv_token_bytes: float = 0.0
    num_layers: int = 1
    chunk_tokens: int = 2048


class WorkerTable:
    """Rows 0 to `len(table) - 1` are the workers, in no order; a row moves when another one is removed.

    Columns, as arrays of that length: `ready`, `max_model_len`, `block_size`, `total_blocks`, `free_blocks`,
    `usable_blocks` (those in quarantine left out), `free_slots`, `running` (requests), `queued_s` (predicted seconds of
    the prompts that it has to compute first), `step_s` (predicted seconds of a decode step with one sequence more, all
    of them short), `kv_token_s` (what each token in the cache adds to it), `kv_token_bytes`, `num_layers`,
    `chunk_tokens` (see `WorkerTraits`), `slot` (a small number that is the worker's for as long as it lives), `future`
    (mean and variance of the tokens that its requests will hold, see `output_lengths`; workers × 2 × spans) and
    `peak_tokens` (the most that they are likely to hold at once).
    """

    def __init__(self) -> None:
        self._traits: list[WorkerTraits] = []
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._columns = np.zeros(_FIRST_ROWS, dtype=_COLUMNS)
        self.prefixes = PrefixIndex()
        """What is in the workers' prefix caches."""

    def __len__(self) -> int:
        return len(self._traits)

    def __contains__(self, engine_id: str) -> bool:
        return engine_id in self._rows

    @property
    def engine_ids(self) -> Sequence[str]:
        """Who is in which row."""
        return self._ids

    def row(self, engine_id: str) -> int | None:
        """The row of a worker; None if it is not here."""
        return self._rows.get(engine_id)

    @property
    def slots(self) -> Mapping[str, int]:
        """Each worker's slot."""
        return self.prefixes.slots

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

    def prefill_seconds_of(self, engine_id: str, num_tokens: int, cached_tokens: int = 0) -> float:
        """How long one worker needs for a prompt of which so many tokens are cached."""
        row = self._rows[engine_id]
        cached = np.zeros(len(self), dtype=np.int64)
        cached[row] = cached_tokens
        return float(self.missing_seconds(num_tokens, cached)[row])

    def local_seconds_of(self, engine_id: str, num_tokens: int, cached_tokens: int = 0) -> float:
        """The same for a decode worker, which takes a step of its batch with each chunk."""
        row = self._rows[engine_id]
        chunks = -(-(num_tokens - cached_tokens) // self._traits[row].chunk_tokens)
        steps_s = chunks * float(self._columns["step_s"][row]) if self._columns["running"][row] else 0.0
        return self.prefill_seconds_of(engine_id, num_tokens, cached_tokens) + steps_s

    def cached_tokens(self, prefix: PromptPrefix) -> npt.NDArray[np.int64]:
        """How many of a prompt's first tokens each worker has in its prefix cache."""
        slots: npt.NDArray[np.int64] = self.column("slot")
        return self.prefixes.cached_tokens(prefix)[slots]

    def missing_seconds(self, num_tokens: int, cached: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """How long each worker needs for a prompt of which it has so many tokens.

        What it saves is the time of a prompt of the cached tokens, but the rest takes no less than a prompt of its own
        length: it attends to all tokens before it, and has to be launched.

        Args:
            num_tokens: of the prompt.
            cached: of it, for each worker; fewer than `num_tokens`.
        """
        seconds = self.prefill_seconds(num_tokens)
        rows = np.flatnonzero(cached)
        if len(rows):
            saved, alone = _on_curves(
                self.column("prefill_s"), rows, np.stack([cached[rows], num_tokens - cached[rows]])
            )
            seconds[rows] = np.maximum(seconds[rows] - saved, alone)
        return seconds

    def add(self, traits: WorkerTraits, *, ready: bool = True) -> None:
        """A worker is here, with nothing to do."""
        row = len(self._traits)
        if row == len(self._columns):
            self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)])
        self._traits.append(traits)
        self._ids.append(traits.engine_id)
        self._rows[traits.engine_id] = row
        self._columns[row] = (
            ready,
            traits.max_model_len,
            traits.block_size,
            traits.total_blocks,
            traits.total_blocks,
            traits.total_blocks,
            traits.max_num_seqs,
            0,
            0.0,
            traits.capability.decode_seconds(1),
            traits.capability.kv_token_s,
            traits.kv_token_bytes,
            traits.num_layers,
            traits.chunk_tokens,
            [traits.capability.prefill_seconds(n) for n in PROMPT_LENGTHS],
            self.prefixes.add(traits.engine_id, traits.block_size),
            0.0,
            0.0,
        )

    def remove(self, engine_id: str) -> None:
        """A worker is gone."""
        self.prefixes.remove(engine_id)
        row, last = self._rows.pop(engine_id), len(self._traits) - 1
        moved = self._traits.pop()
        self._ids.pop()
        if row != last:
            self._traits[row] = moved
            self._ids[row] = moved.engine_id
            self._rows[moved.engine_id] = row
            self._columns[row] = self._columns[last]

    def set_ready(self, engine_id: str, ready: bool) -> None:
        """Whether it takes requests."""
        self._columns["ready"][self._rows[engine_id]] = ready

    def block_size(self, engine_id: str) -> int:
        """Tokens in a KV block of that worker."""
        return self._traits[self._rows[engine_id]].block_size

    def blocks(self, engine_id: str, num_tokens: int) -> int:
        """KV blocks of that worker's size for so many tokens and the next one."""
        return blocks_for(num_tokens + 1, self._traits[self._rows[engine_id]].block_size)

    def expect(self, engine_id: str, change: npt.NDArray[np.float64]) -> None:
        """A worker's requests will hold more, or less, than was thought; (2, spans)."""
        row = self._rows[engine_id]
        future = self._columns["future"][row]
        future += change
        self._columns["peak_tokens"][row] = likely_peak(future)

    def quarantine(self, engine_id: str, blocks: int) -> None:
        """So many blocks of a worker cannot be used at present; with a negative figure, they can again."""
        row = self._rows[engine_id]
        self._columns["usable_blocks"][row] -= blocks
        self._columns["free_blocks"][row] -= blocks

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


_GRID = np.array(PROMPT_LENGTHS)


def _on_curves(
    curves: npt.NDArray[np.float64], rows: npt.NDArray[np.intp], num_tokens: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """As `prefill_seconds`, of a prompt of its own for each of these rows; (..., rows)."""
    right = np.searchsorted(_GRID[1:-1], num_tokens, "right") + 1
    low = _GRID[right - 1]
    share = np.maximum(0.0, (num_tokens - low) / (_GRID[right] - low))
    before = curves[rows, right - 1]
    seconds: npt.NDArray[np.float64] = before + (curves[rows, right] - before) * share
    return seconds


_COLUMNS = np.dtype(
    [
        ("ready", np.bool_),
        ("max_model_len", np.int64),
        ("block_size", np.int64),
        ("total_blocks", np.int64),
        ("usable_blocks", np.int64),
        ("free_blocks", np.int64),
        ("free_slots", np.int64),
        ("running", np.int64),
        ("queued_s", np.float64),
        ("step_s", np.float64),
        ("kv_token_s", np.float64),
        ("kv_token_bytes", np.float64),
        ("num_layers", np.int64),
        ("chunk_tokens", np.int64),
        ("prefill_s", np.float64, (len(PROMPT_LENGTHS),)),
        ("slot", np.int64),
        ("future", np.float64, (2, len(HORIZONS))),
        ("peak_tokens", np.float64),
    ]
)

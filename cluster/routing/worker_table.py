"""The workers of one pool as columns, a row each, so that a request is weighed against all of them at once.

What a request does not change is reckoned when a worker's state changes, not when a request is placed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.routing.prefill_times import PrefillTimes
from cluster.routing.step_time_estimates import StepTimeEstimates
from cluster.routing.worker_state import WorkerState, WorkerTraits
from workers.runner.step_times import StepTimes

__all__ = ["WorkerState", "WorkerTable", "WorkerTraits"]

_FIRST_ROWS = 8
_COLUMNS = (
    "most_tokens", "fit_tokens", "room_tokens", "growth_tokens", "running", "queued_s", "step_s", "busy_step_s",
    "kv_token_s", "kv_layer_bytes", "num_layers", "chunk_tokens",
)  # fmt: skip


class WorkerTable:
    """Rows 0 to `len(table) - 1` are the workers, in no order; a row moves when another one is removed.

    Columns, as arrays of that length (float64): `most_tokens`, `room_tokens`, `growth_tokens`, `running`, `queued_s`
    and `step_s` are those of `WorkerState`, `num_layers` and `chunk_tokens` those of `WorkerTraits`. `fit_tokens` is
    `most_tokens` of those that are ready, 0 of the others; `busy_step_s` what a step of the batch takes where there is
    one; `kv_token_s` what each token in the cache adds to it, `kv_layer_bytes` what it has of memory in each layer.
    Besides (int64), `slot` is a small number that is the worker's for as long as it lives, and `cache` that by which
    its prefix cache goes.
    """

    def __init__(self) -> None:
        self._workers: list[WorkerState] = []
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._columns: dict[str, npt.NDArray[Any]] = {name: np.zeros(_FIRST_ROWS) for name in _COLUMNS}
        for name in ("slot", "cache"):
            self._columns[name] = np.zeros(_FIRST_ROWS, dtype=np.int64)
        self._shown: dict[str, npt.NDArray[Any]] = {}
        self._times = PrefillTimes(_FIRST_ROWS)
        self._estimates = StepTimeEstimates()
        self._slots: dict[str, int] = {}
        self._show()

    def __len__(self) -> int:
        return len(self._workers)

    def __contains__(self, engine_id: str) -> bool:
        return engine_id in self._rows

    @property
    def engine_ids(self) -> Sequence[str]:
        """Who is in which row."""
        return self._ids

    @property
    def workers(self) -> Sequence[WorkerState]:
        """The worker of each row, to look at."""
        return self._workers

    @property
    def slots(self) -> Mapping[str, int]:
        """Each worker's slot."""
        return self._slots

    def row(self, engine_id: str) -> int | None:
        """The row of a worker; None if it is not here."""
        return self._rows.get(engine_id)

    def column(self, name: str) -> npt.NDArray[Any]:
        """One column; see the class."""
        return self._shown[name]

    def prefill_seconds(self, num_tokens: int) -> npt.NDArray[np.float64]:
        """How long each worker needs for a prompt of so many tokens."""
        return self._times.whole(len(self), num_tokens)

    def missing_seconds(self, num_tokens: int, cached: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """How long each worker needs for a prompt of which it has so many tokens; see `PrefillTimes`."""
        return self._times.rest(num_tokens, cached)

    def prefill_seconds_of(self, engine_id: str, num_tokens: int, cached_tokens: int = 0) -> float:
        """How long one worker needs for a prompt of which so many tokens are cached."""
        return self._times.rest_of(self._rows[engine_id], num_tokens, cached_tokens)

    def local_seconds_of(self, engine_id: str, num_tokens: int, cached_tokens: int = 0) -> float:
        """The same for a decode worker, which takes a step of its batch with each chunk."""
        row = self._rows[engine_id]
        chunks = -(-(num_tokens - cached_tokens) // self._workers[row].traits.chunk_tokens)
        return self._times.rest_of(row, num_tokens, cached_tokens) + chunks * float(self._columns["busy_step_s"][row])

    def cached_tokens(self, cached: npt.NDArray[np.float64] | None) -> npt.NDArray[np.float64]:
        """Each worker's of these tokens, which are by `cache`; none, if they are None."""
        return np.zeros(len(self)) if cached is None else cached[self._shown["cache"]]

    def add(self, traits: WorkerTraits, *, ready: bool = True, cache: int = 0) -> None:
        """A worker is here, with nothing to do; `cache` is the number by which its prefix cache goes."""
        row = len(self._workers)
        if row == len(self._columns["slot"]):
            self._columns = {name: np.concatenate([column, column]) for name, column in self._columns.items()}
            self._times.grow(2 * row)
        taken = set(self._slots.values())
        self._slots[traits.engine_id] = next(slot for slot in itertools.count() if slot not in taken)
        self._ids.append(traits.engine_id)
        self._rows[traits.engine_id] = row
        self._workers.append(WorkerState(traits, ready))
        self._columns["cache"][row] = cache
        self._times.put(row, traits.step_times)
        self._seat(row)
        self._show()
        self._measure(self._estimates.add(traits.engine_id, traits.kind or traits.engine_id, traits.step_times))

    def remove(self, engine_id: str) -> None:
        """A worker is gone."""
        row, last = self._rows.pop(engine_id), len(self._workers) - 1
        del self._slots[engine_id]
        moved = self._workers.pop()
        self._ids.pop()
        if row != last:
            self._workers[row], self._ids[row] = moved, moved.traits.engine_id
            self._rows[moved.traits.engine_id] = row
            self._columns["cache"][row] = self._columns["cache"][last]
            self._times.move(last, row)
            self._seat(row)
        self._show()
        self._measure(self._estimates.remove(engine_id))

    def set_ready(self, engine_id: str, ready: bool) -> None:
        """Whether it takes requests."""
        row = self._rows[engine_id]
        self._workers[row].ready = ready
        self._note(row)

    def pace(self, engine_id: str, prefill: float, decode: float) -> None:
        """A worker says how its steps compare with what it has measured; see `StepTimeEstimates`."""
        self._measure(self._estimates.hear(engine_id, prefill, decode))

    def blocks(self, engine_id: str, num_tokens: int, num_samples: int = 1, shared_tokens: int = 0) -> int:
        """KV blocks of that worker's size for so many tokens and the next one; see `WorkerState.blocks`."""
        return self._workers[self._rows[engine_id]].blocks(num_tokens, num_samples, shared_tokens)

    def traits(self, engine_id: str) -> WorkerTraits:
        """What does not change of that worker."""
        return self._workers[self._rows[engine_id]].traits

    def quarantine(self, engine_id: str, blocks: int) -> None:
        """So many blocks of a worker cannot be used at present; with a negative figure, they can again."""
        row = self._rows[engine_id]
        self._workers[row].quarantine(blocks)
        self._note(row)

    def take(
        self,
        engine_id: str,
        *,
        blocks: int = 0,
        requests: int = 0,
        queued_s: float = 0.0,
        future: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """A worker has more to do; with negative figures, less. Of `future`, see `WorkerState`."""
        row = self._rows[engine_id]
        self._workers[row].take(blocks, requests, queued_s, future)
        self._note(row)

    def _measure(self, news: Mapping[str, StepTimes]) -> None:
        """The steps of these workers take so long from now on."""
        for engine_id, step_times in news.items():
            row = self._rows[engine_id]
            self._workers[row].measure(step_times)
            self._times.put(row, step_times)
            self._columns["kv_token_s"][row] = step_times.kv_token_s
            self._note(row)

    def _seat(self, row: int) -> None:
        """Write the columns of a worker that is new in this row."""
        worker, columns = self._workers[row], self._columns
        traits = worker.traits
        columns["slot"][row] = self._slots[traits.engine_id]
        columns["most_tokens"][row] = worker.most_tokens
        columns["kv_token_s"][row] = traits.step_times.kv_token_s
        columns["kv_layer_bytes"][row] = traits.kv_token_bytes / traits.num_layers
        columns["num_layers"][row] = traits.num_layers
        columns["chunk_tokens"][row] = traits.chunk_tokens
        self._note(row)

    def _note(self, row: int) -> None:
        """Write the columns that follow a worker's state."""
        worker, columns = self._workers[row], self._columns
        columns["fit_tokens"][row] = worker.most_tokens if worker.ready else 0
        columns["room_tokens"][row] = worker.room_tokens
        columns["growth_tokens"][row] = worker.growth_tokens
        columns["running"][row] = worker.running
        columns["queued_s"][row] = worker.queued_s
        columns["step_s"][row] = worker.step_s
        columns["busy_step_s"][row] = worker.short_step_s if worker.running else 0.0

    def _show(self) -> None:
        """What is seen of the columns: as many rows as there are workers."""
        self._shown = {name: column[: len(self._workers)] for name, column in self._columns.items()}

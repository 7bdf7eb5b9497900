"""A decode pool at a rate: M/G/∞ up to the batch's limit.

By Little's law a batch holds rate × tokens × step time sequences, and a step's time grows with the sequences and their
KV cache: both are found together. How many run at a moment is Poisson distributed, whatever the lengths, and a request
meets its objective when a step with that many does. One that finds every place taken counts as late.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.planning.bisection import highest
from cluster.planning.queueing import erlang_c, poisson_at_most
from cluster.planning.terms import DecodeWorker, Objective, Workload


@dataclass(frozen=True)
class DecodeState:
    """The decode pool at a rate.

    Attributes:
        busy: sequences as a share of all places.
        batch: sequences of a worker, on average.
        itl_s: step time at that batch; infinite past saturation.
        met: share of requests that meet the objective.
    """

    busy: float
    batch: float
    itl_s: float
    met: float


def decode_state(
    worker: DecodeWorker, workers: int, workload: Workload, objective: Objective, rate: float
) -> DecodeState:
    """A pool of so many workers at `rate` requests a second."""
    places = places_of(worker, workload)
    if workload.steps <= 0 or rate <= 0:
        return DecodeState(
            0.0, 0.0, worker.step_seconds(1.0, workload.context), _met_by(worker, workload, objective, 0)
        )
    per_second = rate / workers
    if per_second >= ended_per_second(worker, workload):
        return DecodeState(1.0, places, math.inf, 0.0)
    batch = highest(lambda n: n <= per_second * workload.steps * step_s(worker, workload, n), places)
    late = erlang_c(int(places) * workers, batch * workers)
    met = _met_by(worker, workload, objective, batch) * (1.0 - late)
    return DecodeState(batch / places, batch, step_s(worker, workload, batch), met)


def _met_by(worker: DecodeWorker, workload: Workload, objective: Objective, batch: float) -> float:
    """The share of requests for which a step is quick enough, given the mean number of others."""
    quick = highest(lambda n: step_s(worker, workload, n) <= objective.itl_s, places_of(worker, workload) + 1.0)
    return poisson_at_most(quick - 1.0, batch)


def step_s(worker: DecodeWorker, workload: Workload, batch: float) -> float:
    """Time of a step with so many of the workload's sequences."""
    return worker.step_seconds(max(batch, 1.0), max(batch, 1.0) * workload.context)


def places_of(worker: DecodeWorker, workload: Workload) -> float:
    """Sequences that a worker has room for: places in its batch, or their caches when they are whole."""
    whole = workload.prompt.mean + workload.output.mean
    return max(1.0, min(float(worker.max_num_seqs), worker.kv_tokens / whole))


def ended_per_second(worker: DecodeWorker, workload: Workload) -> float:
    """Requests that a worker with every place taken ends in a second."""
    if workload.steps <= 0:
        return math.inf
    places = places_of(worker, workload)
    return places / (workload.steps * step_s(worker, workload, places))

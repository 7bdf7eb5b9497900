"""Workers that compute prompts and decode, at a rate: what the same GPUs would do without disaggregation.

A worker gives prompts the time that they take, and decode steps the rest: a step that takes t then ends every
t / (1 - share of the prompts). A prompt waits for those before it, and for half a step.
"""

from __future__ import annotations

import math

from cluster.planning.bisection import highest
from cluster.planning.decode_pool import DecodeState, places_of, step_s
from cluster.planning.prefill_pool import PrefillState, ttft_quantile, variation_of
from cluster.planning.queueing import erlang_c, poisson_at_most, wait_of
from cluster.planning.terms import Fleet, Objective, Workload


def mixed_per_second(fleet: Fleet, workload: Workload) -> float:
    """Requests that a worker with every place taken ends in a second."""
    places = places_of(fleet.decode, workload)
    step = step_s(fleet.decode, workload, places)
    return 1.0 / (_prompt_s(fleet, workload) + workload.steps * step / places)


def mixed_state(
    fleet: Fleet, workers: int, workload: Workload, objective: Objective, rate: float
) -> tuple[PrefillState, DecodeState]:
    """So many workers at `rate` requests a second: what becomes of prompts, and of answers."""
    per_second = rate / workers
    places, prompts = places_of(fleet.decode, workload), min(1.0, per_second * _prompt_s(fleet, workload))
    if per_second >= mixed_per_second(fleet, workload):
        return PrefillState(prompts, 1.0, math.inf, math.inf, 0.0), DecodeState(1.0, places, math.inf, 0.0)
    left = 1.0 - prompts

    def interval_s(batch: float) -> float:
        return step_s(fleet.decode, workload, batch) / left

    batch = highest(lambda n: n <= per_second * workload.steps * interval_s(n), places)
    quick = highest(lambda n: interval_s(n) <= objective.itl_s, places + 1.0)
    late = erlang_c(int(places) * workers, batch * workers)
    met = poisson_at_most(quick - 1.0, batch) * (1.0 - late)
    decode = DecodeState(batch / places, batch, interval_s(batch), met)
    return _prompts_state(fleet, workers, workload, objective, rate, interval_s(batch) if batch else 0.0), decode


def _prompts_state(
    fleet: Fleet, workers: int, workload: Workload, objective: Objective, rate: float, interval: float
) -> PrefillState:
    prompt_s = _prompt_s(fleet, workload)
    wait = wait_of(workers, rate, prompt_s, variation_of(fleet.prefill, workload.prompt))
    if wait is None:
        return PrefillState(1.0, 1.0, math.inf, math.inf, 0.0)
    before_s = fleet.overhead_s + interval / 2.0
    fixed = [before_s + fleet.prefill.seconds(tokens) for tokens in workload.prompt.values]
    met = sum(wait.within(objective.ttft_s - seconds) for seconds in fixed) / len(fixed)
    mean_s = wait.mean_s + sum(fixed) / len(fixed)
    return PrefillState(rate * prompt_s / workers, 1.0, mean_s, ttft_quantile(wait, fixed, objective.share), met)


def _prompt_s(fleet: Fleet, workload: Workload) -> float:
    return sum(map(fleet.prefill.seconds, workload.prompt.values)) / len(workload.prompt.values)

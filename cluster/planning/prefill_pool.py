"""A prefill pool at a rate: M/G/c, whose service time is the measured time of a prompt.

Where several prompts fit in a step, those that wait are computed together: then each costs its share of a full step,
and takes the whole of a step of as many as come during one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.planning.bisection import HALVINGS
from cluster.planning.queueing import Wait, wait_of
from cluster.planning.terms import Fleet, Lengths, Objective, PrefillWorker, Workload


@dataclass(frozen=True)
class PrefillState:
    """The prefill pool at a rate.

    Attributes:
        busy: share of the pool's time.
        at_once: prompts that are computed together.
        ttft_mean_s: seconds.
        ttft_s: that the share of the objective stays within; infinite past saturation.
        met: share of requests that meet the objective.
    """

    busy: float
    at_once: float
    ttft_mean_s: float
    ttft_s: float
    met: float


def prefill_state(fleet: Fleet, workers: int, workload: Workload, objective: Objective, rate: float) -> PrefillState:
    """A pool of so many workers at `rate` requests a second."""
    worker, mean_tokens = fleet.prefill, workload.prompt.mean
    cost_s = prompt_cost_s(worker, workload)
    wait = wait_of(workers, rate, cost_s, variation_of(worker, workload.prompt))
    if wait is None:
        return PrefillState(1.0, _most_at_once(worker, workload.prompt), math.inf, math.inf, 0.0)
    at_once = _at_once(worker, workload.prompt, rate / workers)
    others = (at_once - 1.0) * mean_tokens
    before_s = fleet.overhead_s + _rest_of_step_s(worker, workload.prompt, rate / workers, at_once)
    fixed = [before_s + worker.seconds(round(tokens + others)) for tokens in workload.prompt.values]
    met = sum(wait.within(objective.ttft_s - seconds) for seconds in fixed) / len(fixed)
    mean_s = wait.mean_s + sum(fixed) / len(fixed)
    return PrefillState(rate * cost_s / workers, at_once, mean_s, ttft_quantile(wait, fixed, objective.share), met)


def ttft_quantile(wait: Wait, fixed: Sequence[float], share: float) -> float:
    """What `share` of requests stay within, whose time without the wait is one of `fixed`, each as likely."""
    low, high = min(fixed), max(fixed) + wait.quantile(share)
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        enough = sum(wait.within(middle - seconds) for seconds in fixed) >= share * len(fixed)
        low, high = (low, middle) if enough else (middle, high)
    return high


def _most_at_once(worker: PrefillWorker, prompt: Lengths) -> int:
    fitting = max(1, int(worker.max_num_batched_tokens / prompt.mean))
    return min(fitting, worker.max_num_seqs) if worker.max_num_seqs else fitting


def prompt_cost_s(worker: PrefillWorker, workload: Workload) -> float:
    """A worker's time for a prompt when prompts wait: its share of a full step, where that is less than by itself."""
    prompt = workload.prompt
    most = _most_at_once(worker, prompt)
    alone = sum(map(worker.seconds, prompt.values)) / len(prompt.values)
    return min(alone, worker.seconds(round(most * prompt.mean)) / most) if most > 1 else alone


def variation_of(worker: PrefillWorker, prompt: Lengths) -> float:
    """Variance over mean squared of the time of a prompt."""
    seconds = [worker.seconds(tokens) for tokens in prompt.values]
    mean = sum(seconds) / len(seconds)
    return sum((value - mean) ** 2 for value in seconds) / len(seconds) / mean**2


def _at_once(worker: PrefillWorker, prompt: Lengths, per_second: float) -> float:
    """Prompts of a step: as many as come during one; at least 1, at most as many as fit."""
    most = _most_at_once(worker, prompt)
    if most == 1:
        return 1.0
    low, high = 1.0, float(most)
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        come = per_second * worker.seconds(round(middle * prompt.mean))
        low, high = (middle, high) if come > middle else (low, middle)
    return low


def _rest_of_step_s(worker: PrefillWorker, prompt: Lengths, per_second: float, at_once: float) -> float:
    """What is left of the step that runs when a prompt comes; with one prompt a step, that is part of the wait."""
    if _most_at_once(worker, prompt) == 1:
        return 0.0
    step_s = worker.seconds(round(at_once * prompt.mean))
    return min(1.0, per_second * step_s / at_once) * step_s / 2.0

"""How many prefill and decode workers serve most: every split of a number of GPUs, by what workers have measured.

Numbers in, numbers out. As in DistServe (arXiv:2401.09670), a split is judged by its goodput: the highest rate of
Poisson arrivals at which a share of requests meets its objectives for the time to the first token and between tokens.
DistServe simulates; here each pool is a queue with a formula, so that every split is weighed in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.planning.bisection import highest
from cluster.planning.decode_pool import DecodeState, decode_state, ended_per_second
from cluster.planning.mixed_pool import mixed_per_second, mixed_state
from cluster.planning.prefill_pool import PrefillState, prefill_state, prompt_cost_s
from cluster.planning.terms import Fleet, Objective, Split, Workload
from workers.errors import InvalidRequestError


@dataclass(frozen=True)
class Outlook:
    """A split at a rate: what requests would see."""

    rate: float
    prefill: PrefillState
    decode: DecodeState

    @property
    def met(self) -> float:
        """Share of requests that meet both objectives."""
        return self.prefill.met * self.decode.met


@dataclass(frozen=True)
class Plan:
    """What a split can do.

    Attributes:
        split: workers of each pool.
        saturated_per_s: the rate past which queues grow without end.
        saturates: the pool that does first, "prefill" or "decode".
        goodput_per_s: the highest rate at which enough requests meet their objectives; 0: not even one alone does.
        bound_by: the pool whose objective ends it.
        at: what requests see at the rate asked for, or else at that of the goodput.
    """

    split: Split
    saturated_per_s: float
    saturates: str
    goodput_per_s: float
    bound_by: str
    at: Outlook


def splits_of(num_gpus: int, prefill_gpus: int = 1, decode_gpus: int = 1) -> list[Split]:
    """Every way to give all GPUs to both pools, given what a worker of each takes.

    Raises:
        InvalidRequestError: they do not suffice for one worker of each.
    """
    if min(prefill_gpus, decode_gpus) < 1 or num_gpus < prefill_gpus + decode_gpus:
        raise InvalidRequestError(
            f"{num_gpus} GPUs, of which a prefill worker takes {prefill_gpus} and a decode worker {decode_gpus}: "
            "there must be one worker of each"
        )
    most = (num_gpus - decode_gpus) // prefill_gpus
    return [Split(number, (num_gpus - number * prefill_gpus) // decode_gpus) for number in range(1, most + 1)]


def plan_split(fleet: Fleet, split: Split, workload: Workload, objective: Objective, rate: float | None = None) -> Plan:
    """What one split can do; see `Plan`. `rate` in requests a second; None: that of the goodput."""
    limits = {"decode": split.decode * mixed_per_second(fleet, workload)}
    if split.prefill:
        limits = {
            "prefill": split.prefill / prompt_cost_s(fleet.prefill, workload),
            "decode": split.decode * ended_per_second(fleet.decode, workload),
        }
    saturates = min(limits, key=lambda pool: limits[pool])

    def at(per_second: float) -> Outlook:
        return outlook(fleet, split, workload, objective, per_second)

    good = highest(lambda per_second: at(per_second).met >= objective.share, limits[saturates])
    past = at(good * (1.0 + 1e-6) if good else limits[saturates] * 1e-6)
    bound_by = "prefill" if past.prefill.met < past.decode.met else "decode"
    return Plan(split, limits[saturates], saturates, good, bound_by, at(good if rate is None else rate))


def recommend(plans: Sequence[Plan]) -> Plan:
    """The split with the highest goodput; of equals the one whose first tokens come sooner."""
    return max(plans, key=lambda plan: (plan.goodput_per_s, -plan.at.prefill.ttft_mean_s))


def outlook(fleet: Fleet, split: Split, workload: Workload, objective: Objective, rate: float) -> Outlook:
    """What requests would see at `rate` a second."""
    if not split.prefill:
        return Outlook(rate, *mixed_state(fleet, split.decode, workload, objective, rate))
    prefill = prefill_state(fleet, split.prefill, workload, objective, rate)
    return Outlook(rate, prefill, decode_state(fleet.decode, split.decode, workload, objective, rate))

"""A placement is the one that the formula chooses, written out for every pair and every decode worker alone."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest

from cluster.routing.arrival_rate import ArrivalRate
from cluster.routing.load_tracker import LoadTracker
from cluster.routing.output_lengths import OutputLengths
from cluster.routing.prefill_times import PROMPT_LENGTHS
from cluster.routing.prefix_index import PromptPrefix
from cluster.routing.types import Incompatibility, NoPlacement, Placement, RoutingRequest
from cluster.routing.worker_table import WorkerTraits
from kv_transfer.link_cost import LinkCost
from workers.block_hashes import block_hashes
from workers.messages import CacheUpdate
from workers.runner.step_times import StepTimes

TOLERANCE = 0.01
"""By which a pair may be more expensive than the cheapest."""
PROMPT = tuple(range(4000))


def random_link(rng: random.Random) -> LinkCost:
    return LinkCost(rng.uniform(0, 0.3), 0.0, 10 ** rng.uniform(5, 10))


@dataclass
class Load:
    """What a worker has to do, followed without the books; `requests`: those that decode there, and their tokens."""

    traits: WorkerTraits
    stored_tokens: int
    requests: dict[str, int]
    queued_s: float = 0.0

    def prefill_s(self, num_tokens: int) -> float:
        step_times = self.traits.step_times
        low = max((n for n in PROMPT_LENGTHS if n <= num_tokens), default=PROMPT_LENGTHS[0])
        share = max(0.0, num_tokens / low - 1.0)
        before, after = step_times.prefill_seconds(low), step_times.prefill_seconds(2 * low)
        return before * (1.0 - share) + after * share

    def cached(self, num_tokens: int) -> int:
        block_size = self.traits.block_size
        return min(self.stored_tokens // block_size, (num_tokens - 1) // block_size) * block_size

    def missing_s(self, num_tokens: int, cached: int) -> float:
        whole = self.prefill_s(num_tokens)
        return max(whole - self.prefill_s(cached), self.prefill_s(num_tokens - cached)) if cached else whole

    def steps_s(self, num_tokens: int, max_tokens: int, held: float) -> float:
        steps, step_times = min(max_tokens, 64), self.traits.step_times
        kv_tokens = held + num_tokens + steps / 2
        return steps * step_times.decode_seconds(len(self.requests) + 1, kv_tokens)


class Plain:
    """LoadTracker, and what is in them; every worker is of hardware of its own."""

    def __init__(self, rng: random.Random, disaggregation: str) -> None:
        self.rng, self.max_queued_s = rng, rng.choice([math.inf, 2.0])
        self.arrivals = ArrivalRate(lambda: 0.0)
        self.load_tracker = LoadTracker(
            disaggregation=disaggregation, max_queued_s=self.max_queued_s, clock=lambda: 0.0
        )
        self.prefill, self.decode = (self.pool(role, rng.choice([1, 3, 30])) for role in "pd")
        links = {
            p: {d: LinkCost(rng.uniform(0, 0.3), 0.0, 10 ** rng.uniform(5, 10)) for d in self.decode}
            for p in self.prefill
        }
        self.links = links if rng.random() < 0.8 else {}
        unlike = [(p, d) for p in self.prefill for d in self.decode if rng.random() < 0.1]
        self.incompatibilities = (
            dict.fromkeys(unlike, Incompatibility("unlike", forever=True)) if rng.random() < 0.5 else {}
        )
        pools = [{load.traits: True for load in pool.values()} for pool in (self.prefill, self.decode)]
        self.load_tracker.update_pools(*pools, self.incompatibilities, self.links)
        for name, load in (self.prefill | self.decode).items():
            stored = block_hashes(PROMPT[: load.stored_tokens], load.traits.block_size)
            self.load_tracker.cache_update(name, CacheUpdate(stored, ()))

    def pool(self, role: str, count: int) -> dict[str, Load]:
        made = {}
        for i in range(count):
            speed = self.rng.uniform(0.5, 2.0)
            step_times = StepTimes(
                ((16, 0.02 * speed), (256, 0.05 * speed), (4096, 1.6 * speed)),
                ((1, 0.01 * speed), (16, 0.02 * speed)),
                self.rng.choice([0.0, 1e-6]) * speed,
            )
            traits = WorkerTraits(
                f"{role}-{i}", self.rng.choice([3000, 8000]), self.rng.choice([16, 48]), 400,
                self.rng.randint(2, 9), step_times, 1000.0, self.rng.randint(1, 9), self.rng.choice([256, 2048]),
            )  # fmt: skip
            made[traits.engine_id] = Load(traits, self.rng.choice([0, 0, 500, 4000]), {})
        return made

    def reserve(self, name: str, placement: Placement, num_tokens: int) -> None:
        """It is under way: its prompt is still to be computed."""
        self.arrivals.count()
        self.load_tracker.reserve(name, placement.prefill, placement.decode, num_tokens, 1, placement.cached_tokens)
        decode, cached = self.decode[placement.decode], placement.cached_tokens
        worker = decode if placement.prefill is None else self.prefill[placement.prefill]
        seconds = worker.missing_s(num_tokens, cached)
        if worker is decode and decode.requests:
            chunks = math.ceil((num_tokens - cached) / decode.traits.chunk_tokens)
            seconds += chunks * decode.traits.step_times.decode_seconds(len(decode.requests) + 1)
        worker.queued_s += seconds
        decode.requests[name] = num_tokens

    def costs(self, num_tokens: int, max_tokens: int, known: bool, modes: str) -> dict:
        """Of everybody who can take it, by (prefill, decode) or (None, decode); `known`: caches are asked for it."""
        found = {}
        arrivals_per_s = self.arrivals.per_s()
        peak = OutputLengths().outlook(max_tokens).peak(num_tokens)
        for d, decode in self.decode.items():
            if not self.has_room(decode, num_tokens, peak):
                continue
            held = float(self.load_tracker.decode_workers.workers[self.load_tracker.decode_workers.row(d)].future[0, 1])
            steps_s, cached = decode.steps_s(num_tokens, max_tokens, held), decode.cached(num_tokens) * known
            compute_s, busy_s = decode.missing_s(num_tokens, cached), 0.0
            if decode.requests:
                step_s = decode.traits.step_times.decode_seconds(len(decode.requests) + 1)
                busy_s = math.ceil((num_tokens - cached) / decode.traits.chunk_tokens) * step_s
            held_up = len(decode.requests) + 0.5 * compute_s * arrivals_per_s / len(self.decode)
            if modes != "always" and decode.queued_s <= self.max_queued_s:
                found[None, d] = decode.queued_s + compute_s + busy_s + held_up * compute_s + steps_s
            for p, prefill in self.prefill.items() if modes != "never" else ():
                traits = prefill.traits
                longest = min(traits.max_model_len, traits.total_blocks * traits.block_size)
                if (
                    num_tokens < longest
                    and prefill.queued_s <= self.max_queued_s
                    and (p, d) not in self.incompatibilities
                ):
                    own_s = prefill.missing_s(num_tokens, prefill.cached(num_tokens) * known)
                    ttft_s = prefill.queued_s + own_s
                    handoff_s = self.handoff_s(p, d, num_tokens - cached, own_s) if max_tokens > 1 else 0.0
                    found[p, d] = ttft_s + handoff_s + max(0.0, decode.queued_s - ttft_s) + steps_s
        return found

    def has_room(self, decode: Load, num_tokens: int, peak: float) -> bool:
        traits, needed = decode.traits, num_tokens + 1
        blocks = sum(-(-(tokens + 1) // traits.block_size) for tokens in decode.requests.values())
        free = (traits.total_blocks - blocks) * traits.block_size
        row = self.load_tracker.decode_workers.row(traits.engine_id)
        peaks = self.load_tracker.decode_workers.workers[row].peak_tokens + peak
        return (
            needed <= min(traits.max_model_len, free)
            and len(decode.requests) < traits.max_num_seqs
            and (not decode.requests or peaks <= traits.total_blocks * traits.block_size)
        )

    def handoff_s(self, p: str, d: str, missing: int, compute_s: float) -> float:
        if not self.links:
            return 0.0
        traits, link = self.decode[d].traits, self.links[p][d]
        moving_s = missing * traits.kv_token_bytes / link.bytes_per_s
        return link.write_s + max(moving_s - compute_s, moving_s / traits.num_layers)


@pytest.mark.parametrize("disaggregation", ["always", "auto", "never"])
@pytest.mark.parametrize("seed", range(12))
def test_the_placement_is_as_cheap_as_the_cheapest_of_all(seed, disaggregation):
    rng = random.Random(seed)
    plain, chosen = Plain(rng, disaggregation), 0
    for number in range(40):
        num_tokens, max_tokens = rng.randint(1, 3500), rng.choice([1, 10, 100])
        prefix = PromptPrefix(PROMPT[:num_tokens]) if rng.random() < 0.7 else None
        costs = plain.costs(num_tokens, max_tokens, prefix is not None, disaggregation)
        placement = plain.load_tracker.place(RoutingRequest(num_tokens, max_tokens, prefix=prefix))
        if isinstance(placement, NoPlacement):
            assert not costs
        else:
            best, cost = min(costs.values()), costs[placement.prefill, placement.decode]
            assert cost <= best / (1.0 - TOLERANCE) + 1e-6
            chosen += 1
            plain.reserve(f"r-{number}", placement, num_tokens)
    assert chosen


@pytest.mark.parametrize("seed", range(10))
def test_where_pairs_do_not_differ_it_is_the_cheapest_itself(seed):
    plain = Plain(random.Random(seed), "always")
    pools = [{load.traits: True for load in pool.values()} for pool in (plain.prefill, plain.decode)]
    plain.load_tracker, plain.links, plain.incompatibilities = LoadTracker(), {}, {}
    plain.load_tracker.update_pools(*pools, {})
    costs = plain.costs(1000, 64, False, "always")
    placement = plain.load_tracker.place(RoutingRequest(1000, 64))
    assert isinstance(placement, Placement)
    assert costs[placement.prefill, placement.decode] == pytest.approx(min(costs.values()), rel=1e-9)

"""How long the router takes to choose workers for a request: books kept, pools of many workers, one core.

Every request is placed, booked, followed through its first token and its growth, and released, while thousands of
others are under way, so that the decisions are those of a loaded service. Nothing is sent anywhere. Each case knows
more than the one before: the link between every two workers, that prompts may be computed where they are decoded, and
what both pools have in their prefix caches.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.environment import RESULTS, Environment
from benchmarks.report import to_json, write_json
from cluster.routing.load_tracker import LoadTracker
from cluster.routing.prefix_index import PromptPrefix
from cluster.routing.types import Placement, RoutingRequest
from cluster.routing.worker_table import WorkerTraits
from kv_transfer.link_cost import LinkCost
from workers.messages import CacheUpdate
from workers.runner.step_times import StepTimes

_LENGTHS, _BATCHES = (32, 128, 512, 2048), (1, 4, 16, 64)
_BLOCK_SIZE = 64
_FAMILIES, _HOLDERS = 64, 0.1
_KV_TOKEN_BYTES, _NUM_LAYERS = 131_072, 32


@dataclass(frozen=True)
class Case:
    """What the router knows.

    Attributes:
        name: of the case.
        links: what the link between every two workers costs.
        disaggregation: where prompts may be computed.
        prefixes: what is in the caches: most prompts begin like others, whose blocks some workers of each pool hold.
    """

    name: str
    links: bool = False
    disaggregation: str = "always"
    prefixes: bool = False


CASES = (
    Case("load"),
    Case("and links", links=True),
    Case("and both places", links=True, disaggregation="auto"),
    Case("and prefixes", links=True, disaggregation="auto", prefixes=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("router", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100, 1000], metavar="N", help="of each pool")
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="to place in each case")
    parser.add_argument("--under-way", type=int, default=20, metavar="N", help="requests under way per decode worker")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--output", type=Path, default=RESULTS / "router.json", metavar="FILE")
    args = parser.parse_args(argv)
    environment = Environment.capture(1)
    cases = [
        measure(case, workers, args.requests, args.under_way, random.Random(args.seed))
        for workers in args.workers
        for case in CASES
    ]
    for case in cases:
        print(
            f"{case['workers']} + {case['workers']} workers, {case['knows']}: {case['decision_us']:.0f} µs a decision "
            f"(p99 {case['decision_p99_us']:.0f}), {case['requests_per_s']:.0f} requests a second with all books"
        )
    config = {"requests": args.requests, "under_way_per_worker": args.under_way, "seed": args.seed}
    write_json(args.output, to_json("router", environment, config, {"cases": cases}))
    return 0


def measure(case: Case, workers: int, requests: int, under_way: int, rng: random.Random) -> dict[str, Any]:
    """One size of pools; microseconds of a decision, and requests a second with everything that is booked for them."""
    load_tracker = _load_tracker(case, workers, rng)
    make_request = _with_prefixes(load_tracker, workers, rng) if case.prefixes else _plain(rng)
    live: deque[tuple[str, int]] = deque()
    decisions, spent_s = [], 0.0
    for number in range(requests):
        routing_request = make_request()
        if routing_request.prefix is not None:
            routing_request.prefix.prepare(load_tracker.block_sizes)  # the service does it on another thread
        started = time.perf_counter()
        if len(live) >= under_way * workers:
            name, most_tokens = live.popleft()
            load_tracker.grown(name, most_tokens)
            load_tracker.release(name)
        before = time.perf_counter()
        placement = load_tracker.place(routing_request)
        decisions.append(time.perf_counter() - before)
        if isinstance(placement, Placement):
            name = str(number)
            load_tracker.reserve(
                name, placement.prefill, placement.decode, routing_request.prompt_tokens, routing_request.max_tokens,
                placement.cached_tokens,
            )  # fmt: skip
            live.append((name, routing_request.prompt_tokens + routing_request.max_tokens))
        if len(live) > 2 * workers:
            load_tracker.first_token(live[-2 * workers][0])
        spent_s += time.perf_counter() - started
    return {
        "workers": workers,
        "knows": case.name,
        "decision_us": median(decisions) * 1e6,
        "decision_p99_us": quantiles(decisions, n=100)[98] * 1e6,
        "requests_per_s": requests / spent_s,
    }


def _load_tracker(case: Case, workers: int, rng: random.Random) -> LoadTracker:
    load_tracker = LoadTracker(disaggregation=case.disaggregation)
    prefill, decode = (dict.fromkeys((_worker(f"{role}-{i}", rng) for i in range(workers)), True) for role in "pd")
    links = {
        p.engine_id: {
            d.engine_id: LinkCost(rng.uniform(1e-4, 1e-3), 0.0, rng.choice((12e9, 50e9, 300e9))) for d in decode
        }
        for p in prefill
    }
    load_tracker.update_pools(prefill, decode, {}, links if case.links else {})
    return load_tracker


def _link(rng: random.Random) -> LinkCost:
    return LinkCost(rng.uniform(1e-4, 1e-3), 0.0, rng.choice((12e9, 50e9, 300e9)))


def _plain(rng: random.Random) -> Any:
    return lambda: RoutingRequest(rng.randint(64, 8192), rng.randint(16, 512))


def _with_prefixes(load_tracker: LoadTracker, workers: int, rng: random.Random) -> Any:
    """Each pool's workers hold a few families of prompts; of a prompt half is of one of them on average."""
    some = [rng.randrange(1 << 17) for _ in range(8192)]
    families = [[number, *some] for number in range(_FAMILIES)]
    for family in families:
        hashes = PromptPrefix([*family, 0]).hashes(_BLOCK_SIZE)
        for role in "pd":
            for i in rng.sample(range(workers), max(1, round(_HOLDERS * workers))):
                load_tracker.cache_update(f"{role}-{i}", CacheUpdate(hashes[: rng.randint(1, len(hashes))], ()))

    def make() -> RoutingRequest:
        length = rng.randint(64, 8192)
        shared = rng.randint(0, length)
        tokens = [*rng.choice(families)[:shared], rng.randrange(1 << 17, 1 << 30), *some][:length]
        return RoutingRequest(length, rng.randint(16, 512), prefix=PromptPrefix(tokens))

    return make


def _worker(name: str, rng: random.Random) -> WorkerTraits:
    """A worker of hardware of its own; about a large GPU with a model of eight billion parameters."""
    speed = rng.uniform(0.5, 2.0)
    prefill = tuple((n, speed * (0.008 + n * 2.2e-5)) for n in _LENGTHS)
    decode = tuple((n, speed * (0.0045 + n * 1.5e-5)) for n in _BATCHES)
    step_times = StepTimes(prefill, decode, speed * _KV_TOKEN_BYTES / 4e12)
    return WorkerTraits(name, 131_072, _BLOCK_SIZE, 8192, 256, step_times, _KV_TOKEN_BYTES, _NUM_LAYERS)


if __name__ == "__main__":
    sys.exit(main())

"""How long the router takes to place a request: books kept, pools of many workers, one core.

Every request is placed, booked, followed through its first token and its growth, and released, while thousands of
others are under way, so that the decisions are those of a loaded service. Nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from benchmarks.environment import RESULTS, Environment
from benchmarks.report import to_json, write_json
from cluster.routing.books import Books
from cluster.routing.router import Demand, Placement
from cluster.routing.worker_table import WorkerTraits
from workers.capability import Capability

_LENGTHS, _BATCHES = (32, 128, 512, 2048), (1, 4, 16, 64)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("router", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100, 1000], metavar="N", help="of each pool")
    parser.add_argument("--requests", type=int, default=20_000, metavar="N", help="to place in each case")
    parser.add_argument("--under-way", type=int, default=20, metavar="N", help="requests under way per decode worker")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--output", type=Path, default=RESULTS / "router.json", metavar="FILE")
    args = parser.parse_args(argv)
    environment = Environment.capture(1)
    cases = [measure(n, args.requests, args.under_way, random.Random(args.seed)) for n in args.workers]
    for case in cases:
        print(
            f"{case['workers']} + {case['workers']} workers: {case['decision_us']:.0f} µs a decision "
            f"(p99 {case['decision_p99_us']:.0f}), {case['requests_per_s']:.0f} requests a second with all books"
        )
    config = {"requests": args.requests, "under_way_per_worker": args.under_way, "seed": args.seed}
    write_json(args.output, to_json("router", environment, config, {"cases": cases}))
    return 0


def measure(workers: int, requests: int, under_way: int, rng: random.Random) -> dict[str, float]:
    """One size of pools; microseconds of a decision, and requests a second with everything that is booked for them."""
    books = Books()
    prefill, decode = (dict.fromkeys((_worker(f"{role}-{i}", rng) for i in range(workers)), True) for role in "pd")
    books.update_pools(prefill, decode, {})
    demands = [Demand(rng.randint(64, 8192), rng.randint(16, 512)) for _ in range(requests)]
    live: deque[tuple[str, Demand]] = deque()
    decisions = []
    started = time.perf_counter()
    for number, demand in enumerate(demands):
        if len(live) >= under_way * workers:
            name, old = live.popleft()
            books.grown(name, old.prompt_tokens + old.max_tokens)
            books.release(name)
        before = time.perf_counter()
        placement = books.place(demand)
        decisions.append(time.perf_counter() - before)
        if isinstance(placement, Placement):
            name = str(number)
            books.book(name, placement.prefill, placement.decode, demand.prompt_tokens)
            live.append((name, demand))
        if len(live) > 2 * workers:
            books.first_token(live[-2 * workers][0])
    seconds = time.perf_counter() - started
    return {
        "workers": workers,
        "decision_us": median(decisions) * 1e6,
        "decision_p99_us": quantiles(decisions, n=100)[98] * 1e6,
        "requests_per_s": requests / seconds,
    }


def _worker(name: str, rng: random.Random) -> WorkerTraits:
    """A worker of hardware of its own; about a large GPU with a model of eight billion parameters."""
    speed = rng.uniform(0.5, 2.0)
    prefill = tuple((n, speed * (0.008 + n * 2.2e-5)) for n in _LENGTHS)
    decode = tuple((n, speed * (0.0045 + n * 1.5e-5)) for n in _BATCHES)
    return WorkerTraits(name, 131_072, 64, 8192, 256, Capability(prefill, decode))


if __name__ == "__main__":
    sys.exit(main())

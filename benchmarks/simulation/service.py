"""Runs a trace through the real engine, its pools, queue and router, over simulated workers in simulated time."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from benchmarks.simulation.content import ContentPrefix, prompt_of
from benchmarks.simulation.trace import Arrival
from benchmarks.simulation.virtual_time import run_simulated
from benchmarks.simulation.workers import Fabric, Hardware, SimulatedWorker
from cluster.api import EngineRequest
from cluster.clock import now
from cluster.gateway.engine import WORKERS_SHARE_OF_WAIT, ServingEngine
from cluster.routing.load_tracker import LoadTracker
from cluster.routing.router import Choose
from workers.errors import BatonError
from workers.sampling_params import SamplingParams


@dataclass
class Outcome:
    """What became of a trace.

    Attributes:
        ttft_s: of each request that succeeded.
        itl_s: of each, its mean time between tokens.
        ended_s: when each of them ended, seconds after the first could come.
        failures: by the error's name.
        killed: workers that were killed.
        scaled: times that the pools were given other targets.
        preempted: times that a sequence had to leave a decode worker's cache for a while.
        succeeded: requests; the lists have the times of those that `Plan.keep_one_in` lets keep.
        seconds: simulated.
    """

    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    ended_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    killed: int = 0
    scaled: int = 0
    preempted: int = 0
    succeeded: int = 0
    seconds: float = 0.0

    def good(self, ttft_s: float, itl_s: float) -> int:
        """Requests that succeeded within both limits."""
        return sum(ttft <= ttft_s and itl <= itl_s for ttft, itl in zip(self.ttft_s, self.itl_s, strict=True))


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        prefill: the hardware of each prefill worker.
        decode: the hardware of each decode worker.
        kill_every_s: mean time between kills of a worker; None: none.
        scale_every_s: mean time between new targets for the pools, between half of all places and all; None: none.
        timeout_s: each request's deadline.
        max_queue: requests that may wait.
        max_queue_wait_s: how long.
        disaggregation: where prompts may be computed.
        keep_one_in: of how many requests the times of one are kept.
        seed: of the kills and the targets.
    """

    prefill: Sequence[Hardware]
    decode: Sequence[Hardware]
    kill_every_s: float | None = None
    scale_every_s: float | None = None
    timeout_s: float = 600.0
    max_queue: int = 100_000
    max_queue_wait_s: float = math.inf
    disaggregation: str = "always"
    keep_one_in: int = 1
    seed: int = 0


def simulate(plan: Plan, trace: Iterable[Arrival], choose: Choose) -> Outcome:
    """Run it to its end; the same arguments give the same outcome."""
    return run_simulated(_Run(plan, choose).run(trace))


class _Run:
    def __init__(self, plan: Plan, choose: Choose) -> None:
        self._plan = plan
        self._choose = choose
        self._fabric: Fabric = {}
        self._all_workers: list[SimulatedWorker] = []
        self._outcome = Outcome()
        self._started = 0.0

    async def run(self, trace: Iterable[Arrival]) -> Outcome:
        engine = ServingEngine(
            self._places("prefill", self._plan.prefill),
            self._places("decode", self._plan.decode),
            max_queue=self._plan.max_queue,
            max_queue_wait_s=self._plan.max_queue_wait_s,
            load_tracker=LoadTracker(
                self._choose,
                self._plan.max_queue_wait_s * WORKERS_SHARE_OF_WAIT,
                self._plan.disaggregation,
                now,
            ),
        )
        await engine.start()
        started = self._started = now()
        trouble = [asyncio.ensure_future(self._kill())] if self._plan.kill_every_s else []
        trouble += [asyncio.ensure_future(self._scale(engine))] if self._plan.scale_every_s else []
        requests: set[asyncio.Task[None]] = set()
        for number, arrival in enumerate(trace):
            await asyncio.sleep(started + arrival.at_s - now())
            task = asyncio.ensure_future(self._request(engine, number, arrival))
            requests.add(task)
            task.add_done_callback(requests.discard)
        while requests:
            await asyncio.wait(list(requests))
        for task in trouble:
            task.cancel()
        self._outcome.seconds = now() - started
        self._outcome.preempted += sum(worker.num_preempted for worker in self._all_workers)
        await engine.stop()
        return self._outcome

    def _places(self, role: str, pool: Sequence[Hardware]) -> list[partial[SimulatedWorker]]:
        return [partial(self._spawn, f"{role}-{number}", role, hardware) for number, hardware in enumerate(pool)]

    def _spawn(self, name: str, role: str, hardware: Hardware) -> SimulatedWorker:
        worker = SimulatedWorker(name, role, hardware, self._fabric)
        gone = [other for other in self._all_workers if other.gone]
        self._outcome.preempted += sum(other.num_preempted for other in gone)
        self._all_workers = [other for other in self._all_workers if not other.gone] + [worker]
        return worker

    async def _request(self, engine: ServingEngine, number: int, arrival: Arrival) -> None:
        limit = arrival.max_tokens or arrival.output_tokens
        sampling = SamplingParams(max_tokens=limit, seed=arrival.output_tokens)
        prompt = prompt_of(arrival.prompt_tokens, arrival.family, arrival.shared_tokens, number)
        prefix = ContentPrefix(prompt) if arrival.family else None
        request = EngineRequest(
            request_id=str(number),
            prompt_token_ids=prompt,
            sampling=sampling,
            timeout_s=self._plan.timeout_s,
            prefix=prefix,
        )
        due, first, tokens = now(), 0.0, 0
        try:
            async for chunk in engine.generate(request):
                first = first or now()
                tokens += len(chunk.tokens)
        except BatonError as error:
            self._outcome.failures[type(error).__name__] += 1
            return
        if tokens != arrival.output_tokens:
            self._outcome.failures["wrong number of tokens"] += 1
            return
        self._outcome.succeeded += 1
        if self._outcome.succeeded % self._plan.keep_one_in:
            return
        self._outcome.ttft_s.append(first - due)
        self._outcome.ended_s.append(now() - self._started)
        self._outcome.itl_s.append((now() - first) / (tokens - 1))

    async def _kill(self) -> None:
        rng = random.Random(self._plan.seed)
        while True:
            await asyncio.sleep(rng.expovariate(1.0 / (self._plan.kill_every_s or 1.0)))
            alive = [worker for worker in self._all_workers if worker.alive]
            if len(alive) > 1:
                rng.choice(alive).kill()
                self._outcome.killed += 1

    async def _scale(self, engine: ServingEngine) -> None:
        rng = random.Random(self._plan.seed + 1)
        sizes = {"prefill": len(self._plan.prefill), "decode": len(self._plan.decode)}
        while True:
            await asyncio.sleep(rng.expovariate(1.0 / (self._plan.scale_every_s or 1.0)))
            engine.scale({role: rng.randint(-(-size // 2), size) for role, size in sizes.items()})
            self._outcome.scaled += 1

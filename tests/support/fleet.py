"""An engine over workers in this process, and the means to watch and to harm them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from itertools import count

import pytest

from cluster.gateway.engine import ServingEngine
from cluster.inprocess_worker import InProcessWorker
from cluster.pools.groups import Places
from kv_transfer.transports.local import LocalFabric
from made_requests import engine_request
from workers.sampling_params import SamplingParams

PATIENCE_S = 60.0
_numbers = count()


class Fleet:
    """An engine, and the means to watch and to harm its workers."""

    def __init__(self, engine: ServingEngine, fabric: LocalFabric, places: Mapping[str, Places]) -> None:
        self.engine = engine
        self.fabric = fabric
        self.places = places

    def start(self, prompt: list[int], max_tokens: int, *, timeout_s: float = PATIENCE_S, **sampling):
        params = SamplingParams(
            **{"temperature": 0.0, "seed": 0, "max_tokens": max_tokens, "ignore_eos": True, **sampling}
        )
        return self.engine.generate(engine_request(f"client-{next(_numbers)}", prompt, params, timeout_s))

    async def run(self, prompt: list[int], max_tokens: int, **kwargs) -> list[int]:
        return [token async for token in tokens_of(self.start(prompt, max_tokens, **kwargs))]

    def handle(self, name: str) -> InProcessWorker:
        return next(replica.handle for replica in self.engine.pools.replicas if replica.handle.name == name)

    def crash_one_on_submit(self, *names: str) -> None:
        """Of these workers the one that is sent the next request dies with it; the others go on."""
        waiting = [True]

        def crash_or_submit(handle: InProcessWorker, submit, request) -> None:
            if waiting:
                waiting.clear()
                handle.crash("killed by the test")
            else:
                submit(request)

        for handle in map(self.handle, names):
            handle.submit = partial(crash_or_submit, handle, handle.submit)

    def crash_on_submit(self, name: str) -> None:
        """The worker dies with the next request that it is sent."""
        handle = self.handle(name)
        handle.submit = lambda request: handle.crash("killed by the test")

    async def until(self, condition: Callable[[list], bool]) -> None:
        for _ in range(int(PATIENCE_S / 0.005)):
            if condition(self.engine.workers()):
                return
            await asyncio.sleep(0.005)
        pytest.fail(f"waited in vain: {self.engine.workers()}")

    async def until_idle(self) -> None:
        """Every worker is ready and every block free, on both sides; and the engine has forgotten every request."""
        await self.until(
            lambda workers: all(
                w.state == "ready" and w.load.free_blocks == w.load.total_blocks and w.load.waiting == 0
                for w in workers
            )
        )
        assert self.engine.num_attempts == 0
        assert self.engine.num_queued == 0


async def tokens_of(stream) -> AsyncIterator[int]:
    async for chunk in stream:
        for token in chunk.tokens:
            yield token.token_id


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]

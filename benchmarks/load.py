"""When requests are sent: open loop (they arrive whatever the service does) and closed loop (a number at a time)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.measure import Client, Clock, Row, measure_request
from benchmarks.workload import RequestSpec

OnRow = Callable[[Row], None]
"""Told of each request when it has ended."""


@dataclass(frozen=True)
class Limits:
    """When to stop sending; what is under way then is waited for.

    Attributes:
        requests: the most to send; None for no limit.
        duration_s: nothing is sent later than this after the beginning; None for no limit.
        timeout_s: deadline of each request.
    """

    requests: int | None
    duration_s: float | None
    timeout_s: float

    def allows(self, index: int, at_s: float) -> bool:
        """Whether request number `index` may be sent at `at_s`."""
        return (self.requests is None or index < self.requests) and (self.duration_s is None or at_s < self.duration_s)


@dataclass(frozen=True)
class LoadRun:
    """Every request that was sent, in the order of sending, and how long it took until the last one ended.

    Attributes:
        rows: see above.
        duration_s: see above.
        interrupted: the load was given up before its end; rows are those of the requests that had ended.
    """

    rows: tuple[Row, ...]
    duration_s: float
    interrupted: bool = False


def poisson_arrivals(rate: float, seed: int | str) -> Iterator[float]:
    """Seconds after the beginning at which requests arrive, without end: exponential gaps of mean 1 / `rate`."""
    rng = random.Random(f"arrivals/{seed}")
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at


async def open_loop(
    client: Client,
    request: Callable[[int], RequestSpec],
    arrivals: Iterator[float],
    limits: Limits,
    clock: Clock,
    on_row: OnRow = lambda row: None,
) -> LoadRun:
    """Send request after request at the times of `arrivals`, however many are under way.

    Latencies count from the time at which a request was due. So a service that falls behind cannot hide it: neither by
    slowing down what is sent (coordinated omission), nor behind a client that is late itself.
    """
    started = clock.now()
    rows: list[Row] = []

    async def send(spec: RequestSpec, due: float) -> None:
        row = await measure_request(client, spec, clock, started, due, limits.timeout_s)
        rows.append(row)
        on_row(row)

    async with asyncio.TaskGroup() as group:
        for index, due in enumerate(arrivals):
            if not limits.allows(index, due):
                break
            spec = request(index)
            await clock.sleep_until(started + due)
            group.create_task(send(spec, due))
    return _finished(rows, started, clock)


async def closed_loop(
    client: Client,
    request: Callable[[int], RequestSpec],
    concurrency: int,
    limits: Limits,
    clock: Clock,
    on_row: OnRow = lambda row: None,
) -> LoadRun:
    """Keep `concurrency` requests under way: each one that ends makes room for the next.

    The rate follows the service, so latencies here are those of a service that is never asked for more than it gives.
    """
    started = clock.now()
    rows: list[Row] = []
    next_index = iter(range(2**63))

    async def user() -> None:
        for index in next_index:
            due = clock.now() - started
            if not limits.allows(index, due):
                return
            row = await measure_request(client, request(index), clock, started, due, limits.timeout_s)
            rows.append(row)
            on_row(row)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(user())
    return _finished(rows, started, clock)


def _finished(rows: list[Row], started: float, clock: Clock) -> LoadRun:
    return LoadRun(tuple(sorted(rows, key=lambda row: row.index)), clock.now() - started)

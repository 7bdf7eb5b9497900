"""The storms: who asks what, how fast, and who leaves."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from benchmarks.faults.served import Served
from benchmarks.load import poisson_arrivals
from benchmarks.storm_loads.asking import Outcomes, call, call_http, leave, prompt, stream
from benchmarks.storm_loads.state import state, wait_until_idle
from cluster.client.client import AsyncBatonClient, BatonClientError
from workers.sampling_params import SamplingParams

_CLIENTS_AT_SATURATION = 64
_SETTLE_S = 1.0
_MINUTE_S = 60.0
Tell = Callable[[str], None]


async def abort_storm(
    service: Served, client: AsyncBatonClient, tell: Tell, clients: int = 1000, rounds: int = 10
) -> dict[str, Any]:
    """So many clients ask for long texts, and leave at once when most wait and some have tokens; again and again."""
    outcomes, idle_s, held = Outcomes(), [], []
    for number in range(rounds):
        rng, leaving = random.Random(number), asyncio.Event()
        tasks = [asyncio.create_task(leave(client, prompt(rng), outcomes, leaving)) for _ in range(clients)]
        await _until_all_are_in(service, clients, tasks)
        leaving.set()
        await asyncio.gather(*tasks)
        idle_s.append(await wait_until_idle(service))
        held.append(_memory(await state(service)))
        tell(f"  {number + 1} of {rounds}: {dict(outcomes.left)}, idle after {idle_s[-1]:.2f} s")
    return {"clients": clients, "rounds": rounds, "idle_s": idle_s, "memory": held, **outcomes.to_json()}


async def _until_all_are_in(service: Served, clients: int, tasks: list[asyncio.Task[None]]) -> None:
    give_up_at = time.monotonic() + _MINUTE_S
    while time.monotonic() < give_up_at:
        books = await service.ask("books")
        if books["queued"] + books["attempts"] + sum(task.done() for task in tasks) >= clients and books["attempts"]:
            return
        await asyncio.sleep(0.05)


async def burst(service: Served, client: AsyncBatonClient, tell: Tell, calls: int = 2000) -> dict[str, Any]:
    """So many unary calls at once."""
    outcomes, rng = Outcomes(), random.Random(1)
    began = time.monotonic()
    await asyncio.gather(*(call(client, prompt(rng), outcomes) for _ in range(calls)))
    took_s = time.monotonic() - began
    tell(f"  {outcomes.right} right in {took_s:.1f} s, {dict(outcomes.failed)}")
    return {"calls": calls, "took_s": took_s, "idle_s": [await wait_until_idle(service)], **outcomes.to_json()}


async def overload(
    service: Served, client: AsyncBatonClient, tell: Tell, seconds: float = 300.0, times: float = 2.0
) -> dict[str, Any]:
    """What saturates it, times two, for five minutes: streams at random times."""
    rate = await saturating_rate(client)
    tell(f"  saturated by {rate:.1f} requests/s")
    outcomes = Outcomes()
    held, sent = await _send(
        service, seconds, times * rate, lambda rng: stream(client, prompt(rng), outcomes), "overload"
    )
    idle_s = await wait_until_idle(service)
    tell(f"  {outcomes.right} right, {dict(outcomes.failed)}")
    return {
        "saturating_per_s": rate,
        "offered_per_s": times * rate,
        "sent": sent,
        "right_per_s": outcomes.right / seconds,
        "memory": held,
        "idle_s": [idle_s],
        **outcomes.to_json(),
    }


async def saturating_rate(client: AsyncBatonClient, seconds: float = 15.0) -> float:
    """Right answers a second where 64 clients ask one question after the other."""
    outcomes, ends_at = Outcomes(), time.monotonic() + seconds

    async def ask(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < ends_at:
            await stream(client, prompt(rng), outcomes)

    await asyncio.gather(*(ask(seed) for seed in range(_CLIENTS_AT_SATURATION)))
    return outcomes.right / seconds


async def soak(
    service: Served, client: AsyncBatonClient, tell: Tell, http_url: str, seconds: float = 1200.0, share: float = 0.6
) -> dict[str, Any]:
    """A part of what saturates it, for 20 minutes: streams, calls by both doors, clients that leave, wrong requests."""
    rate = share * await saturating_rate(client)
    outcomes = Outcomes()

    async def ask(rng: random.Random) -> None:
        kind = rng.random()
        if kind < 0.5:
            await stream(client, prompt(rng), outcomes)
        elif kind < 0.7:
            await call(client, prompt(rng), outcomes)
        elif kind < 0.85:
            await call_http(http_url, prompt(rng), outcomes)
        elif kind < 0.95:
            leaving = asyncio.Event()
            asyncio.get_running_loop().call_later(rng.random(), leaving.set)
            await leave(client, prompt(rng), outcomes, leaving)
        else:
            await _ask_wrongly(client, rng, outcomes)

    held, sent = await _send(service, seconds, rate, ask, "soak", tell)
    idle_s = await wait_until_idle(service)
    return {
        "offered_per_s": rate,
        "sent": sent,
        "memory": held,
        "idle_s": [idle_s],
        **outcomes.to_json(),
    }


async def _ask_wrongly(client: AsyncBatonClient, rng: random.Random, outcomes: Outcomes) -> None:
    """What is refused at the door, each by a user of its own."""
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=8)
        await client.generate_once(token_ids=[10**6], sampling=sampling, user=f"user-{rng.random()}")
    except BatonClientError as error:
        outcomes.fail(error.status.name, str(error))


async def _send(
    service: Served,
    seconds: float,
    rate: float,
    ask: Callable[[random.Random], Awaitable[None]],
    seed: str,
    tell: Tell = lambda line: None,
) -> tuple[list[dict[str, Any]], int]:
    """Have questions asked at random times; what the service held each minute, and how many were sent."""
    rng, began, tasks, held = random.Random(seed), time.monotonic(), set[asyncio.Task[None]](), list[dict[str, Any]]()
    sent = 0

    async def watch() -> None:
        async for now in _minutes(began):
            held.append({"at_s": round(now), **_memory(await state(service))})
            tell(f"  {now:.0f} s: {held[-1]}")

    watching = asyncio.create_task(watch())
    for at in poisson_arrivals(rate, seed):
        if at >= seconds:
            break
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        task = asyncio.create_task(_await(ask(random.Random(rng.random()))))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        sent += 1
    await asyncio.gather(*tasks)
    watching.cancel()
    return held, sent


async def _await(asked: Awaitable[None]) -> None:
    await asked


async def _minutes(began: float) -> AsyncIterator[float]:
    while True:
        await asyncio.sleep(_MINUTE_S - (time.monotonic() - began) % _MINUTE_S)
        yield time.monotonic() - began


def _memory(held: Mapping[str, Any]) -> dict[str, Any]:
    """Megabytes (10^6 bytes) and descriptors of each process."""
    return {
        name: [round(process["rss"] / 1e6, 1), process["descriptors"]] for name, process in held["processes"].items()
    }

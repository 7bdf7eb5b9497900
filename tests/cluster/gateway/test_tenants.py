"""Tenants take turns first, and their users inside them; no tenant takes the queue from another."""

from __future__ import annotations

import asyncio

import pytest

from admission_rooms import Rooms, settle
from cluster.errors import QueueFullError
from cluster.gateway.admission import AdmissionQueue, Ticket
from cluster.gateway.fairness import MAX_REMEMBERED, MAX_USERS, TokenCounters


async def queue_up(queue: AdmissionQueue[str], rooms: Rooms, tickets: list[Ticket]) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(queue.admit(rooms.attempt(f"{t.tenant}/{t.user}"), t)) for t in tickets]
    await settle()
    return tasks


async def served(queue: AdmissionQueue[str], rooms: Rooms, count: int) -> list[str]:
    for _ in range(count):
        rooms.free += 1
        queue.retry()
        await settle()
    return [name.partition("/")[0] for name in rooms.order]


def of(tenant: str, user: str = "", share: float = 1.0, priority: int = 0) -> Ticket:
    return Ticket(priority, user, 10, tenant=tenant, share=share)


async def test_ever_new_users_take_from_nobody_but_their_tenant() -> None:
    queue, rooms = AdmissionQueue(100), Rooms()
    tickets = [of("many", f"new-{i}") for i in range(20)] + [of("one", "same") for _ in range(5)]
    tasks = await queue_up(queue, rooms, tickets)
    assert (await served(queue, rooms, 10)).count("one") == 5
    await served(queue, rooms, 15)
    await asyncio.gather(*tasks)


async def test_turns_are_by_share() -> None:
    queue, rooms = AdmissionQueue(100), Rooms()
    tickets = [of("small") for _ in range(20)] + [of("large", share=3.0) for _ in range(20)]
    tasks = await queue_up(queue, rooms, tickets)
    first = await served(queue, rooms, 16)
    assert 11 <= first.count("large") <= 13
    await served(queue, rooms, 24)
    await asyncio.gather(*tasks)


async def test_a_tenant_that_holds_the_queue_makes_place_for_others_and_not_they_for_it() -> None:
    queue, rooms = AdmissionQueue(6), Rooms()
    crowd = await queue_up(queue, rooms, [of("crowd", str(i), priority=-5) for i in range(5)])
    quiet = await queue_up(queue, rooms, [of("quiet")])
    with pytest.raises(QueueFullError):  # however urgent: the places are its own
        await queue.admit(rooms.attempt("x"), of("crowd", priority=-5))
    urgent = await queue_up(queue, rooms, [of("crowd", "boss", priority=-9)])
    assert [task.done() for task in (*crowd, *quiet)] == [False] * 4 + [True, False]
    newcomers = await queue_up(queue, rooms, [of("third"), of("quiet")])
    assert not any(task.done() for task in (*quiet, *newcomers, *urgent))
    assert sum(task.done() for task in crowd) == 3
    with pytest.raises(QueueFullError):  # nobody has more than it would have then
        await queue.admit(rooms.attempt("x"), of("quiet"))
    await served(queue, rooms, 6)
    await asyncio.gather(*crowd, *quiet, *newcomers, *urgent, return_exceptions=True)
    assert len(queue) == 0


async def test_one_that_goes_on_elsewhere_is_turned_away_for_nobody() -> None:
    queue, rooms = AdmissionQueue(1), Rooms()
    again = await queue_up(queue, rooms, [Ticket(tenant="crowd", readmitted=True) for _ in range(3)])
    with pytest.raises(QueueFullError):
        await queue.admit(rooms.attempt("x"), of("quiet"))
    assert not any(task.done() for task in again)
    await served(queue, rooms, 3)
    await asyncio.gather(*again)


def test_counters_of_a_million_users_are_not_kept() -> None:
    counters = TokenCounters()
    for i in range(MAX_REMEMBERED + 1000):
        counters.charge("t", 1.0, f"user-{i}", 5)
        counters.charge("t", 1.0, "busy", 1)
        counters.begin(f"tenant-{i}", 1.0, "u", 1)
    assert counters.of("t", "user-0")[1] == 0.0, "it is forgotten, and starts as a new one"
    assert counters.of("t", "busy")[1] == 2.0 * (MAX_REMEMBERED + 1000)
    assert counters.of("t", f"user-{MAX_REMEMBERED + 999}")[1] == 10.0
    for tenant in range(10):
        for user in range(MAX_REMEMBERED):
            counters.charge(str(tenant), 1.0, str(user), 1)
    assert counters.num_remembered <= MAX_REMEMBERED + MAX_USERS
    assert counters.of("9", "5")[1] == 2.0

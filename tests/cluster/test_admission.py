"""The queue in front of the workers: in order, bounded, and no room is ever lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from cluster.admission import AdmissionQueue
from cluster.errors import QueueFullError


class Rooms:
    """Something with a number of places."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.order: list[str] = []

    def attempt(self, name: str, size: int = 1):
        def take() -> str | None:
            if self.free < size:
                return None
            self.free -= size
            self.order.append(name)
            return name

        return take


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_room_is_given_at_once():
    queue: AdmissionQueue[str] = AdmissionQueue(0)
    assert await queue.admit(Rooms(1).attempt("a")) == "a"
    assert len(queue) == 0


async def test_a_full_queue_turns_away_at_once():
    queue: AdmissionQueue[str] = AdmissionQueue(2)
    rooms = Rooms(0)
    waiting = [asyncio.create_task(queue.admit(rooms.attempt(name))) for name in "ab"]
    await settle()
    with pytest.raises(QueueFullError, match="2 requests are waiting already"):
        await queue.admit(rooms.attempt("c"))
    rooms.free = 2
    queue.retry()
    assert await asyncio.gather(*waiting) == ["a", "b"]


async def test_first_come_first_served_and_a_newcomer_does_not_overtake():
    queue: AdmissionQueue[str] = AdmissionQueue(10)
    rooms = Rooms(1)
    large = asyncio.create_task(queue.admit(rooms.attempt("large", size=3)))
    await settle()
    small = asyncio.create_task(queue.admit(rooms.attempt("small")))
    await settle()
    assert rooms.order == [], "there is room for the small one, but it is not its turn"
    rooms.free = 4
    queue.retry()
    assert await asyncio.gather(large, small) == ["large", "small"]
    assert rooms.order == ["large", "small"]
    assert len(queue) == 0


async def test_when_the_head_gives_up_the_next_one_is_tried():
    queue: AdmissionQueue[str] = AdmissionQueue(10)
    rooms = Rooms(1)
    large = asyncio.create_task(queue.admit(rooms.attempt("large", size=3)))
    await settle()
    small = asyncio.create_task(queue.admit(rooms.attempt("small")))
    await settle()
    large.cancel()
    assert await asyncio.wait_for(small, 5) == "small"


async def test_an_error_ends_the_wait_of_one_alone():
    queue: AdmissionQueue[str] = AdmissionQueue(10)
    rooms = Rooms(0)

    def refuse() -> str | None:
        if rooms.free:
            raise ValueError("hopeless")
        return None

    wrong = asyncio.create_task(queue.admit(refuse))
    await settle()
    right = asyncio.create_task(queue.admit(rooms.attempt("right")))
    await settle()
    rooms.free = 1
    queue.retry()
    with pytest.raises(ValueError, match="hopeless"):
        await wrong
    assert await asyncio.wait_for(right, 5) == "right"


async def test_who_is_cancelled_at_the_very_moment_takes_nothing():
    """Room comes, and before the waiter runs it is cancelled: the room goes to the next one."""
    queue: AdmissionQueue[str] = AdmissionQueue(10)
    rooms = Rooms(0)
    unlucky = asyncio.create_task(queue.admit(rooms.attempt("unlucky")))
    await settle()
    next_one = asyncio.create_task(queue.admit(rooms.attempt("next")))
    await settle()
    rooms.free = 1
    queue.retry()
    unlucky.cancel()
    assert await asyncio.wait_for(next_one, 5) == "next"
    with pytest.raises(asyncio.CancelledError):
        await unlucky
    assert rooms.order == ["next"]


@pytest.mark.parametrize("seed", range(5))
async def test_no_room_is_lost_whatever_is_cancelled_when(seed):
    rng = random.Random(seed)
    queue: AdmissionQueue[str] = AdmissionQueue(1000)
    rooms = Rooms(3)

    async def visit(name: str) -> None:
        await queue.admit(rooms.attempt(name))
        try:
            for _ in range(rng.randint(0, 5)):
                await asyncio.sleep(0)
        finally:
            rooms.free += 1
            queue.retry()

    visits = []
    for i in range(200):
        visits.append(asyncio.create_task(visit(str(i))))
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        if rng.random() < 0.3:
            rng.choice(visits).cancel()
    await asyncio.wait_for(asyncio.gather(*visits, return_exceptions=True), 20)
    assert rooms.free == 3
    assert len(queue) == 0

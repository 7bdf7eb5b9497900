"""The queue in front of the workers: in order, bounded, and no room is ever lost."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from admission_rooms import Rooms, settle
from cluster.errors import QueueFullError
from cluster.gateway.admission import AdmissionQueue, Ticket


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


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def queue_up(queue: AdmissionQueue[str], rooms: Rooms, tickets: list[tuple[str, Ticket]]) -> list[asyncio.Task]:
    waiting = [asyncio.create_task(queue.admit(rooms.attempt(name), ticket)) for name, ticket in tickets]
    await settle()
    return waiting


async def serve_one_by_one(queue: AdmissionQueue[str], rooms: Rooms) -> None:
    while len(queue):
        rooms.free = 1
        queue.retry()
        await settle()


async def test_a_lower_priority_goes_first():
    queue: AdmissionQueue[str] = AdmissionQueue(10)
    rooms = Rooms(0)
    tickets = [("late", Ticket(5)), ("a", Ticket(0)), ("urgent", Ticket(-1)), ("b", Ticket(0))]
    waiting = await queue_up(queue, rooms, tickets)
    await serve_one_by_one(queue, rooms)
    await asyncio.gather(*waiting)
    assert rooms.order == ["urgent", "a", "b", "late"]


async def test_users_take_turns_by_the_tokens_that_they_were_served():
    queue: AdmissionQueue[str] = AdmissionQueue(100)
    rooms = Rooms(0)
    tickets = [(f"many-{i}", Ticket(0, "many", 100)) for i in range(8)]
    tickets += [(f"few-{i}", Ticket(0, "few", 100)) for i in range(2)]
    tickets += [(f"short-{i}", Ticket(0, "short", 50)) for i in range(4)]
    waiting = await queue_up(queue, rooms, tickets)
    await serve_one_by_one(queue, rooms)
    await asyncio.gather(*waiting)
    assert rooms.order[:3] == ["many-0", "few-0", "short-0"]
    assert Counter(name.partition("-")[0] for name in rooms.order[:8]) == {"many": 2, "few": 2, "short": 4}
    assert rooms.order[8:] == [f"many-{i}" for i in range(2, 8)]


async def test_generated_tokens_count_twice_and_idling_saves_nothing():
    queue: AdmissionQueue[str] = AdmissionQueue(100)
    rooms = Rooms(1)
    await queue.admit(rooms.attempt("first"), Ticket(0, "greedy", 10))
    queue.charge("greedy", 200)
    tickets = [("greedy-0", Ticket(0, "greedy", 10))]
    tickets += [(f"new-{i}", Ticket(0, "new", 100)) for i in range(7)]
    waiting = await queue_up(queue, rooms, tickets)
    await serve_one_by_one(queue, rooms)
    await asyncio.gather(*waiting)
    # greedy has had 10 + 2 × 200 tokens; new starts from nothing and is level with it after five prompts
    assert rooms.order.index("greedy-0") == 6
    rooms.free = 1
    await queue.admit(rooms.attempt("idle"), Ticket(0, "new", 1))
    rooms.order.clear()
    tickets = [
        ("idle-0", Ticket(0, "idler", 100)),
        ("idle-1", Ticket(0, "idler", 100)),
        ("new-7", Ticket(0, "new", 100)),
    ]
    waiting = await queue_up(queue, rooms, tickets)
    await serve_one_by_one(queue, rooms)
    await asyncio.gather(*waiting)
    assert rooms.order == ["idle-0", "new-7", "idle-1"]


async def test_an_urgent_one_takes_the_place_of_the_least_urgent():
    queue: AdmissionQueue[str] = AdmissionQueue(3)
    rooms = Rooms(0)
    tickets = [("a", Ticket(1)), ("b", Ticket(2, "x")), ("c", Ticket(2, "x"))]
    waiting = await queue_up(queue, rooms, tickets)
    with pytest.raises(QueueFullError):
        await queue.admit(rooms.attempt("d"), Ticket(2))
    urgent = await queue_up(queue, rooms, [("e", Ticket(0))])
    with pytest.raises(QueueFullError, match="3 requests are waiting already"):
        await waiting[2]
    assert len(queue) == 3
    await serve_one_by_one(queue, rooms)
    assert await asyncio.gather(*urgent, *waiting[:2]) == ["e", "a", "b"]
    assert rooms.order == ["e", "a", "b"]


async def test_who_would_wait_past_the_deadline_is_told_at_once():
    clock = Clock()
    queue: AdmissionQueue[str] = AdmissionQueue(100, clock)
    rooms = Rooms(0)
    waiting = await queue_up(queue, rooms, [(str(i), Ticket()) for i in range(30)])
    for _ in range(10):  # one admission every two seconds
        clock.now += 2.0
        rooms.free = 1
        queue.retry()
        await settle()
    assert queue.expected_wait_s(Ticket()) == pytest.approx(20 * 18 / 10)
    assert queue.expected_wait_s(Ticket(-1)) == 0.0
    assert queue.expected_wait_s(Ticket(0, "another")) == pytest.approx(1.8), "users take turns"
    with pytest.raises(QueueFullError, match="about 36 s to wait, and 30 s to the deadline") as refused:
        await queue.admit(rooms.attempt("x"), Ticket(), patience_s=30.0)
    assert refused.value.retry_after_s == pytest.approx(36.0)
    assert len(queue) == 20
    waiting += [asyncio.create_task(queue.admit(rooms.attempt("y"), Ticket(), patience_s=40.0))]
    await settle()
    await serve_one_by_one(queue, rooms)
    assert (await asyncio.gather(*waiting))[-1] == "y"


@pytest.mark.parametrize("seed", range(5))
async def test_no_room_is_lost_among_priorities_and_users(seed):
    rng = random.Random(seed)
    queue: AdmissionQueue[str] = AdmissionQueue(20)
    rooms = Rooms(3)
    outcomes: Counter[str] = Counter()

    async def visit(name: str) -> None:
        ticket = Ticket(rng.randint(-1, 1), rng.choice("abc"), rng.randint(1, 100))
        try:
            await queue.admit(rooms.attempt(name), ticket)
        except QueueFullError:
            outcomes["refused"] += 1
            return
        outcomes["served"] += 1
        queue.charge(ticket.user, rng.randint(0, 50))
        for _ in range(rng.randint(0, 5)):
            await asyncio.sleep(0)
        rooms.free += 1
        queue.retry()

    visits = []
    for i in range(300):
        visits.append(asyncio.create_task(visit(str(i))))
        if rng.random() < 0.3:
            await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(*visits), 20)
    assert outcomes["served"] + outcomes["refused"] == 300
    assert outcomes["served"] > 20
    assert (rooms.free, len(queue)) == (3, 0)


async def test_nobody_waits_longer_than_is_allowed():
    queue: AdmissionQueue[str] = AdmissionQueue(100, max_wait_s=0.02)
    rooms = Rooms(0)
    waiting = await queue_up(queue, rooms, [("a", Ticket()), ("b", Ticket())])
    with pytest.raises(QueueFullError, match=r"no room within 0\.02 s"):
        await waiting[0]
    with pytest.raises(QueueFullError, match="no room within"):
        await waiting[1]
    assert len(queue) == 0
    rooms.free = 1
    assert await queue.admit(rooms.attempt("c")) == "c"


async def test_who_would_wait_longer_than_is_allowed_is_told_at_once():
    clock = Clock()
    queue: AdmissionQueue[str] = AdmissionQueue(100, clock, max_wait_s=30.0)
    rooms = Rooms(0)
    waiting = await queue_up(queue, rooms, [(str(i), Ticket()) for i in range(30)])
    for _ in range(10):  # one admission every two seconds
        clock.now += 2.0
        rooms.free = 1
        queue.retry()
        await settle()
    with pytest.raises(QueueFullError, match="about 36 s to wait, and 30 s is the most") as refused:
        await queue.admit(rooms.attempt("x"))
    assert refused.value.retry_after_s == pytest.approx(6.0), "then it would wait as long as is allowed"
    await serve_one_by_one(queue, rooms)
    await asyncio.gather(*waiting)


async def test_a_quiet_hour_does_not_slow_the_pace():
    clock = Clock()
    queue: AdmissionQueue[str] = AdmissionQueue(100, clock)
    rooms = Rooms(0)
    for i in range(10):
        (waiting,) = await queue_up(queue, rooms, [(str(i), Ticket())])
        clock.now += 1.0
        rooms.free = 1
        queue.retry()
        await waiting
        clock.now += 3600.0
    waiting = await queue_up(queue, rooms, [("a", Ticket()), ("b", Ticket())])
    assert queue.expected_wait_s(Ticket()) == pytest.approx(2 * 0.9)
    rooms.free = 2
    await serve_one_by_one(queue, rooms)
    await asyncio.gather(*waiting)

"""Leases are renewed by a thread of their own, and follow from what each rank has said."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future

from cluster.ray.lease_keeper import LeaseKeeper


class Rank:
    """Answers at once, unless it is frozen, and remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[float | None] = []
        self.frozen = False
        self.fails = False
        self.asked = threading.Semaphore(0)
        self._under_way: Future[float] | None = None

    def renew(self, said_at: float | None) -> Future[float]:
        if self.fails:
            raise RuntimeError("no such actor")
        self.told.append(said_at)
        future: Future[float] = Future()
        if self.frozen:
            self._under_way = future
        else:
            future.set_result(float(len(self.told)))
        self.asked.release()
        return future

    def thaw(self) -> None:
        self.frozen = False
        self._under_way.set_result(1000.0)

    def wait_for(self, times: int) -> None:
        for _ in range(times):
            assert self.asked.acquire(timeout=20)


async def test_a_loop_that_stands_still_ends_no_lease() -> None:
    keeper, rank = LeaseKeeper(0.01), Rank()
    keeper.keep("rank", rank.renew)
    for _ in range(2):
        await asyncio.sleep(0)
        rank.wait_for(5)  # blocks this loop, and nothing else happens in it
    keeper.release("rank")
    assert rank.told[:4] == [None, 1.0, 2.0, 3.0], "what it said is told back to it, and nothing else"


def test_a_rank_is_told_only_what_it_has_said() -> None:
    keeper, frozen, other = LeaseKeeper(0.01), Rank(), Rank()
    frozen.frozen = True
    keeper.keep("frozen", frozen.renew)
    keeper.keep("other", other.renew)
    other.wait_for(5)
    assert frozen.told == [None], "its answer is waited for, and nobody waits with it"
    frozen.thaw()
    frozen.wait_for(3)
    keeper.release("frozen")
    keeper.release("other")
    assert frozen.told[:3] == [None, 1000.0, 2.0]


def test_who_is_released_is_not_renewed_whatever_is_under_way() -> None:
    keeper, lost, other = LeaseKeeper(0.01), Rank(), Rank()
    lost.frozen = True
    keeper.keep("lost", lost.renew)
    keeper.keep("other", other.renew)
    lost.wait_for(1)
    keeper.release("lost")
    lost.thaw()
    other.wait_for(5)
    keeper.release("other")
    assert lost.told == [None]


def test_one_that_cannot_be_told_is_no_matter_to_the_others_and_the_thread_ends() -> None:
    keeper, gone, other = LeaseKeeper(0.01), Rank(), Rank()
    gone.fails = True
    keeper.keep("gone", gone.renew)
    keeper.keep("other", other.renew)
    other.wait_for(3)
    keeper.release("gone")
    keeper.release("other")
    give_up_at = time.monotonic() + 20
    while any(thread.name == "leases" for thread in threading.enumerate()) and time.monotonic() < give_up_at:
        time.sleep(0.01)
    assert not any(thread.name == "leases" for thread in threading.enumerate())
    keeper.keep("again", other.renew)
    other.wait_for(1)
    keeper.release("again")

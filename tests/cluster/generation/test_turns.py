"""Places that clients take by turns."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import QueueFullError
from cluster.generation.turns import Turns


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def line(turns: Turns, taken: list[str], *clients: str) -> list[asyncio.Task[None]]:
    async def take(client: str) -> None:
        await turns.take(client)
        taken.append(client)

    return [asyncio.create_task(take(client)) for client in clients]


async def test_clients_take_turns_however_much_each_has() -> None:
    turns, taken = Turns(1, "here"), []
    await turns.take("first")
    tasks = line(turns, taken, "a", "a", "a", "b", "c", "b")
    await settle()
    turns.give_back("first")
    for _ in range(6):
        await settle()
        turns.give_back(taken[-1])
    await asyncio.gather(*tasks)
    assert taken == ["a", "b", "c", "a", "b", "a"]


async def test_one_client_leaves_a_place_to_others() -> None:
    turns, taken = Turns(3, "here"), []
    tasks = line(turns, taken, "a", "a", "a", "a")
    await settle()
    assert taken == ["a", "a"]
    await asyncio.wait_for(turns.take("b"), 20)
    turns.give_back("a")
    await settle()
    assert taken == ["a", "a", "a"]
    turns.give_back("b")
    await settle()
    assert taken == ["a", "a", "a"], "it has its share"
    turns.give_back("a")
    await asyncio.gather(*tasks)


async def test_how_many_wait_and_how_long_is_bounded() -> None:
    turns = Turns(1, "for tea", max_waiting=2, max_waiting_bytes=2**21, max_wait_s=0.05)
    await turns.take("a")
    waiting = [asyncio.create_task(turns.take("b", 2**20)) for _ in range(2)]
    await settle()
    with pytest.raises(QueueFullError, match=r"2 requests of 2 MiB wait for tea, at most 2 of 2 MiB may"):
        await turns.take("c")
    for each in waiting:
        with pytest.raises(QueueFullError, match=r"waited 0\.05 s for tea"):
            await each
    with pytest.raises(QueueFullError, match="at most 2 of 2 MiB"):
        await turns.take("c", 2**21 + 1)
    turns.give_back("a")
    await turns.take("c")


async def test_who_leaves_takes_no_place_with_it() -> None:
    turns, taken = Turns(1, "here"), []
    await turns.take("a")
    leaving, staying = line(turns, taken, "b", "c")
    await settle()
    turns.give_back("a")  # b's, and at the same moment b leaves
    leaving.cancel()
    await asyncio.wait({leaving})
    await staying
    assert taken == ["c"]
    turns.give_back("c")
    first, second = line(turns, taken, "d", "e")
    await settle()
    second.cancel()
    await asyncio.wait({second})
    turns.give_back("d")
    await first
    async with turns.turn("f"):
        pass
    async with asyncio.timeout(20), turns.turn("g"):
        pass

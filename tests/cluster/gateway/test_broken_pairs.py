"""Connections that break between two workers which both live: the pair is met anew, and nobody waits at it."""

from __future__ import annotations

import asyncio

import pytest

from fleet import Fleet, prompt


def engine_ids(fleet: Fleet) -> tuple[list[str], list[str]]:
    ids = [worker.engine_id for worker in fleet.engine.workers()]
    return [name for name in ids if name.startswith("prefill")], [name for name in ids if name.startswith("decode")]


async def test_a_broken_pair_is_met_anew_and_serves_again(make_fleet, expected):
    fleet = await make_fleet()
    assert await fleet.run(prompt(40), 8) == expected(prompt(40), 8)
    for turn in range(2):
        (prefill,), (decode,) = engine_ids(fleet)
        fleet.fabric.reset(prefill, decode)
        answers = await asyncio.gather(*(fleet.run(prompt(40, seed=i), 8) for i in range(4)))
        assert answers == [expected(prompt(40, seed=i), 8) for i in range(4)], turn
    assert engine_ids(fleet) == ([prefill], [decode]), "neither was replaced"
    await fleet.until_idle()


@pytest.mark.usefixtures("like_workers")
async def test_the_idle_broken_pair_does_not_take_everybodys_attempts(make_fleet, expected):
    fleet = await make_fleet(2, 2)
    prefill, decode = engine_ids(fleet)
    for p, d in zip(prefill, decode, strict=True):
        fleet.fabric.reset(p, d)
    streams = [fleet.start(prompt(40, seed=i), 8) for i in range(12)]

    async def consume(stream):
        tokens = [token.token_id async for chunk in stream for token in chunk.tokens]
        return tokens, (await stream.report()).attempts

    answers = await asyncio.gather(*(consume(stream) for stream in streams))
    assert [tokens for tokens, _ in answers] == [expected(prompt(40, seed=i), 8) for i in range(12)]
    assert engine_ids(fleet) == (prefill, decode)
    await fleet.until_idle()

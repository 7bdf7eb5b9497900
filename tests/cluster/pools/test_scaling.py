"""Pools that grow and shrink while requests are served."""

from __future__ import annotations

import asyncio
import random

import pytest

from cluster.pools.groups import PoolLimits
from fleet import Fleet, prompt, tokens_of
from long_tails import slow_unless
from workers.errors import InvalidRequestError


def sizes(prefill: int, decode: int, drain_timeout_s: float = 60.0) -> dict[str, PoolLimits]:
    return {
        "prefill": PoolLimits(prefill, drain_timeout_s=drain_timeout_s),
        "decode": PoolLimits(decode, drain_timeout_s=drain_timeout_s),
    }


def states(fleet: Fleet, role: str) -> list[str]:
    return sorted(worker.state for worker in fleet.engine.workers() if worker.role == role)


async def settled(fleet: Fleet, prefill: int, decode: int) -> None:
    await fleet.until(
        lambda _: states(fleet, "prefill") == ["ready"] * prefill and states(fleet, "decode") == ["ready"] * decode
    )


async def test_a_pool_begins_at_its_target_and_grows_to_its_places(make_fleet, expected):
    fleet = await make_fleet(2, 3, limits=sizes(1, 1))
    await settled(fleet, 1, 1)
    targets = fleet.engine.scale({"prefill": 2, "decode": 3})
    assert [(t.role, t.target, t.min_replicas, t.max_replicas) for t in targets] == [
        ("prefill", 2, 1, 2),
        ("decode", 3, 1, 3),
    ]
    assert states(fleet, "decode") == ["ready", "starting", "starting"], "nobody serves before it has met its peers"
    assert fleet.engine.scale({"decode": 3}) == targets
    assert len(states(fleet, "decode")) == 3, "asked twice, done once"
    await settled(fleet, 2, 3)
    assert await fleet.run(prompt(30), 8) == expected(prompt(30), 8)
    await fleet.until_idle()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"decode": 3}, r"decode is 3, it must be in \[1, 2\]"),
        ({"decode": 0}, r"decode is 0, it must be in \[1, 2\]"),
        ({"decode": 2, "prefil": 1}, "there is no pool 'prefil'; the pools are prefill, decode"),
    ],
)
async def test_a_wrong_target_is_refused_and_nothing_changes(targets, message, make_fleet):
    fleet = await make_fleet(1, 2, limits=sizes(1, 1))
    with pytest.raises(InvalidRequestError, match=message):
        fleet.engine.scale(targets)
    assert [target.target for target in fleet.engine.scale({})] == [1, 1]
    await settled(fleet, 1, 1)


@pytest.mark.usefixtures("like_workers")
async def test_whoever_drains_finishes_its_streams_and_gets_no_new_ones(make_fleet, expected):
    fleet = await make_fleet(1, 2)
    streams = [fleet.start(prompt(30, seed=i), 120) for i in range(2)]
    firsts = [[token.token_id for token in (await anext(aiter(stream))).tokens] for stream in streams]
    fleet.engine.scale({"decode": 1})
    assert states(fleet, "decode") == ["draining", "ready"]
    (stays,) = [w.engine_id for w in fleet.engine.workers() if w.role == "decode" and w.state == "ready"]
    newcomer = fleet.start(prompt(20), 5)
    assert [token async for token in tokens_of(newcomer)] == expected(prompt(20), 5)
    assert (await newcomer.report()).decode_worker == stays
    for number, stream in enumerate(streams):
        rest = [token async for token in tokens_of(stream)]
        assert firsts[number] + rest == expected(prompt(30, seed=number), 120)
        assert (await stream.report()).attempts == 1
    await settled(fleet, 1, 1)
    await fleet.until_idle()


@pytest.mark.usefixtures("like_workers")
async def test_whoever_drains_is_taken_back_before_somebody_new(make_fleet):
    fleet = await make_fleet(1, 2)
    before = {worker.engine_id for worker in fleet.engine.workers()}
    streams = [fleet.start(prompt(30, seed=i), 120) for i in range(2)]
    for stream in streams:
        await anext(aiter(stream))
    fleet.engine.scale({"decode": 1})
    fleet.engine.scale({"decode": 2})
    await settled(fleet, 1, 2)
    assert {worker.engine_id for worker in fleet.engine.workers()} == before
    for stream in streams:
        await stream.aclose()
    await fleet.until_idle()


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "presence_penalty": 0.5, "repetition_penalty": 1.2}


@pytest.mark.usefixtures("like_workers")
@pytest.mark.parametrize(
    "sampling",
    slow_unless(lambda asked: asked != SAMPLED, [{}, SAMPLED, {**SAMPLED, "min_tokens": 60, "ignore_eos": False}]),
)
async def test_streams_that_outlast_the_limit_go_on_elsewhere_without_a_seam(sampling, make_fleet):
    fleet = await make_fleet(1, 2, limits=sizes(1, 2, drain_timeout_s=0.0))
    asked = [(prompt(30, seed=i), 80) for i in range(3)]
    whole = [await fleet.run(*one, **sampling) for one in asked]
    streams = [fleet.start(*one, **sampling) for one in asked]
    got = [[token.token_id for token in (await anext(aiter(stream))).tokens] for stream in streams]
    fleet.engine.scale({"decode": 1})
    for tokens, stream in zip(got, streams, strict=True):
        tokens += [token async for token in tokens_of(stream)]
    assert got == whole
    reports = [await stream.report() for stream in streams]
    assert len({report.decode_worker for report in reports}) == 1, "all ended on the worker that stayed"
    assert all(report.attempts == 1 and report.ttft_s > 0 for report in reports)
    await settled(fleet, 1, 1)
    await fleet.until_idle()


@pytest.mark.usefixtures("like_workers")
async def test_a_prefill_worker_leaves_when_nothing_of_its_is_pinned(make_fleet, expected):
    fleet = await make_fleet(2, 1)
    streams = [fleet.start(prompt(400, seed=i), 6) for i in range(6)]
    answers = [asyncio.ensure_future(_all(stream)) for stream in streams]
    await fleet.until(lambda workers: all(w.load.waiting_tokens for w in workers if w.role == "prefill"))
    fleet.engine.scale({"prefill": 1})
    assert states(fleet, "prefill") == ["draining", "ready"]
    assert await asyncio.gather(*answers) == [expected(prompt(400, seed=i), 6) for i in range(6)]
    assert [(await stream.report()).attempts for stream in streams] == [1] * 6
    await settled(fleet, 1, 1)
    await fleet.until_idle()


async def _all(stream) -> list[int]:
    return [token async for token in tokens_of(stream)]


@pytest.mark.parametrize("drain_timeout_s", [0.05, 60.0])
async def test_no_request_fails_because_of_scaling(drain_timeout_s, make_fleet, expected):
    """Pools change their size again and again under load, with and without time to finish."""
    fleet = await make_fleet(3, 3, limits=sizes(1, 1, drain_timeout_s), max_queue=200)
    rng = random.Random(5)
    known = [(prompt(rng.randint(1, 90), seed=i), rng.randint(1, 40)) for i in range(8)]
    answers = [expected(*one) for one in known]

    async def client(number: int) -> None:
        for turn in range(2):
            which = (number + turn) % len(known)
            assert await fleet.run(*known[which]) == answers[which]

    clients = asyncio.gather(*(client(number) for number in range(8)))
    while not clients.done():
        fleet.engine.scale({"prefill": rng.randint(1, 3), "decode": rng.randint(1, 3)})
        await asyncio.sleep(rng.random() * 0.3)
    await clients
    fleet.engine.scale({"prefill": 2, "decode": 1})
    await settled(fleet, 2, 1)
    await fleet.until_idle()


async def test_who_dies_while_it_drains_is_not_replaced(make_fleet):
    fleet = await make_fleet(1, 2)
    stream = fleet.start(prompt(30), 400)
    await anext(aiter(stream))
    busy = (await stream.report()).decode_worker
    idle = next(w.engine_id for w in fleet.engine.workers() if w.role == "decode" and w.engine_id != busy)
    fleet.handle(idle.split(".")[0]).crash("killed by the test")
    await fleet.until(lambda workers: all(worker.engine_id != idle for worker in workers))
    fleet.engine.scale({"decode": 1})
    await settled(fleet, 1, 1)
    assert [w.engine_id for w in fleet.engine.workers() if w.role == "decode"] == [busy]
    await stream.aclose()
    await fleet.until_idle()


@pytest.mark.usefixtures("like_workers")
async def test_who_is_handed_on_goes_before_those_who_wait_and_is_never_turned_away(make_fleet, expected):
    fleet = await make_fleet(
        1, [{}, {"max_num_seqs": 1}], limits=sizes(1, 2, drain_timeout_s=0.0), max_queue=1, max_num_seqs=2
    )
    small = next(w.engine_id for w in fleet.engine.workers() if w.engine_id.startswith("decode-1."))
    streams = [fleet.start(prompt(30, seed=i), 80) for i in range(3)]
    got = [[token.token_id for token in (await anext(aiter(stream))).tokens] for stream in streams]
    waiting = asyncio.ensure_future(fleet.run(prompt(20), 4))
    await asyncio.sleep(0)
    reports = [await stream.report() for stream in streams]
    assert sorted(report.decode_worker == small for report in reports) == [False, False, True]
    fleet.engine.scale({"decode": 1})
    answers = await asyncio.gather(*(_all(stream) for stream in streams))
    assert [a + b for a, b in zip(got, answers, strict=True)] == [expected(prompt(30, seed=i), 80) for i in range(3)]
    assert await waiting == expected(prompt(20), 4)
    await settled(fleet, 1, 1)
    await fleet.until_idle()

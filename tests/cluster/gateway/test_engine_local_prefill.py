"""The engine where decode workers compute prompts themselves: alone, or beside prefill workers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.errors import CrashingRequestError, WorkerLostError
from cluster.gateway.attempt import Attempt
from cluster.inprocess_worker import InProcessWorker
from cluster.pools.groups import PoolLimits
from cluster.routing.router import place
from cluster.routing.types import RoutingRequest
from fleet import prompt, tokens_of
from kv_transfer.transports.local import Faults
from random_clients import serve_random_clients
from workers.errors import CapacityError, DeadlineExceededError
from workers.messages import FinishReason, PrefillReport, RequestFailed, TokenOutput


def lose(attempt: Attempt, engine_id: str) -> None:
    """A worker is gone."""
    if attempt.falls_with(engine_id):
        attempt.fail(WorkerLostError(f"{engine_id} was lost while it served the request"))


def in_turns(*ways: str) -> Callable:
    """A policy that has prompts computed where these say, over and over."""
    turns = itertools.cycle(ways)

    def choose(routing_request: RoutingRequest, prefill, decode, links):
        return place(replace(routing_request, disaggregation=next(turns)), prefill, decode, links)

    return choose


async def consume(stream) -> list[int]:
    return [token async for token in tokens_of(stream)]


async def test_greedy_equals_transformers_without_any_prefill_worker(make_fleet, expected):
    fleet = await make_fleet(0, 2, disaggregation="never")
    rng = random.Random(3)
    asked = [(prompt(rng.randint(1, 200), seed=i), rng.randint(1, 24)) for i in range(16)]
    answers = await asyncio.gather(*(fleet.run(token_ids, length) for token_ids, length in asked))
    assert answers == [expected(token_ids, length) for token_ids, length in asked]
    assert {worker.role for worker in fleet.engine.workers()} == {"decode"}
    await fleet.until_idle()


async def test_local_and_remote_prompts_answer_alike(make_fleet, expected):
    fleet = await make_fleet(
        1, 1, disaggregation="auto", choose=in_turns("always", "never"), faults=Faults(seed=1, max_delay=8)
    )
    asked = [(prompt(30 + 20 * (i // 2), seed=i // 2), 12) for i in range(12)]
    streams = [fleet.start(*one) for one in asked]
    answers = await asyncio.gather(*map(consume, streams))
    assert answers == [expected(*one) for one in asked]
    reports = [await stream.report() for stream in streams]
    assert {bool(report.prefill_worker) for report in reports} == {True, False}
    assert {report.decode_worker for report in reports} == {fleet.engine.workers()[1].engine_id}
    await fleet.until_idle()


async def test_the_same_seed_gives_the_same_tokens_wherever_the_prompt_is_computed(make_fleet):
    fleet = await make_fleet(1, 1, disaggregation="auto", choose=in_turns("always", "never"))
    sampling = {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.3, "seed": 11}
    one = await fleet.run(prompt(70), 20, **sampling)
    assert await fleet.run(prompt(70), 20, **sampling) == one
    await fleet.until_idle()


@pytest.mark.parametrize("max_tokens", [1, 2, 20])
async def test_the_report_tells_where_the_time_went(max_tokens, make_fleet):
    fleet = await make_fleet(1, 1, disaggregation="never")
    stream = fleet.start(prompt(100), max_tokens)
    assert len(await consume(stream)) == max_tokens
    report = await stream.report()
    assert report.prefill_worker == ""
    assert report.decode_worker.startswith("decode-0.")
    assert report.attempts == 1
    assert (report.kv_bytes, report.transfer_s, report.exposed_transfer_s) == (0, 0.0, 0.0)
    assert report.ttft_s >= report.prefill_s > 0
    assert (report.first_decode_s > 0) == (max_tokens > 1)
    await fleet.until_idle()


async def test_prompts_that_begin_alike_are_computed_once(make_fleet, expected):
    fleet = await make_fleet(0, 1, disaggregation="never")
    for seed, cached in ((1, 0), (2, 96)):
        stream = fleet.start(prompt(96) + prompt(10, seed), 5)
        assert await consume(stream) == expected(prompt(96) + prompt(10, seed), 5)
        assert (await stream.report()).cached_tokens == cached
    await fleet.until_idle()


async def test_what_never_fits_is_refused(make_fleet):
    fleet = await make_fleet(0, 1, disaggregation="never")
    with pytest.raises(CapacityError, match="600"):
        await fleet.run([5] * 600, 4)
    await fleet.until_idle()


async def test_the_deadline_passes(make_fleet):
    fleet = await make_fleet(0, [{"max_num_seqs": 1}], disaggregation="never")
    holder = fleet.start(prompt(20), 400)
    await anext(aiter(holder))
    with pytest.raises(DeadlineExceededError):
        await fleet.run(prompt(20, 1), 4, timeout_s=0.05)
    await holder.aclose()
    await fleet.until_idle()


@pytest.mark.parametrize("num_chunks", [0, 1, 3])
async def test_closing_early_frees_the_worker(num_chunks, make_fleet):
    fleet = await make_fleet(0, 1, disaggregation="never", max_num_batched_tokens=16)
    stream = fleet.start(prompt(100), 400)
    iterator = aiter(stream)
    if num_chunks == 0:
        waiting = asyncio.create_task(anext(iterator))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
    for _ in range(num_chunks):
        await anext(iterator)
    await stream.aclose()
    await fleet.until_idle()


@pytest.mark.usefixtures("like_workers")
async def test_what_a_lost_worker_was_computing_or_decoding_goes_on_elsewhere(make_fleet, expected):
    fleet = await make_fleet(0, 2, disaggregation="never")
    streams = [fleet.start(prompt(30, seed=i), 150) for i in range(2)]
    iterators = [aiter(stream) for stream in streams]
    firsts = [[token.token_id for token in (await anext(iterator)).tokens] for iterator in iterators]
    victim, survivor = streams
    lost = (await victim.report()).decode_worker
    assert (await survivor.report()).decode_worker != lost
    fleet.handle(lost.split(".")[0]).crash("killed by the test")
    for i, stream in enumerate(streams):
        assert firsts[i] + await consume(stream) == expected(prompt(30, seed=i), 150)
    assert [(await stream.report()).attempts for stream in streams] == [2, 1]
    await fleet.until_idle()


async def test_one_that_kills_every_worker_is_not_tried_for_ever(make_fleet):
    fleet = await make_fleet(0, 1, disaggregation="never")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InProcessWorker, "submit", lambda self, request: self.crash("killed by the test"))
        with pytest.raises(CrashingRequestError):
            await fleet.run(prompt(50), 12)
    await fleet.until_idle()


async def test_a_lost_prefill_worker_is_not_missed_where_it_is_not_needed(make_fleet, expected):
    fleet = await make_fleet(1, 1, disaggregation="auto", choose=in_turns("never"))
    stream = fleet.start(prompt(40), 100)
    first = (await anext(aiter(stream))).tokens
    fleet.handle("prefill-0").crash("killed by the test")
    assert [token.token_id for token in first] + await consume(stream) == expected(prompt(40), 100)
    assert (await stream.report()).attempts == 1
    await fleet.until_idle()


@pytest.mark.usefixtures("like_workers")
async def test_a_worker_that_drains_hands_its_prompts_on(make_fleet, expected):
    limits = {"decode": PoolLimits(target=2, minimum=1, drain_timeout_s=0.0)}
    fleet = await make_fleet(0, 2, disaggregation="never", limits=limits)
    streams = [fleet.start(prompt(30, seed=i), 200) for i in range(4)]
    iterators = [aiter(stream) for stream in streams]
    firsts = [[token.token_id for token in (await anext(iterator)).tokens] for iterator in iterators]
    fleet.engine.scale({"decode": 1})
    for i, stream in enumerate(streams):
        assert firsts[i] + await consume(stream) == expected(prompt(30, seed=i), 200)
    await fleet.until(lambda workers: len(workers) == 1)
    reports = [await stream.report() for stream in streams]
    assert {report.decode_worker for report in reports} == {fleet.engine.workers()[0].engine_id}
    assert {report.attempts for report in reports} == {1}, "nothing has failed"
    await fleet.until_idle()


async def test_signals_tell_what_decode_workers_do_for_prompts(make_fleet):
    fleet = await make_fleet(1, 1, disaggregation="auto", choose=in_turns("never"))
    before = fleet.engine.signals()
    assert (before["decode"].local_ttft_s, before["decode"].busy) == (None, 0.0)
    await fleet.run(prompt(200), 4)
    after = fleet.engine.signals()
    assert after["decode"].local_ttft_s > 0
    assert after["decode"].busy > 0
    assert (after["prefill"].latency_s, after["prefill"].busy) == (None, 0.0), "prefill had nothing to do with it"
    await fleet.until_idle()


async def test_random_clients_leave_nothing_behind(make_fleet, expected):
    """Clients that stay, leave early, or give up while waiting; prompts here and there; a fabric that fails."""
    fleet = await make_fleet(
        1,
        2,
        disaggregation="auto",
        choose=in_turns("never", "always", "never", "auto"),
        faults=Faults(seed=4, max_delay=6, fail=0.01),
        num_blocks=40,
        max_queue=200,
    )
    assert await serve_random_clients(fleet, expected, 50, seed=8) > 10
    await fleet.until_idle()


def local_flight() -> Attempt:
    return Attempt("f", "", "d", 10, 0.0, 1)


async def test_all_tokens_of_a_local_flight_come_from_its_decode_worker():
    one = local_flight()
    one.take("d", PrefillReport("f", queue_s=0.5, prefill_s=0.25, num_chunks=2, cached_tokens=16, attempt_id="f"))
    one.take("d", TokenOutput("f", 1, attempt_id="f"))
    assert one.first_token_at > 0
    one.take("d", TokenOutput("f", 2, finish_reason=FinishReason.LENGTH, attempt_id="f"))
    assert [token.token_id for token in (await one.next_chunk()).tokens] == [1, 2]
    assert one.finished
    assert one.reported
    report = one.report()
    assert (report.prefill_worker, report.decode_worker, report.cached_tokens) == ("", "d", 16)


async def test_who_a_local_flight_needs():
    one = local_flight()
    assert [one.needs(engine_id) for engine_id in ("d", "p")] == [True, False]
    lose(one, "p")
    assert one.error is None
    lose(one, "d")
    assert isinstance(one.error, WorkerLostError)


async def test_an_error_of_the_decode_worker_ends_a_local_flight_at_once():
    one = local_flight()
    one.take("d", RequestFailed("f", CapacityError("too large"), attempt_id="f"))
    assert isinstance(one.error, CapacityError)

"""The engine over workers in this process: what a client sees, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest

from cluster.errors import CrashingRequestError, QueueFullError, WorkerLostError
from cluster.inprocess_worker import InProcessWorker
from fleet import prompt, tokens_of
from kv_transfer.transports.local import Faults
from made_requests import engine_request
from random_clients import serve_random_clients
from workers.errors import BatonError, CapacityError, ConfigError, DeadlineExceededError, HandoffError
from workers.messages import StepOutput, TokenOutput
from workers.sampling_params import SamplingParams


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 2)])
async def test_greedy_equals_transformers_under_concurrency(prefill, decode, make_fleet, expected):
    fleet = await make_fleet(prefill, decode, faults=Faults(seed=1, max_delay=10))
    rng = random.Random(3)
    asked = [(prompt(rng.randint(1, 200), seed=i), rng.randint(1, 24)) for i in range(16)]
    answers = await asyncio.gather(*(fleet.run(token_ids, length) for token_ids, length in asked))
    assert answers == [expected(token_ids, length) for token_ids, length in asked]
    await fleet.until_idle()


@pytest.mark.usefixtures("like_workers")
async def test_like_workers_share_the_load(make_fleet):
    fleet = await make_fleet(2, 2)
    streams = [fleet.start(prompt(40, seed=i), 20) for i in range(8)]

    async def consume(stream):
        return [token async for token in tokens_of(stream)], await stream.report()

    reports = [report for _, report in await asyncio.gather(*(consume(stream) for stream in streams))]
    assert len({report.prefill_worker for report in reports}) == 2
    assert len({report.decode_worker for report in reports}) == 2


async def test_one_token_is_served_by_prefill_alone(make_fleet, expected):
    fleet = await make_fleet()
    stream = fleet.start(prompt(30), 1)
    assert [token async for token in tokens_of(stream)] == expected(prompt(30), 1)
    assert (await stream.report()).decode_worker == ""
    await fleet.until_idle()


@pytest.mark.parametrize("max_tokens", [2, 20])
async def test_the_report_tells_where_the_time_went(max_tokens, make_fleet):
    fleet = await make_fleet()
    stream = fleet.start(prompt(100), max_tokens)
    assert len([token async for token in tokens_of(stream)]) == max_tokens
    report = await stream.report()
    assert report.prefill_worker.startswith("prefill-0.")
    assert report.decode_worker.startswith("decode-0.")
    assert report.attempts == 1
    assert report.kv_bytes == 7 * 3 * 2 * 16 * 2 * 16 * 4, "7 blocks, 3 layers, K and V, 16 tokens, 2 heads of 16"
    assert report.ttft_s >= report.prefill_s > 0
    assert report.queue_s >= 0
    assert report.transfer_s > 0
    assert report.first_decode_s > 0
    assert 0 <= report.hidden_fraction <= 1


async def test_over_capacity_requests_wait_and_past_the_bound_are_turned_away_at_once(make_fleet, expected):
    fleet = await make_fleet(decode=[{"max_num_seqs": 1}], max_queue=2)
    running = fleet.start(prompt(20), 60)
    first = await anext(aiter(running))
    waiting = [asyncio.create_task(fleet.run(prompt(20, seed=i), 4)) for i in (1, 2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="2 requests are waiting already"):
        await fleet.run(prompt(20, seed=3), 4)
    assert not any(task.done() for task in waiting)
    rest = [token async for token in tokens_of(running)]
    assert [*(token.token_id for token in first.tokens), *rest] == expected(prompt(20), 60)
    assert await asyncio.gather(*waiting) == [expected(prompt(20, seed=i), 4) for i in (1, 2)]
    await fleet.until_idle()


async def test_what_never_fits_is_refused(make_fleet):
    fleet = await make_fleet()
    with pytest.raises(CapacityError, match="600 prompt tokens, context window 512"):
        await fleet.run([5] * 600, 4)
    await fleet.until_idle()


@pytest.mark.usefixtures("like_workers")
async def test_the_explanation_follows_the_load(make_fleet):
    fleet = await make_fleet(1, 2, max_num_seqs=1)
    request = engine_request("r", prompt(20), SamplingParams(max_tokens=200, seed=0, ignore_eos=True))

    def where() -> list[tuple[str, bool, str]]:
        reports = fleet.engine.explain(request)
        return sorted((r.decode.partition(".")[0], r.chosen, r.refusal.partition(": ")[2]) for r in reports)

    assert sorted(chosen for _, chosen, _ in where()) == [False, True]
    one = fleet.engine.generate(request)
    await anext(one)
    assert [refusal for _, _, refusal in where()].count("its batch is full") == 1
    two = fleet.engine.generate(request)
    await anext(two)
    assert where() == [(f"decode-{i}", False, "its batch is full") for i in range(2)]
    await one.aclose()
    assert [chosen for _, chosen, _ in where()].count(True) == 1
    await two.aclose()
    await fleet.until_idle()


async def test_a_wrong_request_harms_no_worker(make_fleet, expected):
    fleet = await make_fleet()
    before = [worker.engine_id for worker in fleet.engine.workers()]
    with pytest.raises(BatonError, match="prompt token 5000 is out of range"):
        await fleet.run([5, 5000], 4)
    with pytest.raises(BatonError, match="no seed"):
        await fleet.run([5], 4, seed=None)
    assert await fleet.run(prompt(20), 4) == expected(prompt(20), 4)
    assert [worker.engine_id for worker in fleet.engine.workers()] == before
    await fleet.until_idle()


async def test_a_handoff_that_never_completes_ends_with_the_deadline(make_fleet):
    fleet = await make_fleet(faults=Faults(drop=1.0))
    stream = fleet.start(prompt(40), 20, timeout_s=1.0)
    iterator = aiter(stream)
    assert len((await anext(iterator)).tokens) == 1
    with pytest.raises(DeadlineExceededError):  # nothing follows the first token, which prefill computed
        await anext(iterator)
    await fleet.until_idle()


async def test_the_deadline_passes_in_the_queue(make_fleet):
    fleet = await make_fleet(decode=[{"max_num_seqs": 1}], faults=Faults(drop=1.0))
    holder = fleet.start(prompt(20), 4)
    await anext(aiter(holder))
    with pytest.raises(DeadlineExceededError):
        await fleet.run(prompt(20), 4, timeout_s=0.2)
    assert fleet.engine.num_queued == 0
    await holder.aclose()
    await fleet.until_idle()


@pytest.mark.parametrize("num_chunks", [0, 1, 3])
async def test_closing_early_frees_both_sides(num_chunks, make_fleet):
    fleet = await make_fleet()
    stream = fleet.start(prompt(100), 400)
    iterator = aiter(stream)
    if num_chunks == 0:
        waiting = asyncio.create_task(anext(iterator))
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
    for _ in range(num_chunks):
        await anext(iterator)
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(iterator)
    await fleet.until_idle()


async def test_a_lost_prefill_worker_is_made_up_for_by_another(make_fleet, expected):
    fleet = await make_fleet(2)
    fleet.crash_one_on_submit("prefill-0", "prefill-1")
    stream = fleet.start(prompt(50), 12)
    assert [token async for token in tokens_of(stream)] == expected(prompt(50), 12)
    assert (await stream.report()).attempts == 2
    await fleet.until_idle()


async def test_a_request_that_kills_every_worker_is_not_tried_for_ever(make_fleet):
    fleet = await make_fleet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InProcessWorker, "submit", lambda self, request: self.crash("killed by the test"))
        with pytest.raises(CrashingRequestError):
            await fleet.run(prompt(50), 12)
    await fleet.until_idle()


@pytest.mark.usefixtures("like_workers")
async def test_what_a_lost_decode_worker_was_decoding_goes_on_elsewhere(make_fleet, expected):
    fleet = await make_fleet(1, 2)
    before = {worker.engine_id for worker in fleet.engine.workers()}
    streams = [fleet.start(prompt(30, seed=i), 150) for i in range(2)]
    iterators = [aiter(stream) for stream in streams]
    firsts = [[token.token_id for token in (await anext(iterator)).tokens] for iterator in iterators]
    victim, survivor = streams
    lost = (await victim.report()).decode_worker
    assert (await survivor.report()).decode_worker != lost
    fleet.handle(lost.split(".")[0]).crash("killed by the test")
    for i, stream in enumerate(streams):
        rest = [token async for token in tokens_of(stream)]
        assert firsts[i] + rest == expected(prompt(30, seed=i), 150)
    assert [(await stream.report()).attempts for stream in streams] == [2, 1]
    await fleet.until_idle()
    after = {worker.engine_id for worker in fleet.engine.workers()}
    assert lost not in after
    assert len(after - before) == 1
    assert await asyncio.gather(*(fleet.run(prompt(20), 5) for _ in range(4))) == [expected(prompt(20), 5)] * 4


async def test_a_prefill_worker_lost_after_the_first_token_is_made_up_for(make_fleet, expected):
    fleet = await make_fleet(faults=Faults(drop=1.0))
    stream = fleet.start(prompt(40), 20)
    first = (await anext(aiter(stream))).tokens
    assert len(first) == 1, "the rest of its cache never arrives"
    fleet.handle("prefill-0").crash("killed by the test")
    fleet.fabric.faults = Faults()  # not before: it may have parts to post yet
    assert [first[0].token_id] + [token async for token in tokens_of(stream)] == expected(prompt(40), 20)
    assert (await stream.report()).attempts == 2
    await fleet.until_idle()


async def test_handoffs_that_always_fail_end_in_an_error_never_in_a_wrong_text(make_fleet):
    fleet = await make_fleet(faults=Faults(drop=1.0))
    stream = fleet.start(prompt(40), 20)
    iterator = aiter(stream)
    for attempt in range(3):
        assert len((await anext(iterator)).tokens) == 1, attempt  # each attempt brings its first token, and no other
        fleet.handle("prefill-0").crash("killed by the test")
    with pytest.raises((HandoffError, WorkerLostError)):
        await anext(iterator)
    await fleet.until_idle()


class LateToSpeak(InProcessWorker):
    """What prefill workers say is held back until the test says so, and what decode workers have said is counted."""

    may_speak: asyncio.Event
    num_decoded: int

    async def outputs(self) -> AsyncIterator[list[StepOutput]]:
        async for batch in super().outputs():
            if self.role == "prefill":
                await self.may_speak.wait()
            yield batch
            tokens = [event for output in batch for event in output.events if isinstance(event, TokenOutput)]
            LateToSpeak.num_decoded += len(tokens) if self.role == "decode" else 0


async def test_a_decoded_token_that_overtakes_the_first_is_put_in_order(make_fleet, expected):
    LateToSpeak.may_speak, LateToSpeak.num_decoded = asyncio.Event(), 0
    fleet = await make_fleet(worker_class=LateToSpeak)
    answer = asyncio.create_task(fleet.run(prompt(30), 12))
    await asyncio.sleep(0)
    await fleet.until(lambda _: LateToSpeak.num_decoded == 11)
    assert not answer.done()
    LateToSpeak.may_speak.set()
    assert await answer == expected(prompt(30), 12)
    await fleet.until_idle()


async def test_a_decode_worker_lost_before_the_first_token_is_made_up_for(make_fleet, expected):
    LateToSpeak.may_speak, LateToSpeak.num_decoded = asyncio.Event(), 0
    fleet = await make_fleet(worker_class=LateToSpeak)
    (lost,) = [worker.engine_id for worker in fleet.engine.workers() if worker.role == "decode"]
    fleet.crash_on_submit("decode-0")
    stream = fleet.start(prompt(50), 12)
    answer = asyncio.create_task(anext(aiter(stream)))
    await fleet.until(lambda workers: all(worker.engine_id != lost for worker in workers))
    LateToSpeak.may_speak.set()
    tokens = [token.token_id for token in (await answer).tokens]
    assert tokens + [token async for token in tokens_of(stream)] == expected(prompt(50), 12)
    report = await stream.report()
    assert report.attempts == 2
    assert report.decode_worker != lost
    await fleet.until_idle()


async def test_unlike_block_sizes_refuse_each_other_at_the_start(make_fleet):
    with pytest.raises(ConfigError, match=r"block_size is (16 here and 32|32 here and 16) there"):
        await make_fleet([{"block_size": 16}], [{"block_size": 32}])


async def test_in_a_mixed_pool_only_the_pair_that_fits_is_used(make_fleet, expected):
    fleet = await make_fleet([{"block_size": 16}, {"block_size": 32}], [{"block_size": 32}])
    streams = [fleet.start(prompt(60, seed=i), 6) for i in range(6)]

    async def consume(stream):
        return [token async for token in tokens_of(stream)]

    assert await asyncio.gather(*map(consume, streams)) == [expected(prompt(60, seed=i), 6) for i in range(6)]
    reports = [await stream.report() for stream in streams]
    assert {report.prefill_worker.split(".")[0] for report in reports} == {"prefill-1"}
    await fleet.until_idle()


async def test_too_little_memory_on_decode_delays_but_loses_nothing(make_fleet, expected):
    fleet = await make_fleet(decode=[{"num_blocks": 16, "max_model_len": 256}], max_model_len=256)
    asked = [(prompt(30, seed=i), 40) for i in range(10)]
    answers = await asyncio.gather(*(fleet.run(*one) for one in asked))
    assert answers == [expected(*one) for one in asked]
    await fleet.until_idle()


async def test_random_clients_leave_nothing_behind(make_fleet, expected):
    """Clients that stay, leave early, or give up while waiting, over a fabric that is late and sometimes fails."""
    fleet = await make_fleet(2, 2, faults=Faults(seed=4, max_delay=6, fail=0.01), num_blocks=40, max_queue=200)
    assert await serve_random_clients(fleet, expected, 80, seed=8) > 20
    await fleet.until_idle()


async def test_stopping_ends_what_runs_and_what_waits(make_fleet):
    fleet = await make_fleet(decode=[{"max_num_seqs": 1}])
    running = asyncio.create_task(fleet.run(prompt(20), 400))
    await fleet.until(lambda workers: workers[1].load.running == 1)
    waiting = asyncio.create_task(fleet.run(prompt(20), 4))
    await asyncio.sleep(0)
    await fleet.engine.stop()
    for task in (running, waiting):
        with pytest.raises(BatonError, match="shutting down"):
            await asyncio.wait_for(task, 5)


class FallsSilent(InProcessWorker):
    """A worker whose node is gone without a word: it takes requests, and nothing is heard of it."""

    silenced: str

    async def outputs(self) -> AsyncIterator[list[StepOutput]]:
        async for batch in super().outputs():
            if self.name == self.silenced:
                await asyncio.Event().wait()
            yield batch


@pytest.mark.usefixtures("like_workers")
async def test_a_worker_that_falls_silent_is_lost_and_others_do_its_work(make_fleet, expected):
    FallsSilent.silenced = ""
    fleet = await make_fleet(2, 1, worker_class=FallsSilent, silence_s=3.0)
    before = {worker.engine_id for worker in fleet.engine.workers()}
    FallsSilent.silenced = "prefill-0"
    streams = [fleet.start(prompt(30, seed=i), 6) for i in range(4)]
    answers = [asyncio.ensure_future(_all(stream)) for stream in streams]
    await fleet.until(lambda workers: before - {worker.engine_id for worker in workers} != set())
    FallsSilent.silenced = ""
    assert await asyncio.gather(*answers) == [expected(prompt(30, seed=i), 6) for i in range(4)]
    assert max([(await stream.report()).attempts for stream in streams]) == 2
    (lost,) = before - {worker.engine_id for worker in fleet.engine.workers()}
    assert lost.startswith("prefill-0.")
    await fleet.until_idle()


async def _all(stream) -> list[int]:
    return [token async for token in tokens_of(stream)]


async def test_workers_with_nothing_to_do_are_not_taken_for_lost(make_fleet, expected):
    fleet = await make_fleet(silence_s=2.5)
    before = {worker.engine_id for worker in fleet.engine.workers()}
    await asyncio.sleep(3.5)
    assert {worker.engine_id for worker in fleet.engine.workers()} == before
    assert await fleet.run(prompt(20), 4) == expected(prompt(20), 4)

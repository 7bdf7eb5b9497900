"""What two workers say about one request, put in order."""

from __future__ import annotations

import asyncio

import pytest

from cluster.clock import now
from cluster.errors import WorkerLostError
from cluster.gateway.attempt import Attempt
from workers.errors import HandoffError, SamplingError
from workers.messages import (
    DecodeReport,
    FinishReason,
    HandoffReport,
    PrefillReport,
    PromptLogprobs,
    RequestFailed,
    TokenOutput,
)


def lose(attempt: Attempt, engine_id: str) -> None:
    """A worker is gone."""
    if attempt.falls_with(engine_id):
        attempt.fail(WorkerLostError(f"{engine_id} was lost while it served the request"))


def attempt(arrived: float | None = None) -> Attempt:
    return Attempt("f", "p", "d", 10, now() if arrived is None else arrived, 1)


def token(token_id: int, reason: FinishReason | None = None) -> TokenOutput:
    return TokenOutput("f", token_id, finish_reason=reason, attempt_id="f")


async def ids(one: Attempt) -> list[int]:
    return [output.token_id for output in (await asyncio.wait_for(one.next_chunk(), 5)).tokens]


async def test_tokens_come_in_order_although_decode_was_quicker():
    one = attempt()
    one.take("d", token(2))
    one.take("d", token(3, FinishReason.LENGTH))
    assert not one.finished, "the first token is still to come"
    one.take("p", token(1))
    assert await ids(one) == [1, 2, 3]
    assert one.finished
    assert one.num_tokens == 13, "each token is in the books"


async def test_each_token_is_given_once():
    one = attempt()
    one.take("p", token(1))
    assert await ids(one) == [1]
    waiting = asyncio.create_task(ids(one))
    await asyncio.sleep(0)
    assert not waiting.done()
    one.take("d", token(2))
    one.take("d", token(3))
    assert await waiting == [2, 3]
    assert one.num_tokens == 13


async def test_an_error_comes_after_the_tokens_that_are_here():
    one = attempt()
    one.take("p", token(1))
    one.take("p", RequestFailed("f", HandoffError("lost a part"), attempt_id="f"))
    one.fail(WorkerLostError("only the first error counts"))
    assert await ids(one) == [1]
    with pytest.raises(HandoffError, match="lost a part"):
        await one.next_chunk()


async def test_an_error_wakes_who_waits():
    one = attempt()
    waiting = asyncio.create_task(one.next_chunk())
    await asyncio.sleep(0)
    one.fail(HandoffError("no"))
    with pytest.raises(HandoffError):
        await asyncio.wait_for(waiting, 5)


async def test_nothing_fails_a_finished_flight():
    one = attempt()
    one.take("p", token(1, FinishReason.STOP))
    lose(one, "d")
    one.fail(HandoffError("late"))
    assert one.finished
    assert one.error is None


@pytest.mark.parametrize(
    ("lost", "first_token_is_out", "fails"),
    [("p", False, True), ("p", True, False), ("d", True, True), ("x", False, False)],
)
async def test_lost_workers(lost, first_token_is_out, fails):
    one = attempt()
    if first_token_is_out:
        one.take("p", token(1))
    lose(one, lost)
    assert (one.error is not None) == fails
    if fails:
        assert f"{lost} was lost" in str(one.error)


async def test_the_report():
    one = attempt(arrived=now() - 5.0)
    one.dispatched = one.arrived + 2.0
    assert one.report().ttft_s == 0.0, "no token has come yet"
    one.take("p", PrefillReport("f", queue_s=0.5, prefill_s=0.25, num_chunks=2, cached_tokens=48, attempt_id="f"))
    one.take("p", token(1))
    one.take("p", HandoffReport("f", num_bytes=4096, num_parts=3, transfer_s=0.2, exposed_s=0.05, attempt_id="f"))
    one.take("d", DecodeReport("f", first_decode_s=0.01, cached_tokens=32, attempt_id="f"))
    one.take("d", token(2, FinishReason.LENGTH))
    await one.handoff_reported(0.0)
    report = one.report()
    assert (report.prefill_worker, report.decode_worker, report.attempts) == ("p", "d", 1)
    assert report.cached_tokens == 48
    assert report.decode_cached_tokens == 32
    assert (report.queue_s, report.prefill_s, report.first_decode_s) == (2.5, 0.25, 0.01)
    assert (report.kv_bytes, report.transfer_s, report.exposed_transfer_s) == (4096, 0.2, 0.05)
    assert report.ttft_s >= 5.0
    assert report.hidden_fraction == pytest.approx(0.75)


async def test_a_handoff_report_that_never_comes_is_not_waited_for_long():
    one = attempt()
    one.take("p", token(1, FinishReason.LENGTH))
    await asyncio.wait_for(one.handoff_reported(0.01), 5)
    assert one.report().kv_bytes == 0


async def test_a_request_for_one_token_is_served_by_prefill_alone():
    one = attempt()
    one.serve_alone()
    lose(one, "d")
    one.take("p", token(1, FinishReason.LENGTH))
    await asyncio.wait_for(one.handoff_reported(1000), 5)
    assert await ids(one) == [1]
    assert one.report().decode_worker == ""


@pytest.mark.parametrize("first", ["p", "d"])
async def test_the_cause_of_a_failed_handoff_is_what_prefill_says(first):
    one = attempt()
    said = {"p": SamplingError("row 0 has no finite logit"), "d": HandoffError("the prefill worker has given up")}
    for engine_id in sorted(said, key=lambda name: name != first):
        one.take(engine_id, RequestFailed("f", said[engine_id], attempt_id="f"))
    with pytest.raises(SamplingError):
        await one.next_chunk()


async def test_whoever_polls_gets_tokens_for_which_somebody_waits() -> None:
    one, polled = attempt(), []
    one.reader = lambda: polled.extend(token.token_id for token in one.poll())
    one.take("p", token(1))
    assert polled == [], "nobody waits"
    assert await ids(one) == [1]
    waiting = asyncio.create_task(one.next_chunk())
    await asyncio.sleep(0)
    one.take("d", token(2))
    one.take("d", token(3))
    assert polled == [2, 3]
    await asyncio.sleep(0)
    assert not waiting.done(), "it goes on waiting"
    one.take("d", token(4, FinishReason.LENGTH))
    assert [each.token_id for each in (await waiting).tokens] == [4], "the last one is its own"
    assert polled == [2, 3]


async def test_what_is_more_than_tokens_is_for_who_waits() -> None:
    for what in (
        PromptLogprobs("f", None, None, None, attempt_id="f"),
        RequestFailed("f", SamplingError("no"), attempt_id="f"),
    ):
        one, polled = attempt(), []
        one.reader = lambda one=one, polled=polled: polled.extend(one.poll())
        waiting = asyncio.create_task(one.next_chunk())
        await asyncio.sleep(0)
        one.take("p", what)
        one.take("p", token(1))
        assert polled == []
        assert one.poll() == ()
        if isinstance(what, PromptLogprobs):
            assert (await waiting).prompt_logprobs is what
        else:
            assert [each.token_id for each in (await waiting).tokens] == [1]
            with pytest.raises(SamplingError):
                await one.next_chunk()


async def test_whoever_polls_may_call_who_waits() -> None:
    one = attempt()
    waiting = asyncio.create_task(one.next_chunk())
    await asyncio.sleep(0)
    one.wake()
    assert (await waiting).tokens == ()


async def test_a_reader_that_raises_fails_its_own_attempt() -> None:
    one = attempt()
    one.reader = lambda: 1 / 0
    waiting = asyncio.create_task(one.next_chunk())
    await asyncio.sleep(0)
    one.take("p", token(1))
    assert [each.token_id for each in (await waiting).tokens] == [1]
    with pytest.raises(ZeroDivisionError):
        await one.next_chunk()

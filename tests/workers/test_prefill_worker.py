"""The prefill worker alone: what it refuses, when it gives up, what it says, and whose blocks are whose meanwhile."""

from __future__ import annotations

import random

import pytest
import torch

from kv_transfer.transports.local import Faults
from made_requests import worker_request
from workers.errors import (
    CapacityError,
    DeadlineExceededError,
    HandoffError,
    InvalidRequestError,
    SamplingError,
)
from workers.messages import HandoffReport, PrefillReport, RequestFailed, TokenOutput, WorkerRequest
from workers.runner.model_runner import ModelRunner
from workers.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=8, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


def step_until(worker, condition, others=(), max_steps: int = 2000) -> list:
    """Step a worker, and others with it, until the condition holds; what the worker said."""
    events = []
    for _ in range(max_steps):
        if condition():
            return events
        events += worker.step()
        for other in others:
            other.step()
    raise AssertionError("it never happened")


def alone(request_id: str, token_ids: list[int], sampling: SamplingParams = GREEDY) -> WorkerRequest:
    return worker_request(request_id, token_ids, sampling)


@pytest.mark.parametrize(
    ("token_ids", "sampling", "error", "text"),
    [
        ([], GREEDY, InvalidRequestError, "the prompt is empty"),
        ([5, 512], GREEDY, InvalidRequestError, "prompt token 512 is out of range: the vocabulary has 512 tokens"),
        ([-1], GREEDY, InvalidRequestError, "prompt token -1 is out of range"),
        ([5] * 512, GREEDY, InvalidRequestError, "512 tokens, the context window 512"),
        ([5], SamplingParams(temperature=0.0), InvalidRequestError, "no seed"),
        ([5] * 200, GREEDY, CapacityError, "needs 13 KV blocks, a prefill worker has 8"),
    ],
)
def test_a_wrong_request_fails_by_itself(token_ids, sampling, error, text, one_pair, reference_greedy, tiny_checkpoint):
    cluster, _, _ = one_pair(prefill_blocks=8)
    cluster.submit("right", prompt(20), GREEDY)
    cluster.submit("wrong", token_ids, sampling)
    assert cluster.run() == {"right": reference_greedy(tiny_checkpoint("llama"), prompt(20), 8)}
    assert isinstance(cluster.failures["wrong"], error)
    assert text in str(cluster.failures["wrong"])
    cluster.assert_all_blocks_free()


def test_one_token_needs_no_decode_worker(one_pair, reference_greedy, tiny_checkpoint):
    _, prefill, _ = one_pair(max_num_batched_tokens=16)
    prefill.add(alone("r", prompt(40)))
    events = step_until(prefill, lambda: not prefill.has_requests)
    report, token = events
    assert isinstance(report, PrefillReport)
    assert report.num_chunks == 3
    assert token.token_id == reference_greedy(tiny_checkpoint("llama"), prompt(40), 1)[0]
    assert token.finish_reason is None, "the request's own limit is eight"
    assert prefill.load.free_blocks == prefill.load.total_blocks


def test_reports(one_pair, clock):
    cluster, prefill, decode = one_pair(max_num_batched_tokens=16, layers_per_write=2)
    cluster.submit("r", prompt(40), GREEDY)
    clock.now += 3.0
    events = []
    while decode.has_requests or prefill.has_requests:
        events += prefill.step()
        decode.step()
        clock.now += 1.0
    prefill_report, token, handoff_report = events
    assert isinstance(token, TokenOutput)
    assert prefill_report == PrefillReport("r", queue_s=3.0, prefill_s=2.0, num_chunks=3, attempt_id="r")
    assert isinstance(handoff_report, HandoffReport)
    # Two layer groups; the chunks end after 16, 32 and 40 tokens, each with full blocks to push.
    assert handoff_report.num_parts == 2 * 3
    assert handoff_report.num_bytes == 3 * 3 * prefill.runner.kv_caches[0][0, 0].nbytes
    assert handoff_report.transfer_s >= 0.0
    assert handoff_report.exposed_s >= 0.0


def test_load_in_every_state(one_pair):
    cluster, prefill, decode = one_pair(
        prefill_blocks=8, max_num_batched_tokens=16, faults=Faults(seed=0, max_delay=30)
    )

    def load():
        now = prefill.load
        assert now.total_blocks == 8
        return (
            now.free_blocks,
            now.reserved_blocks,
            now.quarantined_blocks,
            now.running,
            now.waiting,
            now.waiting_tokens,
        )

    cluster.submit("a", prompt(40), GREEDY)
    cluster.submit("b", prompt(90, seed=1), GREEDY)
    assert load() == (8, 0, 0, 0, 2, 130), "both wait"
    prefill.step()
    assert load() == (5, 0, 0, 1, 1, 114), "a is under way, b does not fit beside it"
    prefill.step()
    prefill.step()
    assert load() == (5, 3, 0, 0, 1, 90), "a is computed; its blocks are being read"
    cluster.abort("a")
    assert load() == (5, 0, 3, 0, 1, 90), "nobody wants a, but its blocks may still be read"
    assert not prefill.has_work, "until they are free there is nothing to do"
    step_until(prefill, lambda: prefill.load.quarantined_blocks == 0, [decode])
    assert load() == (2, 0, 0, 1, 0, 74), "b took its place at once"
    cluster.abort("b")
    step_until(prefill, lambda: not prefill.has_requests, [decode])
    assert load() == (8, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 8, 20])
@pytest.mark.parametrize("gateway", ["tells both", "tells prefill"])
def test_an_abort_in_any_state_gives_everything_back(steps, gateway, one_pair):
    cluster, prefill, _ = one_pair(max_num_batched_tokens=16, faults=Faults(seed=steps, max_delay=8))
    cluster.submit("r", prompt(40), GREEDY)
    for _ in range(steps):
        cluster.step()
    if gateway == "tells both":
        cluster.abort("r")
    else:
        prefill.abort("r")
    said = [event for _ in range(3) for event in prefill.step()]
    assert said == [], "nothing more is said of an aborted request"
    cluster.run()
    cluster.assert_all_blocks_free()
    assert not prefill.has_requests
    if gateway == "tells prefill" and "r" in cluster.failures:
        assert isinstance(cluster.failures["r"], HandoffError)


def test_the_deadline_passes_in_the_queue(one_pair, clock):
    cluster, prefill, _ = one_pair(prefill_blocks=4)
    cluster.submit("a", prompt(60), GREEDY)
    prefill.step()
    cluster.submit("b", prompt(60), GREEDY, timeout_s=5.0)
    clock.now += 6.0
    (failed,) = [e for e in prefill.step() if isinstance(e, RequestFailed)]
    assert (failed.request_id, type(failed.error)) == ("b", DeadlineExceededError)
    assert "waiting for or computing its prompt" in str(failed.error)
    cluster.abort("b")
    cluster.run()
    assert len(cluster.token_ids("a")) == 7, "the first token was said to this test"
    cluster.assert_all_blocks_free()


def test_the_deadline_passes_between_two_chunks(one_pair, clock):
    cluster, prefill, _ = one_pair(max_num_batched_tokens=16)
    cluster.submit("r", prompt(40), GREEDY, timeout_s=5.0)
    cluster.step()
    assert prefill.load.running == 1
    clock.now += 6.0
    cluster.run()
    assert isinstance(cluster.failures["r"], DeadlineExceededError)
    assert cluster.token_ids("r") == []
    cluster.assert_all_blocks_free()


def test_a_decode_worker_that_never_grants_ends_in_a_handoff_error(one_pair, clock):
    cluster, prefill, _ = one_pair()
    cluster.submit("r", prompt(40), GREEDY, timeout_s=1000.0)
    prefill.step()
    clock.now += 29.0
    assert prefill.step() == []
    clock.now += 2.0
    (failed,) = prefill.step()
    assert isinstance(failed.error, HandoffError)
    assert "not handed over within 30 s" in str(failed.error)
    cluster.run()
    assert isinstance(cluster.failures["r"], HandoffError), "the decode worker hears of it when it grants"
    cluster.assert_all_blocks_free()


def test_source_blocks_are_not_reused_while_a_write_reads_them(one_pair, reference_greedy, tiny_checkpoint):
    """The fabric reads the source when the data lands, so that a block freed too early would hand over another's."""
    for seed in range(6):
        cluster, prefill, _ = one_pair(prefill_blocks=4, faults=Faults(seed=seed, max_delay=25))
        expected = {}
        for i in range(8):
            expected[f"r{i}"] = reference_greedy(tiny_checkpoint("llama"), prompt(60, seed=i), 8)
            cluster.submit(f"r{i}", prompt(60, seed=i), GREEDY)
        (engine_id,), seen = cluster.prefill, set()
        while cluster.busy:
            cluster.step()
            read = cluster.fabric.source_blocks(engine_id)
            assert read <= prefill.cache.groups[0].pool.used_blocks
            seen |= read
        assert {r: cluster.token_ids(r) for r in expected} == expected
        assert seen


def test_a_lost_decode_worker_ends_its_handoffs_only(one_pair):
    cluster, prefill, _ = one_pair()
    cluster.submit("r", prompt(40), GREEDY)
    prefill.step()
    assert prefill.load.reserved_blocks == 3
    prefill.disconnect(next(iter(cluster.decode)))
    (failed,) = prefill.step()
    assert isinstance(failed.error, HandoffError)
    assert "is gone" in str(failed.error)
    prefill.add(alone("s", prompt(10)))
    assert [type(event) for event in prefill.step()] == [PrefillReport, TokenOutput]
    assert prefill.load.free_blocks == prefill.load.total_blocks


def test_broken_logits_fail_one_request_alone(one_pair, monkeypatch, reference_greedy, tiny_checkpoint):
    forward = ModelRunner.forward

    def broken(self, rows, on_layer=None):
        logits = forward(self, rows, on_layer).clone()
        for place, row in enumerate(row for row in rows if row.wants_logits):
            if len(row.token_ids) == 23:
                logits[place] = torch.nan
        return logits

    monkeypatch.setattr(ModelRunner, "forward", broken)
    cluster, _, _ = one_pair()
    for name, length in (("a", 20), ("broken", 23), ("c", 30)):
        cluster.submit(name, prompt(length), GREEDY)
    checkpoint = tiny_checkpoint("llama")
    assert cluster.run() == {n: reference_greedy(checkpoint, prompt(k), 8) for n, k in (("a", 20), ("c", 30))}
    # Prefill says what was wrong; the decode worker says that the handoff was given up. Either may be heard first.
    assert isinstance(cluster.failures["broken"], SamplingError | HandoffError)
    cluster.assert_all_blocks_free()

"""The decode worker alone: who gets blocks, when it gives up, what it says, and whose blocks are whose meanwhile."""

from __future__ import annotations

import random

import pytest
import torch

from kv_transfer.handoff_key import HandoffKey
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import Faults
from workers.errors import CapacityError, DeadlineExceededError, HandoffError, InvalidRequestError, SamplingError
from workers.messages import DecodeReport, RequestFailed, TokenOutput
from workers.models.causal_lm import CausalLM
from workers.sampling_params import SamplingParams


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


def run_until(cluster, condition, max_steps: int = 5000) -> None:
    for _ in range(max_steps):
        if condition():
            return
        cluster.step()
    raise AssertionError(f"it never happened: {cluster.loads}")


@pytest.mark.parametrize(
    ("token_ids", "sampling", "error", "text"),
    [
        ([], greedy(4), InvalidRequestError, "the prompt is empty"),
        ([5] * 64, greedy(4), InvalidRequestError, "64 tokens, the context window 64"),
        ([5], SamplingParams(max_tokens=4), InvalidRequestError, "no seed"),
        ([5] * 32, greedy(4), CapacityError, "needs 3 KV blocks, a decode worker has 2"),
    ],
)
def test_a_wrong_request_fails_by_itself(token_ids, sampling, error, text, one_pair, reference_greedy, tiny_checkpoint):
    cluster, _, _ = one_pair(decode_blocks=2, max_model_len=64)
    cluster.submit("right", prompt(20), greedy(6))
    cluster.submit("wrong", token_ids, sampling)
    assert cluster.run() == {"right": reference_greedy(tiny_checkpoint("llama"), prompt(20), 6)}
    assert isinstance(cluster.failures["wrong"], error)
    assert text in str(cluster.failures["wrong"])
    cluster.assert_all_blocks_free()


def test_load_in_every_state(one_pair):
    cluster, _, decode = one_pair(decode_blocks=6, faults=Faults(seed=0, max_delay=30))

    def load():
        now = decode.load
        assert now.total_blocks == 6
        return (
            now.free_blocks,
            now.reserved_blocks,
            now.quarantined_blocks,
            now.running,
            now.waiting,
            now.waiting_tokens,
        )

    cluster.submit("a", prompt(40), greedy(100))
    cluster.submit("b", prompt(60, 1), greedy(100))
    assert load() == (6, 0, 0, 0, 2, 100), "both wait for blocks"
    assert decode.has_work
    decode.step()
    assert load() == (3, 3, 0, 0, 2, 100), "a has blocks and waits for its cache; b does not fit beside it"
    assert not decode.has_work, "until a cache arrives there is nothing to do"
    run_until(cluster, lambda: decode.load.running == 1)
    assert load() == (3, 0, 0, 1, 1, 60)
    cluster.abort("a")
    decode.step()  # with a step of a's in flight, its blocks come back when that has landed
    decode.step()
    assert load() == (2, 4, 0, 0, 1, 60), "b took the place of a"
    cluster.abort("b")
    assert load() == (2, 0, 4, 0, 0, 0), "nobody wants b, but prefill may still write to its blocks"
    run_until(cluster, lambda: not decode.has_requests)
    assert load() == (6, 0, 0, 0, 0, 0)


def test_preempted_sequences_are_in_the_load(one_pair):
    cluster, _, decode = one_pair(decode_blocks=4)
    cluster.submit("old", prompt(30), greedy(30))
    cluster.submit("new", prompt(30, 1), greedy(30))
    run_until(cluster, lambda: decode.load.preempted == 1)
    assert decode.load.running == 1
    assert cluster.preempted == ["new"]
    cluster.submit("next", prompt(1), greedy(2))
    run_until(cluster, lambda: decode.load.preempted == 0)
    assert len(cluster.token_ids("old")) == 30, "what was put aside came back when there was room"
    cluster.run()
    assert {name: len(cluster.token_ids(name)) for name in ("old", "new", "next")} == {"old": 30, "new": 30, "next": 2}
    cluster.assert_all_blocks_free()


def test_nothing_new_is_admitted_while_one_is_put_aside(one_pair):
    cluster, _, decode = one_pair(decode_blocks=5)
    cluster.submit("old", prompt(30), greedy(30))
    cluster.submit("new", prompt(30, 1), greedy(30))
    run_until(cluster, lambda: decode.load.preempted == 1)
    cluster.submit("next", prompt(1), greedy(2))
    assert decode.load.free_blocks == 2, "enough for the next, not enough for the one put aside"
    while decode.load.preempted:
        assert decode.load.reserved_blocks == 0
        cluster.step()
    cluster.run()
    assert len(cluster.token_ids("next")) == 2
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("max_num_seqs", [1, 3])
def test_no_more_sequences_than_allowed_are_running_or_expected(max_num_seqs, one_pair):
    cluster, _, decode = one_pair(max_num_seqs=max_num_seqs, faults=Faults(seed=1, max_delay=3))
    for i in range(8):
        cluster.submit(f"r{i}", prompt(10, i), greedy(6))
    most = 0
    while cluster.busy:
        cluster.step()
        expected = decode.load.reserved_blocks  # one block each
        most = max(most, decode.load.running + expected)
    assert most == max_num_seqs
    assert all(len(cluster.token_ids(f"r{i}")) == 6 for i in range(8))


def test_blocks_are_given_in_the_order_of_arrival(one_pair):
    order: list[bytes] = []

    class Recording(LocalConnector):
        def expect(self, handoff_id: bytes, *args) -> HandoffKey:
            order.append(handoff_id)
            return super().expect(handoff_id, *args)

    cluster, _, _ = one_pair(decode_blocks=4, connector_class=Recording)
    lengths = (60, 10, 50, 5, 60, 1)
    wanted = [cluster.submit(f"r{i}", prompt(length, i), greedy(3)) for i, length in enumerate(lengths)]
    cluster.run()
    assert order == wanted, "a small one does not overtake a large one"


@pytest.mark.parametrize("gateway", ["tells both", "tells decode"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 12, 20, 40])
def test_an_abort_in_any_state_gives_everything_back(steps, gateway, one_pair):
    cluster, _, decode = one_pair(max_num_batched_tokens=16, faults=Faults(seed=steps, max_delay=5))
    cluster.submit("r", prompt(40), greedy(60))
    for _ in range(steps):
        cluster.step()
    if gateway == "tells both" or steps == 0:  # without a grant, prefill would wait for the whole handoff timeout
        cluster.abort("r")
    else:
        decode.abort("r")
    assert [event for _ in range(3) for event in decode.step()] == [], "nothing more is said of an aborted request"
    cluster.run()
    cluster.assert_all_blocks_free()
    assert not decode.has_requests
    if gateway == "tells decode" and "r" in cluster.failures:
        assert isinstance(cluster.failures["r"], HandoffError)
        assert "cancelled by the decode worker" in str(cluster.failures["r"])


def test_an_abort_while_put_aside(one_pair):
    cluster, _, decode = one_pair(decode_blocks=4)
    cluster.submit("old", prompt(30), greedy(30))
    cluster.submit("new", prompt(30, 1), greedy(30))
    run_until(cluster, lambda: decode.load.preempted == 1)
    put_aside = next(name for name in ("old", "new") if name not in decode.running_requests)
    cluster.abort(put_aside)
    assert decode.load.preempted == 0
    cluster.run()
    assert sorted(len(cluster.token_ids(name)) == 30 for name in ("old", "new")) == [False, True]
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ("waiting for blocks", "waiting for the KV cache"),
        ("waiting for its cache", "waiting for the KV cache"),
        ("running", "decoding"),
        ("preempted", "decoding"),
    ],
)
def test_the_deadline_passes(state, where, one_pair, clock):
    cluster, _, decode = one_pair(decode_blocks=4)
    cluster.submit("old", prompt(30), greedy(30), timeout_s=1000.0)
    if state == "waiting for blocks":
        cluster.submit("r", prompt(60, 1), greedy(4), timeout_s=5.0)
        decode.step()
        assert decode.load.waiting == 2
    elif state == "waiting for its cache":
        cluster.submit("r", prompt(30, 1), greedy(4), timeout_s=5.0)
        decode.step()
        assert decode.load.reserved_blocks == 4
    else:
        cluster.submit("r", prompt(30, 1), greedy(30), timeout_s=5.0)
        run_until(cluster, lambda: decode.load.running == 2)
        if state == "preempted":
            run_until(cluster, lambda: decode.load.preempted == 1)
    clock.now += 6.0
    (failed,) = [event for event in decode.step() if isinstance(event, RequestFailed)]
    assert failed.request_id == "r"
    assert isinstance(failed.error, DeadlineExceededError)
    assert where in str(failed.error)
    cluster.abort("r")
    cluster.run()
    assert "old" not in cluster.failures
    cluster.assert_all_blocks_free()


def test_reports(one_pair, clock, steps_ahead):
    cluster, prefill, decode = one_pair()
    cluster.submit("r", prompt(20), greedy(4))
    events = []
    while cluster.busy:
        prefill.step()
        events += decode.step()
        clock.now += 1.0
    assert [type(event) for event in events] == [DecodeReport, TokenOutput, TokenOutput, TokenOutput]
    assert events[0] == DecodeReport("r", first_decode_s=steps_ahead, attempt_id="r"), (
        "the first step came with the cache; what is launched ahead is looked at one step, one second, later"
    )
    assert [event.finish_reason is not None for event in events[1:]] == [False, False, True]


def test_broken_logits_fail_one_sequence_alone(one_pair, monkeypatch, reference_greedy, tiny_checkpoint):
    forward = CausalLM.forward

    def broken(self, input_ids, positions, kv_cache, metadata, on_layer=None):
        hidden = forward(self, input_ids, positions, kv_cache, metadata, on_layer)
        return hidden.masked_fill((positions == 25)[:, None], torch.nan) if metadata[0].decode_only else hidden

    monkeypatch.setattr(CausalLM, "forward", broken)
    cluster, _, _ = one_pair()
    for name, length in (("a", 40), ("broken", 23), ("c", 30)):
        cluster.submit(name, prompt(length), greedy(8))
    checkpoint = tiny_checkpoint("llama")
    expected = {name: reference_greedy(checkpoint, prompt(k), 8) for name, k in (("a", 40), ("c", 30))}
    expected["broken"] = reference_greedy(checkpoint, prompt(23), 3)
    assert cluster.run() == expected
    assert list(cluster.failures) == ["broken"]
    assert isinstance(cluster.failures["broken"], SamplingError)
    cluster.assert_all_blocks_free()


def test_a_lost_prefill_worker_does_not_touch_what_is_running(one_pair, reference_greedy, tiny_checkpoint):
    cluster, _, decode = one_pair()
    cluster.submit("running", prompt(20), greedy(20))
    run_until(cluster, lambda: decode.load.running == 1)
    cluster.submit("waiting", prompt(20, 1), greedy(20))
    for event in decode.step():
        cluster.take(event)
    (lost,) = cluster.prefill
    cluster.prefill.clear()
    cluster.fabric.detach(lost)
    decode.disconnect(lost)
    cluster.run()
    assert cluster.token_ids("running") == reference_greedy(tiny_checkpoint("llama"), prompt(20), 20)
    assert isinstance(cluster.failures["waiting"], HandoffError)
    cluster.assert_all_blocks_free()


def test_a_request_for_a_prefill_worker_that_is_gone_fails_at_once(one_pair):
    cluster, _, decode = one_pair()
    (lost,) = cluster.prefill
    decode.disconnect(lost)
    decode.step()
    cluster.submit("r", prompt(20), greedy(4))
    said = [event for _ in range(3) for event in decode.step()]
    assert [type(event) for event in said] == [RequestFailed]
    assert isinstance(said[0].error, HandoffError)
    assert decode.load.free_blocks == decode.load.total_blocks

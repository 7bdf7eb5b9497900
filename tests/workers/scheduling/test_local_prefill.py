"""Prompts that a decode worker computes itself: the same tokens as with a handoff, beside whatever else it does."""

from __future__ import annotations

import random

import pytest
import torch

from kv_transfer.transports.local import Faults
from workers.decode_worker import DecodeWorker
from workers.errors import CapacityError, DeadlineExceededError, InvalidRequestError, SamplingError
from workers.messages import DecodeReport, FinishReason, PrefillReport, RequestFailed, TokenOutput
from workers.models.causal_lm import CausalLM
from workers.runner.model_runner import ModelRunner
from workers.sampling_params import SamplingParams

SAMPLING = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.1, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.6, "frequency_penalty": 0.7, "presence_penalty": 0.4},
    "logprobs": {"temperature": 0.9, "logprobs": 4},
}


def greedy(max_tokens: int, **kwargs) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, **{"ignore_eos": True, **kwargs})


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


@pytest.fixture
def worker(local_cluster, tiny_checkpoint):
    """`worker(family, **sizes)`: a cluster whose decode worker computes 32 prompt tokens a step, and that worker."""

    def make(family: str = "llama", **kwargs):
        cluster = local_cluster(tiny_checkpoint(family), **{"decode_batched_tokens": 32, **kwargs})
        (decode,) = cluster.decode.values()
        return cluster, decode

    return make


def run_until(cluster, condition, max_steps: int = 5000) -> None:
    for _ in range(max_steps):
        if condition():
            return
        cluster.step()
    raise AssertionError(f"it never happened: {cluster.loads}")


def check_owners(decode: DecodeWorker) -> None:
    """No block that is computed, decoded, promised or still written to is free."""
    held = {block for table in decode.block_tables for block in table}
    assert decode.load.free_blocks <= decode.load.total_blocks - len(held)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 100])
def test_greedy_equals_transformers(length, worker, tiny_checkpoint, reference_greedy):
    cluster, _ = worker()
    cluster.submit_local("r", prompt(length), greedy(12))
    assert cluster.run() == {"r": reference_greedy(tiny_checkpoint("llama"), prompt(length), 12)}
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_sliding_windows_and_fp8_as_with_a_handoff(family, kv_cache_dtype, worker):
    cluster, _ = worker(family, kv_cache_dtype=kv_cache_dtype, max_num_batched_tokens=32, enable_prefix_caching=False)
    cluster.submit("remote", prompt(90), greedy(20))
    cluster.submit_local("local", prompt(90), greedy(20))
    tokens = cluster.run()
    assert tokens["local"] == tokens["remote"]
    assert len(tokens["local"]) == 20


@pytest.mark.parametrize("case", SAMPLING)
def test_whatever_is_sampled_equals_what_comes_with_a_handoff(case, worker):
    cluster, _ = worker()
    sampling = SamplingParams(seed=7, max_tokens=16, ignore_eos=True, **SAMPLING[case])
    cluster.submit("remote", prompt(45), sampling)
    cluster.submit_local("local", prompt(45), sampling)
    cluster.submit_local("other", prompt(70, 1), SamplingParams(seed=1, max_tokens=30, ignore_eos=True))
    cluster.run()
    local, remote = cluster.tokens["local"], cluster.tokens["remote"]
    assert [t.token_id for t in local] == [t.token_id for t in remote]
    assert [t.finish_reason for t in local] == [None] * 15 + [FinishReason.LENGTH]
    for ours, theirs in zip(local, remote, strict=True):
        assert (ours.logprob is None) == ("logprobs" not in SAMPLING[case])
        if ours.logprob is not None:
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [top.token_id for top in ours.top_logprobs] == [top.token_id for top in theirs.top_logprobs]


@pytest.mark.parametrize("case", SAMPLING)
def test_a_request_that_has_output_goes_on_with_it(case, worker):
    cluster, _ = worker()
    sampling = SamplingParams(seed=3, max_tokens=14, ignore_eos=True, **SAMPLING[case])
    cluster.submit_local("whole", prompt(40), sampling)
    whole = cluster.run()["whole"]
    cluster.submit_local("rest", prompt(40) + whole[:6], sampling, num_output_tokens=6)
    assert cluster.run()["rest"] == whole[6:]
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("how", ["max_tokens", "stop token", "context window"])
def test_one_that_ends_with_its_first_token(how, worker, tiny_checkpoint, reference_greedy):
    (first,) = reference_greedy(tiny_checkpoint("llama"), prompt(40), 1)
    cluster, decode = worker(max_model_len=41 if how == "context window" else 512)
    sampling = {
        "max_tokens": greedy(1),
        "stop token": greedy(9, stop_token_ids=(first,)),
        "context window": greedy(9),
    }[how]
    cluster.submit_local("r", prompt(40), sampling)
    assert cluster.run() == {"r": [first]}
    reason = FinishReason.STOP if how == "stop token" else FinishReason.LENGTH
    assert cluster.tokens["r"][0].finish_reason is reason
    assert not decode.has_requests
    cluster.assert_all_blocks_free()


def test_those_that_decode_have_a_token_in_every_step(worker, steps_ahead):
    cluster, decode = worker(decode_batched_tokens=16)
    cluster.submit_local("decodes", prompt(10), greedy(60))
    run_until(cluster, lambda: len(cluster.tokens["decodes"]) == 3)
    cluster.submit_local("long", prompt(200, 1), greedy(4))
    said = []
    while not cluster.tokens["long"]:
        events = decode.step()
        said.append([event.request_id for event in events if isinstance(event, TokenOutput)])
        for event in events:
            cluster.take(event)
    assert len(said) == 13 + steps_ahead, "13 chunks of 16 tokens"
    assert all("decodes" in names for names in said)
    cluster.run()
    assert len(cluster.tokens["decodes"]) == 60


def test_the_report(worker, clock):
    cluster, decode = worker(decode_batched_tokens=16)
    cluster.submit_local("r", prompt(40), greedy(3))
    clock.now += 2.0
    events = []
    while decode.has_work:
        events += decode.step()
        clock.now += 1.0
    assert [type(event) for event in events] == [PrefillReport, TokenOutput, DecodeReport, TokenOutput, TokenOutput]
    report = events[0]
    assert (report.request_id, report.num_chunks, report.cached_tokens) == ("r", 3, 0)
    assert (report.queue_s, report.prefill_s) == (2.0, 2.0), "three chunks, one a step, the clock a second on a step"


def test_the_load_counts_local_prompts(worker):
    cluster, decode = worker(decode_blocks=6, decode_batched_tokens=16)

    def load():
        now = decode.load
        return now.running, now.waiting, now.waiting_tokens, now.free_blocks

    cluster.submit_local("a", prompt(40), greedy(10))
    cluster.submit_local("b", prompt(60, 1), greedy(2))
    assert load() == (0, 2, 100, 6)
    decode.step()
    assert load() == (0, 2, 84, 3), "a chunk of a is on its way or done; b waits for blocks"
    run_until(cluster, lambda: decode.load.running == 1)
    assert load() == (1, 1, 60, 3)
    cluster.abort("a")
    cluster.run()
    assert load() == (0, 0, 0, 6)


def test_a_worker_without_local_prefill_refuses(local_cluster, tiny_checkpoint):
    cluster = local_cluster(tiny_checkpoint("llama"))
    cluster.submit_local("r", prompt(10), greedy(3))
    cluster.run()
    assert isinstance(cluster.failures["r"], InvalidRequestError)
    assert "computes no prompts" in str(cluster.failures["r"])


def test_what_is_wrong_is_refused_at_the_door(worker):
    cluster, _ = worker(decode_blocks=4, max_model_len=512)
    cluster.submit_local("token", [5, 512], greedy(3))
    cluster.submit_local("large", prompt(64), greedy(3))
    cluster.submit_local("long", prompt(512), greedy(3))
    cluster.run()
    assert {name: type(error) for name, error in cluster.failures.items()} == {
        "token": InvalidRequestError,
        "large": CapacityError,
        "long": InvalidRequestError,
    }
    assert "prompt token 512" in str(cluster.failures["token"])


def test_blocks_are_given_in_the_order_of_arrival_wherever_a_prompt_is_computed(worker):
    """Each needs more than half of the memory: no two are there at once, and who came first goes first."""
    cluster, decode = worker(decode_blocks=6)
    for i in range(6):
        submit = cluster.submit_local if i % 2 else cluster.submit
        submit(f"r{i}", prompt(60, i), greedy(3))
    ended = []
    while cluster.busy:
        cluster.step()
        ended += [name for name, tokens in cluster.tokens.items() if len(tokens) == 3 and name not in ended]
    assert ended == [f"r{i}" for i in range(6)]
    assert not cluster.failures
    cluster.assert_all_blocks_free()
    assert not decode.has_requests


def test_a_local_prompt_does_not_overtake_a_remote_one_that_waits_for_blocks(worker):
    cluster, decode = worker(decode_blocks=6)
    cluster.submit_local("first", prompt(40), greedy(30))
    run_until(cluster, lambda: decode.load.running == 1)
    cluster.submit("remote", prompt(60, 1), greedy(3))
    cluster.submit_local("small", prompt(3, 2), greedy(3))
    while len(cluster.tokens["first"]) < 20:
        cluster.step()
        assert len(cluster.tokens["small"]) == 0, "it would fit, but the remote one came before"
    cluster.run()
    assert [len(cluster.tokens[name]) for name in ("first", "remote", "small")] == [30, 3, 3]


@pytest.mark.parametrize("max_num_seqs", [1, 3])
def test_no_more_sequences_than_allowed_are_computed_expected_or_running(max_num_seqs, worker):
    cluster, decode = worker(max_num_seqs=max_num_seqs, decode_batched_tokens=8)
    for i in range(8):
        submit = cluster.submit_local if i % 2 else cluster.submit
        submit(f"r{i}", prompt(12, i), greedy(6))
    most = 0
    while cluster.busy:
        cluster.step()
        most = max(most, decode.load.running + decode.load.reserved_blocks + decode.num_computing)
    assert most == max_num_seqs
    assert all(len(cluster.token_ids(f"r{i}")) == 6 for i in range(8))


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 8, 20])
def test_an_abort_in_any_state_gives_everything_back(steps, worker):
    cluster, decode = worker(decode_batched_tokens=16)
    cluster.submit_local("r", prompt(60), greedy(60))
    for _ in range(steps):
        cluster.step()
    check_owners(decode)
    decode.abort("r")
    check_owners(decode)
    assert [event for _ in range(3) for event in decode.step()] == [], "nothing more is said of an aborted request"
    cluster.run()
    cluster.assert_all_blocks_free()
    assert not decode.has_requests
    assert not decode.has_work


def test_blocks_that_a_step_in_flight_writes_to_are_not_given_away(local_cluster, tiny_checkpoint):
    cluster = local_cluster(tiny_checkpoint("llama"), decode_blocks=6, decode_batched_tokens=16, steps_ahead=1)
    (decode,) = cluster.decode.values()
    cluster.submit_local("a", prompt(60), greedy(4))
    decode.step()
    decode.abort("a")
    cluster.submit("b", prompt(60, 1), greedy(4))
    assert decode.load.free_blocks == 2, "a chunk of a is in flight"
    decode.step()
    assert decode.load.free_blocks == 6
    assert decode.load.reserved_blocks == 0, "b was not granted what the chunk in flight wrote to"
    cluster.run()
    assert len(cluster.tokens["b"]) == 4
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("state", ["waiting", "computing"])
def test_the_deadline_passes(state, worker, clock):
    cluster, decode = worker(decode_blocks=6, decode_batched_tokens=16)
    if state == "waiting":
        cluster.submit_local("holder", prompt(60, 1), greedy(8), timeout_s=1000.0)
        decode.step()
    cluster.submit_local("r", prompt(60), greedy(8), timeout_s=5.0)
    decode.step()
    clock.now += 6.0
    (failed,) = [event for event in decode.step() if isinstance(event, RequestFailed)]
    assert failed.request_id == "r"
    assert isinstance(failed.error, DeadlineExceededError)
    assert "waiting for or computing its prompt" in str(failed.error)
    cluster.run()
    cluster.assert_all_blocks_free()


def test_who_makes_room_loses_no_token(worker, tiny_checkpoint, reference_greedy):
    cluster, decode = worker(decode_blocks=8)
    expected, preempted = {}, 0
    for i in range(6):
        expected[f"r{i}"] = reference_greedy(tiny_checkpoint("llama"), prompt(5 + 4 * i, i), 40)
        submit = cluster.submit_local if i % 2 else cluster.submit
        submit(f"r{i}", prompt(5 + 4 * i, i), greedy(40))
    while cluster.busy:
        cluster.step()
        check_owners(decode)
        preempted = max(preempted, decode.load.preempted)
    assert preempted > 0
    assert {name: cluster.token_ids(name) for name in expected} == expected
    cluster.assert_all_blocks_free()


def test_broken_logits_fail_one_prompt_alone_and_are_not_kept(worker, monkeypatch):
    forward = CausalLM.forward

    def broken(self, input_ids, positions, kv_cache, metadata, on_layer=None):
        hidden = forward(self, input_ids, positions, kv_cache, metadata, on_layer)
        return hidden.masked_fill((positions == 49)[:, None], float("nan"))

    cluster, decode = worker()
    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "forward", broken)
        cluster.submit_local("broken", prompt(50), greedy(4))
        cluster.submit_local("fine", prompt(30, 1), greedy(4))
        cluster.run()
    assert isinstance(cluster.failures["broken"], SamplingError)
    assert len(cluster.tokens["fine"]) == 4
    reports = []
    cluster.submit_local("again", prompt(50), greedy(4))
    while decode.has_work:
        reports += [event for event in decode.step() if isinstance(event, PrefillReport)]
    assert reports[0].cached_tokens == 0
    cluster.assert_all_blocks_free()


def test_prompts_that_begin_alike_are_computed_once(worker, tiny_checkpoint, reference_greedy):
    cluster, decode = worker()
    shared = prompt(64)
    prompts = [shared + prompt(20, seed) for seed in (1, 2)]
    reports = []
    for i, token_ids in enumerate(prompts):
        cluster.submit_local(f"r{i}", token_ids, greedy(6))
        while decode.has_work:
            for event in decode.step():
                cluster.take(event)
                reports += [event] if isinstance(event, PrefillReport) else []
        assert cluster.token_ids(f"r{i}") == reference_greedy(tiny_checkpoint("llama"), token_ids, 6)
    assert [report.cached_tokens for report in reports] == [0, 64]
    cluster.assert_all_blocks_free()


def test_a_mixed_load_with_aborts_leaves_nothing_and_every_answer_is_right(worker, tiny_checkpoint, reference_greedy):
    cluster, decode = worker(
        decode_blocks=24, decode_batched_tokens=24, max_num_seqs=5, faults=Faults(seed=2, max_delay=4)
    )
    rng = random.Random(5)
    asked = {f"r{i}": (prompt(rng.randint(1, 90), i % 7), rng.randint(1, 30)) for i in range(40)}
    pending, aborted, under_way = list(asked), set(), []
    while pending or cluster.busy:
        if pending and rng.random() < 0.4:
            name = pending.pop()
            submit = cluster.submit_local if rng.random() < 0.5 else cluster.submit
            submit(name, asked[name][0], greedy(asked[name][1]))
            under_way.append(name)
        under_way = [name for name in under_way if len(cluster.token_ids(name)) < asked[name][1]]
        if rng.random() < 0.06 and under_way:
            aborted.add(name := rng.choice(under_way))
            under_way.remove(name)
            cluster.abort(name)
        cluster.step()
        check_owners(decode)
    assert 0 < len(aborted) < 20
    for name, (token_ids, length) in asked.items():
        got, expected = cluster.token_ids(name), reference_greedy(tiny_checkpoint("llama"), token_ids, length)
        assert got == (expected[: len(got)] if name in aborted else expected)
    assert not cluster.failures
    cluster.assert_all_blocks_free()


def test_the_chunk_of_a_step_is_bounded(worker, monkeypatch):
    cluster, _ = worker(decode_batched_tokens=24)
    sizes = []
    forward = ModelRunner.forward

    def counting(self, rows, on_layer=None):
        sizes.append(sum(len(row.token_ids) for row in rows))
        return forward(self, rows, on_layer)

    monkeypatch.setattr(ModelRunner, "forward", counting)
    for i in range(5):
        cluster.submit_local(f"r{i}", prompt(30, i), greedy(3))
    cluster.run()
    assert max(sizes) == 24
    assert sum(sizes) == 150


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_gpu_gives_the_same_tokens(enforce_eager, local_cluster, tiny_checkpoint, reference_greedy):
    """Chunks beside decode steps that are replayed as graphs, with preemption, and both sorts of prompts."""
    cluster = local_cluster(
        tiny_checkpoint("llama"),
        device="cuda",
        attention_backend="TRITON_ATTN",
        enforce_eager=enforce_eager,
        decode_blocks=10,
        decode_batched_tokens=24,
    )
    (decode,) = cluster.decode.values()
    expected, preempted = {}, 0
    for i in range(8):
        expected[f"r{i}"] = reference_greedy(tiny_checkpoint("llama"), prompt(5 + 6 * i, i), 40)
        submit = cluster.submit if i % 3 == 2 else cluster.submit_local
        submit(f"r{i}", prompt(5 + 6 * i, i), greedy(40))
    while cluster.busy:
        cluster.step()
        check_owners(decode)
        preempted += decode.load.preempted
    assert preempted
    assert {name: cluster.token_ids(name) for name in expected} == expected
    cluster.assert_all_blocks_free()

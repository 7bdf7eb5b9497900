"""Steps that overlap: the same tokens as step by step, and no block is given away while a step may write to it."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from kv_transfer.transports.local import Faults
from workers.decode_worker import DecodeWorker
from workers.errors import DeadlineExceededError, SamplingError
from workers.messages import FinishReason, RequestFailed, TokenOutput
from workers.models.causal_lm import CausalLM
from workers.runner.decode_runner import DecodeRunner
from workers.sampling_params import SamplingParams


def greedy(max_tokens: int, **kwargs) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, **{"ignore_eos": True, **kwargs})


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


@pytest.fixture
def steps_ahead() -> int:
    """Every cluster here is one step ahead, unless a test says otherwise."""
    return 1


@pytest.fixture
def pair(local_cluster, tiny_checkpoint):
    """`pair(**sizes)`: a cluster with one decode worker, one step ahead, and that worker."""

    def make(**kwargs):
        cluster = local_cluster(tiny_checkpoint("llama"), **kwargs)
        (decode,) = cluster.decode.values()
        return cluster, decode

    return make


@pytest.fixture
def launched(monkeypatch) -> list[int]:
    """The size of every batch that was launched."""
    sizes: list[int] = []
    launch = DecodeRunner.launch

    def counting(self, sequences):
        sizes.append(len(sequences))
        return launch(self, sequences)

    monkeypatch.setattr(DecodeRunner, "launch", counting)
    return sizes


def run_until(cluster, condition, max_steps: int = 5000) -> None:
    for _ in range(max_steps):
        if condition():
            return
        cluster.step()
    raise AssertionError(f"it never happened: {cluster.loads}")


def check_ownership(decode: DecodeWorker) -> None:
    """Every block that a step in flight writes to, or that anybody was promised, has one owner and is not free."""
    owned = Counter(block for table in decode.block_tables for block in table)
    assert not [block for block, count in owned.items() if count > 1], "a block has two owners"
    assert len(owned) == decode.load.total_blocks - decode.load.free_blocks


def test_the_next_step_is_launched_before_a_token_is_looked_at(pair, launched):
    cluster, decode = pair()
    cluster.submit("r", prompt(20), greedy(6))
    run_until(cluster, lambda: launched)
    assert len(cluster.token_ids("r")) == 1, "the first step is in flight; one token came from prefill"
    decode_tokens = []
    while decode.has_work:
        decode_tokens.append(sum(isinstance(event, TokenOutput) for event in decode.step()))
    assert decode_tokens == [1, 1, 1, 1, 1]
    assert launched == [1] * 5, "the end by length is known beforehand: no step too many"


def test_a_context_window_that_ends_is_known_beforehand(pair, launched):
    cluster, _ = pair(max_model_len=32)
    cluster.submit("r", prompt(20), greedy(1000))
    assert len(cluster.run()["r"]) == 12
    assert launched == [1] * 11


def test_a_token_after_the_stop_token_is_dropped(pair, launched, tiny_checkpoint, reference_greedy):
    answer = reference_greedy(tiny_checkpoint("llama"), prompt(20), 12)
    stop = next(token for i, token in enumerate(answer) if i >= 4 and token not in answer[:i])
    end = answer.index(stop) + 1
    cluster, decode = pair(decode_blocks=3)
    cluster.submit("r", prompt(20), greedy(50, stop_token_ids=(stop,)))
    run_until(cluster, lambda: cluster.tokens["r"] and cluster.tokens["r"][-1].finish_reason is not None)
    assert cluster.token_ids("r") == answer[:end]
    assert cluster.tokens["r"][-1].finish_reason is FinishReason.STOP
    assert len(launched) == end, "one step too many"
    assert decode.load.running == 0
    assert decode.load.free_blocks == 1, "the step in flight may still write"
    assert decode.has_work
    assert decode.has_requests
    assert decode.step() == []
    assert decode.load.free_blocks == 3
    assert not decode.has_requests


@pytest.mark.parametrize("how", ["abort", "deadline"])
def test_blocks_of_a_row_in_flight_are_not_granted(how, pair, clock):
    cluster, decode = pair(decode_blocks=3)
    cluster.submit("a", prompt(20), greedy(50), timeout_s=5.0)
    run_until(cluster, lambda: len(cluster.token_ids("a")) == 4)
    cluster.submit("b", prompt(40, 1), greedy(4), timeout_s=1000.0)
    if how == "abort":
        cluster.abort("a")
    else:
        clock.now += 6.0
    events = decode.step()
    failed = [event.error for event in events if isinstance(event, RequestFailed)]
    assert [type(error) for error in failed] == ([DeadlineExceededError] if how == "deadline" else [])
    assert not [event for event in events if isinstance(event, TokenOutput)], "nothing more is said"
    assert decode.load.reserved_blocks == 0, "b was not granted what the step in flight may still write to"
    assert decode.load.free_blocks == 3
    decode.step()
    assert decode.load.reserved_blocks == 3
    cluster.abort("a")  # as the gateway does of a request that failed
    cluster.run()
    assert len(cluster.token_ids("b")) == 4
    cluster.assert_all_blocks_free()


def test_who_makes_room_loses_no_token(pair, tiny_checkpoint, reference_greedy):
    cluster, decode = pair(decode_blocks=7)
    expected, preempted = {}, 0
    for i in range(5):
        expected[f"r{i}"] = reference_greedy(tiny_checkpoint("llama"), prompt(5 + 4 * i, i), 40)
        cluster.submit(f"r{i}", prompt(5 + 4 * i, i), greedy(40))
    while cluster.busy:
        cluster.step()
        check_ownership(decode)
        preempted = max(preempted, decode.load.preempted)
    assert preempted
    assert {name: cluster.token_ids(name) for name in expected} == expected
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_every_block_has_one_owner_under_random_ends(seed, pair, tiny_checkpoint, reference_greedy):
    """Stop tokens, lengths, cancels and preemption in a cache that is too small, with late and repeated messages."""
    rng = random.Random(seed)
    checkpoint = tiny_checkpoint("llama")
    cluster, decode = pair(
        decode_blocks=12, max_num_seqs=6, max_num_batched_tokens=64, faults=Faults(seed=seed, max_delay=4)
    )
    expected: dict[str, list[int]] = {}
    cancelled: set[str] = set()
    preempted = 0
    for number in range(60):
        name, text = f"r{number}", prompt(rng.randint(1, 50), number % 10)
        answer = reference_greedy(checkpoint, text, 24)[: rng.randint(1, 24)]
        stop = rng.random() < 0.5
        last = answer.index(answer[-1]) + 1 if stop else len(answer)
        expected[name] = answer[:last]
        cluster.submit(name, text, greedy(24, stop_token_ids=(answer[-1],)) if stop else greedy(len(answer)))
        for _ in range(rng.randint(0, 10)):
            cluster.step()
            check_ownership(decode)
            preempted += decode.load.preempted
            if decode.running_requests and rng.random() < 0.05:
                cancelled.add(rng.choice(decode.running_requests))
                cluster.abort(rng.choice(sorted(cancelled)))
                check_ownership(decode)
    while cluster.busy:
        cluster.step()
        check_ownership(decode)
    assert preempted
    assert not cluster.failures
    for name, answer in expected.items():
        got = cluster.token_ids(name)
        assert got == (answer[: len(got)] if name in cancelled else answer)
    cluster.assert_all_blocks_free()


ASKING = {
    "sampled": {"temperature": 0.9, "top_p": 0.9, "seed": 7},
    "filtered": {"temperature": 1.1, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "seed": 2**63 + 5, "logprobs": 0},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    "both": {"temperature": 0.8, "presence_penalty": 1.0, "seed": 3, "logprobs": 5},
    "logprobs": {"temperature": 0.0, "logprobs": 2},
    "late": {"temperature": 0.0, "min_tokens": 9, "ignore_eos": False},
}


def test_whatever_rows_ask_for_the_next_step_is_in_flight(pair, tiny_checkpoint, reference_greedy):
    """Sampled, penalised and reporting rows come and go beside greedy ones, as if each were alone."""
    cluster, decode = pair(max_num_seqs=5)
    expected = {"greedy": reference_greedy(tiny_checkpoint("llama"), prompt(20), 30)}
    expected_logprobs = {}
    params = {
        name: SamplingParams(**{"ignore_eos": True, "seed": 0, "max_tokens": 10 + i, **asked})
        for i, (name, asked) in enumerate(ASKING.items())
    }
    for i, (name, sampling) in enumerate(params.items()):
        alone, _ = pair(steps_ahead=0)
        alone.submit(name, prompt(12, i), sampling)
        expected |= alone.run()
        expected_logprobs[name] = [(o.logprob, o.top_logprobs) for o in alone.tokens[name]]
    cluster.submit("greedy", prompt(20), greedy(30))
    run_until(cluster, lambda: decode.num_in_flight)
    for i, (name, sampling) in enumerate(params.items()):
        cluster.submit(name, prompt(12, i), sampling)
    depths = set()
    while cluster.busy:
        cluster.step()
        depths.add(decode.num_in_flight if decode.load.running else 1)
    assert depths == {1}, "no step is looked at before the next is launched"
    assert {name: cluster.token_ids(name) for name in expected} == expected
    for name, logprobs in expected_logprobs.items():
        assert len(logprobs) == len(cluster.tokens[name])
        for (logprob, top), output in zip(logprobs, cluster.tokens[name], strict=True):
            assert output.logprob == (None if logprob is None else pytest.approx(logprob, rel=1e-4))
            assert [t.token_id for t in output.top_logprobs] == [t.token_id for t in top]
            assert [t.logprob for t in output.top_logprobs] == pytest.approx([t.logprob for t in top], rel=1e-4)


def test_marks_of_who_makes_room_come_back_with_it(pair):
    """A penalised sequence is put aside and resumed, with another one in its row and slot meanwhile."""
    sampling = SamplingParams(temperature=0.7, seed=1, frequency_penalty=1.5, max_tokens=40, ignore_eos=True)
    expected, preempted = {}, 0
    for i in range(4):
        alone, _ = pair()
        alone.submit(f"r{i}", prompt(5 + 4 * i, i), sampling)
        expected |= alone.run()
    cluster, decode = pair(decode_blocks=6)
    for i in range(4):
        cluster.submit(f"r{i}", prompt(5 + 4 * i, i), sampling)
    while cluster.busy:
        cluster.step()
        preempted += decode.load.preempted
    assert preempted
    assert {name: cluster.token_ids(name) for name in expected} == expected


def test_broken_logits_fail_a_row_whose_next_step_is_in_flight(pair, monkeypatch, tiny_checkpoint, reference_greedy):
    forward = CausalLM.forward

    def broken(self, input_ids, positions, kv_cache, metadata, on_layer=None):
        hidden = forward(self, input_ids, positions, kv_cache, metadata, on_layer)
        return hidden.masked_fill((positions == 25)[:, None], float("nan")) if metadata[0].decode_only else hidden

    monkeypatch.setattr(CausalLM, "forward", broken)
    cluster, _ = pair()
    cluster.submit("broken", prompt(23), greedy(8))
    cluster.submit("sound", prompt(30, 1), greedy(8))
    checkpoint = tiny_checkpoint("llama")
    expected = {
        "broken": reference_greedy(checkpoint, prompt(23), 3),
        "sound": reference_greedy(checkpoint, prompt(30, 1), 8),
    }
    assert cluster.run() == expected
    assert isinstance(cluster.failures["broken"], SamplingError)
    cluster.assert_all_blocks_free()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_gpu_gives_the_same_tokens(enforce_eager, ahead, local_cluster, pair, tiny_checkpoint, reference_greedy):
    """With preemption, so that blocks go through pinned memory; each sampled row's tokens are those of a CPU."""
    cluster = local_cluster(
        tiny_checkpoint("llama"),
        device="cuda",
        attention_backend="TRITON_ATTN",
        enforce_eager=enforce_eager,
        steps_ahead=ahead,
        decode_blocks=9,
    )
    (decode,) = cluster.decode.values()
    expected, preempted = {}, 0
    for i in range(6):
        expected[f"r{i}"] = reference_greedy(tiny_checkpoint("llama"), prompt(5 + 4 * i, i), 40)
        cluster.submit(f"r{i}", prompt(5 + 4 * i, i), greedy(40))
    for i, (name, asked) in enumerate(ASKING.items()):
        sampling = SamplingParams(**{"ignore_eos": True, "seed": 0, "max_tokens": 30, **asked})
        alone, _ = pair(steps_ahead=0)
        alone.submit(name, prompt(12, i), sampling)
        expected |= alone.run()
        cluster.submit(name, prompt(12, i), sampling)
    while cluster.busy:
        cluster.step()
        check_ownership(decode)
        preempted += decode.load.preempted
    assert preempted
    assert {name: cluster.token_ids(name) for name in expected} == expected
    cluster.assert_all_blocks_free()

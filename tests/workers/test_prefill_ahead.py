"""Prefill steps that overlap: the same tokens, nothing waits that need not, no block is free that a step may write."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from kv_transfer.transports.local import Faults
from made_requests import worker_request
from workers.errors import DeadlineExceededError, HandoffError, SamplingError
from workers.messages import PrefillReport, RequestFailed, TokenOutput, WorkerRequest
from workers.runner.model_runner import ModelRunner
from workers.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=8, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


def alone(request_id: str, token_ids: list[int], sampling: SamplingParams = GREEDY) -> WorkerRequest:
    return worker_request(request_id, token_ids, sampling)


def tokens_of(events) -> list[str]:
    return [event.request_id for event in events if isinstance(event, TokenOutput)]


@pytest.fixture
def steps_ahead() -> int:
    """Of decode: it has tests of its own."""
    return 0


@pytest.fixture
def pair(one_pair):
    """`pair(**sizes)`: a cluster whose prefill worker is one step ahead, that worker, and the decode worker."""

    def make(**kwargs):
        return one_pair(prefill_steps_ahead=1, **kwargs)

    return make


@pytest.fixture
def launched(monkeypatch) -> list[int]:
    """Tokens of every batch that was launched."""
    sizes: list[int] = []
    forward = ModelRunner.forward

    def counting(self, rows, on_layer=None):
        sizes.append(sum(len(row.token_ids) for row in rows))
        return forward(self, rows, on_layer)

    monkeypatch.setattr(ModelRunner, "forward", counting)
    return sizes


def check_ownership(prefill) -> None:
    """No block that a step in flight writes to is free, and none has two owners."""
    owned = Counter(block for table in prefill.block_tables for block in table)
    assert not [block for block, count in owned.items() if count > 1], "a block has two owners"
    assert len(owned) == prefill.load.total_blocks - prefill.load.free_blocks


def test_the_next_batch_is_launched_before_a_token_is_looked_at(pair, launched):
    _, prefill, _ = pair(max_num_batched_tokens=32)
    for name in "abc":
        prefill.add(alone(name, prompt(32)))
    assert tokens_of(prefill.step()) == []
    assert launched == [32]
    assert tokens_of(prefill.step()) == ["a"]
    assert launched == [32, 32]
    assert tokens_of(prefill.step()) == ["b", "c"], "nothing follows: the last step is waited for at once"
    assert not prefill.has_work
    assert not prefill.has_requests
    assert prefill.load.free_blocks == prefill.load.total_blocks


def test_a_lone_prompt_waits_for_no_other_step(pair, launched):
    _, prefill, _ = pair()
    prefill.add(alone("r", prompt(40)))
    assert [type(event) for event in prefill.step()] == [PrefillReport, TokenOutput]
    assert launched == [40]


def test_the_last_chunk_of_a_long_prompt_is_waited_for_at_once(pair, launched):
    _, prefill, _ = pair(max_num_batched_tokens=16)
    prefill.add(alone("r", prompt(40)))
    assert [tokens_of(prefill.step()) for _ in range(3)] == [[], [], ["r"]]
    assert launched == [16, 16, 8]


def test_a_prompt_without_blocks_is_nothing_that_follows(pair):
    """What waits for memory cannot be launched next, so there is nothing to be ahead for."""
    _, prefill, _ = pair(prefill_blocks=4)
    prefill.add(alone("a", prompt(60)))
    prefill.add(alone("b", prompt(60)))
    assert tokens_of(prefill.step()) == ["a"]
    assert tokens_of(prefill.step()) == ["b"]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.8, seed=3, max_tokens=8, ignore_eos=True),
        SamplingParams(temperature=0.0, seed=0, max_tokens=8, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0.0, seed=0, max_tokens=8, ignore_eos=True, repetition_penalty=1.3),
    ],
)
def test_any_sampling_gives_the_tokens_of_step_by_step(sampling, one_pair):
    tokens = []
    for ahead in (0, 1):
        cluster, _, _ = one_pair(prefill_steps_ahead=ahead, max_num_batched_tokens=32)
        for i in range(6):
            cluster.submit(f"r{i}", prompt(20 + i, seed=i), sampling if i % 2 else GREEDY)
        tokens.append(cluster.run())
        cluster.assert_all_blocks_free()
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("seed", range(4))
def test_a_crowd_with_aborts_and_faults(seed, pair, reference_greedy, tiny_checkpoint):
    cluster, prefill, _ = pair(
        max_num_batched_tokens=40, prefill_blocks=16, faults=Faults(seed=seed, max_delay=20), max_num_seqs=4
    )
    rng = random.Random(seed)
    expected, aborted = {}, set()
    for i in range(20):
        tokens = prompt(rng.randint(1, 90), seed=i)
        cluster.submit(f"r{i}", tokens, GREEDY)
        expected[f"r{i}"] = tokens
        for _ in range(rng.randint(0, 3)):
            cluster.step()
            check_ownership(prefill)
        if rng.random() < 0.3:
            aborted.add(victim := f"r{rng.randint(0, i)}")
            cluster.abort(victim)
            check_ownership(prefill)
    while cluster.busy:
        cluster.step()
        check_ownership(prefill)
    checkpoint = tiny_checkpoint("llama")
    for name in expected.keys() - aborted:
        assert cluster.token_ids(name) == reference_greedy(checkpoint, expected[name], 8)
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("decode", [None, "decode"])
def test_an_abort_between_launch_and_collection(decode, pair):
    """Nothing more is said of it, and its blocks are free only when the step is done."""
    cluster, prefill, _ = pair(max_num_batched_tokens=32, prefill_blocks=8)
    if decode is None:
        prefill.add(alone("a", prompt(32)))
    else:
        cluster.submit("a", prompt(32), GREEDY)
    prefill.add(alone("b", prompt(32)))
    assert prefill.step() == []
    blocks = prefill.blocks_in_flight
    assert len(blocks) == 2
    cluster.abort("a")
    prefill.abort("a")
    assert blocks == prefill.blocks_in_flight
    check_ownership(prefill)
    assert tokens_of(prefill.step()) == ["b"]
    assert cluster.run().keys() <= {"b"}
    cluster.assert_all_blocks_free()


def test_a_name_that_is_used_again_gets_its_own_token(pair, reference_greedy, tiny_checkpoint):
    _, prefill, _ = pair(max_num_batched_tokens=32)
    prefill.add(alone("r", prompt(32, seed=1)))
    prefill.add(alone("other", prompt(32)))
    prefill.step()
    prefill.abort("r")
    prefill.add(alone("r", prompt(32, seed=2)))
    events = [event for _ in range(3) for event in prefill.step()]
    (token,) = [e.token_id for e in events if isinstance(e, TokenOutput) and e.request_id == "r"]
    assert token == reference_greedy(tiny_checkpoint("llama"), prompt(32, seed=2), 1)[0]
    assert not prefill.has_requests


def test_the_deadline_passes_between_launch_and_collection(pair, clock):
    cluster, prefill, _ = pair(max_num_batched_tokens=32)
    cluster.submit("a", prompt(32), GREEDY, timeout_s=5.0)
    cluster.submit("b", prompt(32), GREEDY)
    assert prefill.step() == []
    clock.now += 6.0
    events = prefill.step()
    (failed,) = [event for event in events if isinstance(event, RequestFailed)]
    assert failed.request_id == "a"
    assert isinstance(failed.error, DeadlineExceededError)
    assert tokens_of(events) == ["b"]
    check_ownership(prefill)
    cluster.abort("a")
    cluster.run()
    cluster.assert_all_blocks_free()


def test_a_lost_decode_worker_between_launch_and_collection(pair):
    cluster, prefill, _ = pair(max_num_batched_tokens=32)
    cluster.submit("a", prompt(32), GREEDY)
    prefill.add(alone("b", prompt(32)))
    assert prefill.step() == []
    prefill.disconnect(next(iter(cluster.decode)))
    check_ownership(prefill)
    events = prefill.step()
    (failed,) = [event for event in events if isinstance(event, RequestFailed)]
    assert isinstance(failed.error, HandoffError)
    assert tokens_of(events) == ["b"]
    assert prefill.load.free_blocks == prefill.load.total_blocks


def test_broken_logits_fail_one_request_alone(pair, monkeypatch):
    forward = ModelRunner.forward

    def broken(self, rows, on_layer=None):
        logits = forward(self, rows, on_layer).clone()
        for place, row in enumerate(row for row in rows if row.wants_logits):
            if len(row.token_ids) == 23:
                logits[place] = torch.nan
        return logits

    monkeypatch.setattr(ModelRunner, "forward", broken)
    _, prefill, _ = pair(max_num_batched_tokens=64)
    for name, length in (("a", 20), ("broken", 23), ("c", 60)):
        prefill.add(alone(name, prompt(length)))
    events = [event for _ in range(3) for event in prefill.step()]
    assert tokens_of(events) == ["a", "c"]
    (failed,) = [event for event in events if isinstance(event, RequestFailed)]
    assert (failed.request_id, type(failed.error)) == ("broken", SamplingError)
    assert prefill.load.free_blocks == prefill.load.total_blocks


def test_load_counts_a_prompt_in_flight_as_running(pair):
    _, prefill, _ = pair(max_num_batched_tokens=32)
    prefill.add(alone("a", prompt(32)))
    prefill.add(alone("b", prompt(32)))
    prefill.step()
    load = prefill.load
    assert (load.running, load.waiting, load.total_blocks - load.free_blocks) == (1, 1, 2)

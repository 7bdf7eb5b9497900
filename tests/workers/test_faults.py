"""What a handoff survives, and what it must refuse: parts late, reordered, twice, lost, failed; requests cancelled."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from kv_transfer.handoff.messages import Final, Grant, Part, decode, encode
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import KVLayout
from kv_transfer.push_connector import PushConnector
from kv_transfer.transports.base import EngineInfo
from kv_transfer.transports.local import Faults, LocalFabric, LocalTransport
from right_answers import count_completed
from workers.errors import DeadlineExceededError, HandoffError
from workers.sampling_params import SamplingParams


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)


def prompts(count: int, seed: int, longest: int = 70) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 512) for _ in range(rng.randint(1, longest))] for _ in range(count)]


class ImpatientTransport(LocalTransport):
    """A broken transport: takes the last message for the whole handoff, as if transfers kept their order."""

    def __init__(self, fabric: LocalFabric) -> None:
        super().__init__(fabric)
        self.granted: dict[HandoffKey, Grant] = {}

    def register(
        self, engine_id: str, incarnation: int, kv_caches: Sequence[torch.Tensor], layout: KVLayout
    ) -> EngineInfo:
        self.num_layers = layout.num_layers
        return super().register(engine_id, incarnation, kv_caches, layout)

    def send(self, peer: str, message: bytes) -> None:
        super().send(peer, message)
        if isinstance(grant := decode(message), Grant):
            self.granted[grant.key] = grant

    def receive(self) -> list[tuple[str, bytes]]:
        messages: list[tuple[str, bytes]] = []
        for sender, data in super().receive():
            if isinstance(final := decode(data), Final):
                messages += [(sender, encode(part)) for part in self.all_parts(final)]
            messages.append((sender, data))
        return messages

    def all_parts(self, final: Final) -> list[Part]:
        grant = self.granted[final.key]
        (blocks,) = grant.groups  # the model has one cache group
        rectangle = (0, 0, self.num_layers, blocks.first_block, len(blocks.block_ids))
        return [Part(final.key, index, *rectangle) for index in range(final.num_parts)]


class ImpatientConnector(PushConnector):
    def __init__(self, fabric: LocalFabric) -> None:
        super().__init__(ImpatientTransport(fabric), drain_s=0.0, threaded=False)


def test_a_decode_that_does_not_wait_is_caught(tiny_checkpoint, local_cluster, reference_greedy):
    """The harness can see the race at all: without counting, late parts make wrong text."""
    checkpoint = tiny_checkpoint("llama")
    wrong = 0
    for seed in range(5):
        cluster = local_cluster(checkpoint, faults=Faults(seed=seed, max_delay=30), connector_class=ImpatientConnector)
        prompt = prompts(1, seed)[0] * 3
        cluster.submit("r", prompt, greedy(12))
        for _ in range(300):
            cluster.step()
        wrong += cluster.token_ids("r") != reference_greedy(checkpoint, prompt, 12)
    assert wrong >= 4


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 8))])
def test_delay_reordering_and_duplicates_are_harmless(seed, tiny_checkpoint, local_cluster, reference_greedy):
    checkpoint = tiny_checkpoint("qwen3")
    cluster = local_cluster(
        checkpoint,
        num_prefill=2,
        num_decode=2,
        max_num_batched_tokens=24,
        faults=Faults(seed=seed, max_delay=40, duplicate=0.5),
    )
    expected = {}
    for i, prompt in enumerate(prompts(8, seed)):
        expected[f"r{i}"] = reference_greedy(checkpoint, prompt, 10)
        cluster.submit(f"r{i}", prompt, greedy(10))
    assert cluster.run() == expected
    assert not cluster.failures
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("seed", range(4))
def test_a_dropped_part_ends_in_an_error_never_in_text(seed, tiny_checkpoint, local_cluster, reference_greedy, clock):
    checkpoint = tiny_checkpoint("llama")
    cluster = local_cluster(checkpoint, faults=Faults(seed=seed, drop=0.2, max_delay=5))
    expected = {}
    for i, prompt in enumerate(prompts(10, seed)):
        expected[f"r{i}"] = reference_greedy(checkpoint, prompt, 8)
        cluster.submit(f"r{i}", prompt, greedy(8), timeout_s=60.0)
    for _ in range(150):
        cluster.step()
    assert cluster.busy, "nothing but time ends those whose parts are lost"
    clock.now += 61.0
    cluster.run()
    assert cluster.failures
    for request_id, tokens in expected.items():
        got = cluster.token_ids(request_id)
        if request_id in cluster.failures:
            assert isinstance(cluster.failures[request_id], DeadlineExceededError)
            assert got == tokens[:1], "nothing but the first token, which prefill computed"
        else:
            assert got == tokens
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("seed", range(4))
def test_a_failed_part_fails_its_request_alone(seed, tiny_checkpoint, local_cluster, reference_greedy):
    checkpoint = tiny_checkpoint("llama")
    cluster = local_cluster(checkpoint, faults=Faults(seed=seed, fail=0.15, max_delay=5))
    expected = {}
    for i, prompt in enumerate(prompts(10, seed)):
        expected[f"r{i}"] = reference_greedy(checkpoint, prompt, 8)
        cluster.submit(f"r{i}", prompt, greedy(8))
    cluster.run()
    assert cluster.failures
    for request_id, tokens in expected.items():
        if request_id in cluster.failures:
            assert isinstance(cluster.failures[request_id], HandoffError)
            assert cluster.token_ids(request_id) in ([], tokens[:1])
        else:
            assert cluster.token_ids(request_id) == tokens
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_many_handoffs_with_random_cancels(count, tiny_checkpoint, local_cluster, reference_greedy):
    """No block is lost, no answer is wrong: every request ends with a prefix of the right tokens."""
    checkpoint = tiny_checkpoint("llama", num_hidden_layers=2)
    rng = random.Random(5)
    pool = prompts(40, seed=11, longest=60)
    answers = [reference_greedy(checkpoint, prompt, 6) for prompt in pool]
    cluster = local_cluster(
        checkpoint,
        num_prefill=2,
        num_decode=2,
        prefill_blocks=40,
        decode_blocks=24,
        max_num_batched_tokens=96,
        faults=Faults(seed=3, max_delay=6, duplicate=0.2, fail=0.01),
    )
    asked: dict[str, tuple[int, int]] = {}
    cancelled: set[str] = set()
    alive: list[str] = []
    for number in range(count):
        request_id, which, length = f"r{number}", rng.randrange(len(pool)), rng.randint(1, 6)
        asked[request_id] = (which, length)
        cluster.submit(request_id, pool[which], greedy(length))
        alive.append(request_id)
        while len(alive) > 12:
            cluster.step()
            if rng.random() < 0.3:
                victim = rng.choice(alive)
                cancelled.add(victim)
                cluster.abort(victim)
            alive = [
                r
                for r in alive
                if r not in cancelled and r not in cluster.failures and len(cluster.tokens[r]) < asked[r][1]
            ]
    cluster.run()
    completed = count_completed(cluster, asked, answers, cancelled)
    assert completed > count / 3
    assert len(cancelled) > count / 15
    assert cluster.failures
    cluster.assert_all_blocks_free()


def lose_the_first(cluster, pool, peers) -> None:
    """The first worker of a pool is gone, and its peers are told, as the gateway does."""
    lost = next(iter(pool))
    del pool[lost]
    cluster.fabric.detach(lost)
    for worker in peers.values():
        worker.disconnect(lost)


def test_a_lost_prefill_worker_fails_its_handoffs_and_the_blocks_come_back(
    tiny_checkpoint, local_cluster, reference_greedy
):
    checkpoint = tiny_checkpoint("llama")
    cluster = local_cluster(checkpoint, num_prefill=2, faults=Faults(seed=1, max_delay=50))
    pool = prompts(6, seed=12)
    for i, prompt in enumerate(pool):
        cluster.submit(f"r{i}", prompt, greedy(20), prefill=i % 2)
    for _ in range(5):
        cluster.step()
    lose_the_first(cluster, cluster.prefill, cluster.decode)
    cluster.run()
    for i, prompt in enumerate(pool):
        if i % 2:
            assert cluster.token_ids(f"r{i}") == reference_greedy(checkpoint, prompt, 20)
        else:
            assert "is gone" in str(cluster.failures[f"r{i}"])
    cluster.assert_all_blocks_free()


def test_a_lost_decode_worker_fails_its_handoffs_and_the_blocks_come_back(
    tiny_checkpoint, local_cluster, reference_greedy
):
    checkpoint = tiny_checkpoint("llama")
    cluster = local_cluster(checkpoint, num_decode=2, faults=Faults(seed=2, max_delay=50))
    pool = prompts(6, seed=13)
    for i, prompt in enumerate(pool):
        cluster.submit(f"r{i}", prompt, greedy(20), decode=i % 2)
    for _ in range(5):
        cluster.step()
    lose_the_first(cluster, cluster.decode, cluster.prefill)
    cluster.run()
    for i, prompt in enumerate(pool):
        if i % 2:
            assert cluster.token_ids(f"r{i}") == reference_greedy(checkpoint, prompt, 20)
        else:
            assert f"r{i}" in cluster.failures
    cluster.assert_all_blocks_free()


def test_blocks_that_may_still_be_written_to_are_not_reused(tiny_checkpoint, local_cluster):
    """A cancelled handoff's blocks stay quarantined until the prefill worker has confirmed."""
    cluster = local_cluster(tiny_checkpoint("llama"), decode_blocks=4, faults=Faults(seed=0, max_delay=60))
    cluster.submit("a", [5] * 40, greedy(4))
    decode = next(iter(cluster.decode.values()))
    for _ in range(200):
        cluster.step()
        if decode.load.reserved_blocks:
            break
    cluster.abort("a")
    assert decode.load.quarantined_blocks == 3
    cluster.submit("b", [6] * 40, greedy(4))
    seen_quarantine_end = False
    for _ in range(2000):
        cluster.step()
        load = decode.load
        if load.quarantined_blocks:
            assert not load.reserved_blocks, "blocks were granted while another prefill could write to them"
        seen_quarantine_end = seen_quarantine_end or not load.quarantined_blocks
    assert seen_quarantine_end
    assert len(cluster.token_ids("b")) == 4
    cluster.assert_all_blocks_free()

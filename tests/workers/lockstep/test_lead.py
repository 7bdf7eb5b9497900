"""Workers of several ranks: the same tokens as one rank gives, whatever happens, and nothing left behind on any."""

from __future__ import annotations

import random

import pytest

from kv_transfer.errors import LayoutMismatchError
from kv_transfer.transports.local import Faults
from lockstep_cluster import LockstepCluster
from lockstep_load import check_load, greedy, prompts
from workers.lockstep.replica import digest_of
from workers.messages import DecodeReport, Load, PrefillReport, RequestFailed, TokenOutput
from workers.parallel.errors import TensorParallelError
from workers.sampling_params import SamplingParams


@pytest.mark.parametrize(("size", "steps_ahead"), [(2, 0), pytest.param(2, 1, marks=pytest.mark.slow), (4, 1)])
def test_load_aborts_and_preemption_on_all_ranks_alike(size, steps_ahead, tiny_checkpoint, reference_greedy):
    """Too few blocks for the load, parts late and twice, some failed, requests cancelled at any moment."""
    checkpoint = tiny_checkpoint("llama", num_hidden_layers=2)
    rng = random.Random(size)
    pool = prompts(12, seed=21, longest=40)
    answers = [reference_greedy(checkpoint, prompt, 40) for prompt in pool]
    cluster = LockstepCluster(
        checkpoint,
        size=size,
        seed=size,
        prefill_blocks=24,
        decode_blocks=14,
        max_num_batched_tokens=48,
        faults=Faults(seed=size, max_delay=6, duplicate=0.2, fail=0.02),
        steps_ahead=steps_ahead,
    )
    assert check_load(cluster, pool, answers, rng, num_requests=40) > 10


def test_sampled_tokens_are_those_of_one_rank(tiny_checkpoint, local_cluster):
    checkpoint = tiny_checkpoint("llama")
    sampling = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=20, ignore_eos=True, logprobs=2)
    alone, ranks = local_cluster(checkpoint), LockstepCluster(checkpoint, size=2)
    for cluster in (alone, ranks):
        for number, prompt in enumerate(prompts(4, seed=3)):
            cluster.submit(f"r{number}", prompt, sampling)
    assert ranks.run() == alone.run()
    ranks.assert_equal_ranks()


def test_a_handoff_reports_what_all_ranks_moved(tiny_checkpoint, local_cluster):
    checkpoint = tiny_checkpoint("llama")
    alone, ranks = local_cluster(checkpoint), LockstepCluster(checkpoint, size=2)
    for cluster in (alone, ranks):
        cluster.submit("r", [5] * 40, greedy(2))
        cluster.run()
    assert ranks.reports["r"].num_bytes == 2 * alone.reports["r"].num_bytes
    assert ranks.reports["r"].num_parts == 2 * alone.reports["r"].num_parts


@pytest.mark.parametrize("when", [0, 3, 6, 10, 15])
def test_a_lost_prefill_worker_gives_all_ranks_their_blocks_back(when, tiny_checkpoint):
    cluster = LockstepCluster(tiny_checkpoint("llama"), size=2, seed=when, faults=Faults(seed=when, max_delay=8))
    for number, prompt in enumerate(prompts(4, seed=when)):
        cluster.submit(f"r{number}", prompt, greedy(5))
    for _ in range(when):
        cluster.step()
    lost, decode = cluster.sides
    cluster.prefill.clear()
    for engine in lost.engines:
        cluster.fabric.detach(engine.engine_id)
    decode.disconnect(lost.engines[0].engine_id)
    cluster.run()
    for number in range(4):
        failure = cluster.failures.get(f"r{number}")
        if failure is not None:
            assert any(reason in str(failure) for reason in ("is gone", "not connected", "is broken"))
    cluster.assert_all_blocks_free()
    decode.assert_equal_ranks()


@pytest.mark.parametrize("when", [0, 3, 6, 10, 15])
def test_a_lost_decode_worker_gives_all_ranks_their_blocks_back(when, tiny_checkpoint):
    cluster = LockstepCluster(tiny_checkpoint("llama"), size=2, seed=when, faults=Faults(seed=when, max_delay=8))
    for number, prompt in enumerate(prompts(4, seed=when)):
        cluster.submit(f"r{number}", prompt, greedy(5))
    for _ in range(when):
        cluster.step()
    prefill, lost = cluster.sides
    cluster.decode.clear()
    for engine in lost.engines:
        cluster.fabric.detach(engine.engine_id)
    prefill.disconnect(lost.engines[0].engine_id)
    for number in range(4):
        cluster.abort(f"r{number}")
    cluster.run()
    cluster.assert_all_blocks_free()
    prefill.assert_equal_ranks()


def test_another_number_of_ranks_is_refused_with_both(tiny_checkpoint):
    two, four = (LockstepCluster(tiny_checkpoint("llama"), size=size) for size in (2, 4))
    for one, other in ((two, four), (four, two)):
        for connector in one.sides[0].connectors:
            with pytest.raises(LayoutMismatchError, match=r"tp_size is \d here and \d there"):
                connector.handshake(other.sides[1].engines, 1.0)


def test_ranks_that_are_not_equal_are_noticed_at_the_next_step(tiny_checkpoint):
    cluster = LockstepCluster(tiny_checkpoint("llama"), size=2)
    decode = cluster.sides[1]
    cluster.submit("r", [5] * 20, greedy(50))
    while len(cluster.token_ids("r")) < 3:
        cluster.step()
    decode.replicas[1].worker.abort("r")
    decode.lead.step()
    with pytest.raises(TensorParallelError, match="no longer equal"):
        decode.lead.step()


def test_a_digest_tells_outcomes_apart():
    load = Load(8, 4, running=1)
    token = TokenOutput("a", 7, attempt_id="a")
    outcomes = [
        (load, []),
        (load, [token]),
        (load, [TokenOutput("a", 8, attempt_id="a")]),
        (load, [TokenOutput("b", 7, attempt_id="b")]),
        (load, [token, TokenOutput("b", 7, attempt_id="b")]),
        (load, [TokenOutput("b", 7, attempt_id="b"), token]),
        (load, [RequestFailed("a", ValueError(), attempt_id="a")]),
        (Load(8, 3, running=1), [token]),
    ]
    assert len({digest_of(*outcome) for outcome in outcomes}) == len(outcomes)
    assert digest_of(load, [PrefillReport("a", 0.1, 0.2, 1, attempt_id="a")]) == digest_of(
        load, [PrefillReport("a", 0.3, 0.4, 1, attempt_id="a")]
    )
    assert digest_of(load, [DecodeReport("a", 0.1, attempt_id="a")]) == digest_of(
        load, [DecodeReport("a", 0.2, attempt_id="a")]
    )


def test_samples_part_on_all_ranks_alike(tiny_checkpoint):
    """They share blocks, make room and come back; the tokens are those of one rank."""
    checkpoint = tiny_checkpoint("llama", num_hidden_layers=2)
    sampling = SamplingParams(temperature=1.1, seed=5, n=3, max_tokens=24, ignore_eos=True)
    prompt = [token for part in prompts(9, seed=2) for token in part][:75]
    answers = []
    for size in (1, 2):
        cluster = LockstepCluster(checkpoint, size=size, seed=size, prefill_blocks=24, decode_blocks=8)
        cluster.submit("r", prompt, sampling)
        preempted = 0
        while cluster.busy:
            cluster.step()
            preempted += sum(load.preempted for load in cluster.loads.values())
        assert preempted > 0
        assert not cluster.failures
        answers.append([[o.token_id for o in cluster.tokens["r"] if o.index == i] for i in range(3)])
        cluster.assert_all_blocks_free()
    assert answers[0] == answers[1]
    assert [len(sample) for sample in answers[0]] == [24] * 3

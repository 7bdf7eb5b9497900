"""Several samples of one prompt: each is what a request of its own would give, from a prompt computed and sent once."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from workers.errors import CapacityError, InvalidRequestError
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams

FAMILIES = {
    "llama": {},
    "gemma2": {"block_size": 8},  # windows beside full attention
    "gpt_oss": {"block_size": 16},  # the same, with sinks
    "deepseek_v2": {"block_size": 16},  # latents
}


def sampled(n: int, max_tokens: int = 12, **others) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.2, "seed": 2**64 - 2, "n": n, "max_tokens": max_tokens, **others})


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def by_sample(cluster, name: str) -> list[list[int]]:
    """The tokens of each sample of a request."""
    outputs = cluster.tokens[name]
    samples = [[o.token_id for o in outputs if o.index == i] for i in range(1 + max(o.index for o in outputs))]
    assert sum(map(len, samples)) == len(outputs)
    return samples


def one_by_one(cluster, token_ids: list[int], sampling: SamplingParams) -> list[list[int]]:
    """The same samples as requests of their own, one after the other."""
    answers = []
    for index in range(sampling.n):
        name = f"alone {index} of {len(token_ids)} {sampling.seed}"
        cluster.submit(name, token_ids, sampling.of_sample(index))
        cluster.run()
        answers.append(cluster.token_ids(name))
    return answers


@pytest.mark.parametrize("where", ["handed over", "computed here"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_sample_is_what_a_request_with_its_seed_gives(family, where, local_cluster, tiny_checkpoint):
    """With and without a half-full block at the prompt's end, and beside each other."""
    settings = {"decode_batched_tokens": 24, "max_num_batched_tokens": 24, **FAMILIES[family]}
    cluster = local_cluster(tiny_checkpoint(family), **settings)
    asked = {f"r{length}": (prompt(length, length), sampled(3, seed=length)) for length in (1, 31, 48)}
    for name, (token_ids, sampling) in asked.items():
        (cluster.submit if where == "handed over" else cluster.submit_local)(name, token_ids, sampling)
    cluster.run()
    assert not cluster.failures
    for name, (token_ids, sampling) in asked.items():
        samples = by_sample(cluster, name)
        assert samples == one_by_one(cluster, token_ids, sampling)
        assert len({tuple(sample) for sample in samples}) == 3, "they are different answers"
    cluster.assert_all_blocks_free()


def test_the_first_sample_is_the_answer_of_one(local_cluster, tiny_checkpoint):
    cluster = local_cluster(tiny_checkpoint("llama"))
    cluster.submit("one", prompt(20), replace(sampled(1), seed=5))
    cluster.submit("three", prompt(20), replace(sampled(3), seed=5))
    tokens = cluster.run()
    assert by_sample(cluster, "three")[0] == tokens["one"]
    assert sampled(3).of_sample(2).seed == 0, "seeds are counted modulo 2^64"


def test_the_prompt_is_handed_over_once_and_its_blocks_are_shared(local_cluster, tiny_checkpoint):
    cluster = local_cluster(tiny_checkpoint("llama"), block_size=16)
    (decode,) = cluster.decode.values()
    cluster.submit("one", prompt(56), sampled(1))
    cluster.run()
    cluster.submit("many", prompt(56, 1), sampled(8))
    most = 0
    while cluster.busy:
        cluster.step()
        most = max(most, decode.load.total_blocks - decode.load.free_blocks)
    assert cluster.reports["many"].num_bytes == cluster.reports["one"].num_bytes
    assert most == 3 + 8 * 2, "three full blocks for all, one half full and one behind it for each"
    assert cluster.decode_reports["many"].cached_tokens == 0
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("caching", [True, False])
def test_samples_make_room_and_come_back(caching, local_cluster, tiny_checkpoint):
    """There is room for their beginning alone: all but a few are in host memory for most of the time."""
    sizes = {"decode_blocks": 12, "block_size": 8, "enable_prefix_caching": caching}
    cluster = local_cluster(tiny_checkpoint("llama"), **sizes)
    (decode,) = cluster.decode.values()
    cluster.submit("r", prompt(45), sampled(5, 30))
    preempted = 0
    while cluster.busy:
        cluster.step()
        preempted = max(preempted, decode.load.preempted)
    assert preempted >= 2
    samples = by_sample(cluster, "r")
    cluster.assert_all_blocks_free()
    assert samples == one_by_one(cluster, prompt(45), sampled(5, 30))


def test_samples_for_which_there_is_no_room_when_they_part_wait_in_host_memory(local_cluster, tiny_checkpoint):
    cluster = local_cluster(tiny_checkpoint("llama"), decode_blocks=16, block_size=8, max_num_batched_tokens=8)
    (decode,) = cluster.decode.values()
    cluster.submit("long", prompt(30, 1), sampled(1, 60))
    cluster.submit("r", prompt(45), sampled(4, 10))
    preempted_before_decoding = 0
    while cluster.busy:
        cluster.step()
        if cluster.tokens["r"] and len(cluster.tokens["r"]) == 4:
            preempted_before_decoding = max(preempted_before_decoding, decode.load.preempted)
    samples = by_sample(cluster, "r")
    assert samples == one_by_one(cluster, prompt(45), sampled(4, 10))
    cluster.assert_all_blocks_free()


def test_steps_ahead_and_prefix_hits(local_cluster, tiny_checkpoint):
    cluster = local_cluster(tiny_checkpoint("llama"), steps_ahead=2, prefill_steps_ahead=1)
    expected = one_by_one(cluster, prompt(70), sampled(3))
    cluster.submit("again", prompt(70), sampled(3))
    cluster.submit("longer", prompt(70) + expected[1][:5], sampled(2))
    cluster.run()
    assert by_sample(cluster, "again") == expected
    assert cluster.decode_reports["again"].cached_tokens == 64
    assert by_sample(cluster, "longer") == one_by_one(cluster, prompt(70) + expected[1][:5], sampled(2))
    cluster.assert_all_blocks_free()


def test_samples_end_each_for_itself(local_cluster, tiny_checkpoint):
    """One by a stop token, maybe its first one; the others go on to their limit, and the finish reasons say so."""
    cluster = local_cluster(tiny_checkpoint("llama"))
    free = one_by_one(cluster, prompt(40), sampled(4, ignore_eos=True))
    for stop in (free[0][0], free[2][0], free[1][4]):
        sampling = sampled(4, ignore_eos=True, stop_token_ids=(stop,))
        name = f"stop {stop}"
        cluster.submit(name, prompt(40), sampling)
        cluster.run()
        for index, (sample, whole) in enumerate(zip(by_sample(cluster, name), free, strict=True)):
            end = whole.index(stop) + 1 if stop in whole else len(whole)
            assert sample == whole[:end]
            last = [o for o in cluster.tokens[name] if o.index == index][-1]
            assert last.finish_reason is (FinishReason.STOP if stop in whole else FinishReason.LENGTH)
        cluster.assert_all_blocks_free()


@pytest.mark.parametrize("when", ["before", "after"])
def test_one_sample_is_stopped_and_the_others_go_on(when, local_cluster, tiny_checkpoint):
    cluster = local_cluster(tiny_checkpoint("llama"), max_num_batched_tokens=16)
    (decode,) = cluster.decode.values()
    free = one_by_one(cluster, prompt(40), sampled(3))
    cluster.submit("r", prompt(40), sampled(3))
    while when == "after" and len(cluster.tokens["r"]) < 12:
        cluster.step()
    decode.abort("r", 0)
    cluster.run()
    samples = by_sample(cluster, "r")
    assert samples[1:] == free[1:]
    assert len(samples[0]) < len(free[0])
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("steps", [0, 2, 6, 12])
def test_a_request_is_aborted_with_all_of_its_samples(steps, local_cluster, tiny_checkpoint):
    cluster = local_cluster(tiny_checkpoint("gemma2"), max_num_batched_tokens=16, steps_ahead=1)
    cluster.submit("r", prompt(40), sampled(4, 40))
    for _ in range(steps):
        cluster.step()
    cluster.abort("r")
    cluster.run()
    cluster.assert_all_blocks_free()


def test_what_does_not_fit_is_refused_with_the_value_and_the_limit(local_cluster, tiny_checkpoint):
    cluster = local_cluster(tiny_checkpoint("llama"), max_num_seqs=4, decode_blocks=6)
    cluster.submit("places", prompt(10), sampled(5))
    cluster.submit("blocks", prompt(70), sampled(4))
    cluster.run()
    assert isinstance(cluster.failures["places"], CapacityError)
    assert "n is 5" in str(cluster.failures["places"])
    assert "at most 4" in str(cluster.failures["places"])
    assert "n = 4 samples need 8 KV blocks, a decode worker has 6" in str(cluster.failures["blocks"])
    with pytest.raises(InvalidRequestError, match="n is 2, it must be 1 for greedy"):
        SamplingParams(temperature=0.0, n=2)
    with pytest.raises(InvalidRequestError, match="n is 0"):
        SamplingParams(n=0)

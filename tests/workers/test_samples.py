"""Several samples of one prompt: each is what a request of its own would give, from a prompt computed and sent once."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from local_cluster import LocalCluster
from workers.errors import CapacityError, InvalidRequestError
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams

CASES = [
    ("llama", "handed over", {"steps_ahead": 1}),
    ("llama", "computed here", {"block_size": 32}),
    ("gemma2", "computed here", {"block_size": 8, "steps_ahead": 1}),  # windows beside full attention
    ("gpt_oss", "handed over", {}),  # the same, with sinks
    ("deepseek_v2", "handed over", {}),  # latents
]


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


@pytest.mark.parametrize(("family", "where", "settings"), CASES)
def test_each_sample_is_what_a_request_with_its_seed_gives(family, where, settings, tiny_checkpoint):
    """With and without a half-full block at the prompt's end and penalties for what each has said."""
    cluster = LocalCluster(tiny_checkpoint(family), decode_batched_tokens=24, max_num_batched_tokens=24, **settings)
    penalties = {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "min_tokens": 4}
    asked = {"half": (prompt(27), sampled(3, 8, seed=1)), "full": (prompt(48, 1), sampled(3, 8, seed=7, **penalties))}
    for name, (token_ids, sampling) in asked.items():
        (cluster.submit if where == "handed over" else cluster.submit_local)(name, token_ids, sampling)
    cluster.run()
    assert not cluster.failures
    for name, (token_ids, sampling) in asked.items():
        samples = by_sample(cluster, name)
        assert samples == one_by_one(cluster, token_ids, sampling)
        assert len({tuple(sample) for sample in samples}) == 3, "they are different answers"
    cluster.assert_all_blocks_free()


def test_the_first_sample_is_the_answer_of_one(tiny_checkpoint):
    cluster = LocalCluster(tiny_checkpoint("llama"))
    cluster.submit("one", prompt(20), replace(sampled(1), seed=5))
    cluster.submit("three", prompt(20), replace(sampled(3), seed=5))
    tokens = cluster.run()
    assert by_sample(cluster, "three")[0] == tokens["one"]
    assert sampled(3).of_sample(2).seed == 0, "seeds are counted modulo 2^64"


def test_the_prompt_is_handed_over_once_and_its_blocks_are_shared(tiny_checkpoint):
    cluster = LocalCluster(tiny_checkpoint("llama"), block_size=16)
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
def test_samples_make_room_and_come_back(caching, tiny_checkpoint):
    """There is room for their beginning alone: all but a few are in host memory for most of the time."""
    sizes = {"decode_blocks": 10, "block_size": 8, "enable_prefix_caching": caching}
    cluster = LocalCluster(tiny_checkpoint("llama"), **sizes)
    (decode,) = cluster.decode.values()
    cluster.submit("r", prompt(45), sampled(4, 14))
    preempted = 0
    while cluster.busy:
        cluster.step()
        preempted = max(preempted, decode.load.preempted)
    assert preempted >= 2
    samples = by_sample(cluster, "r")
    cluster.assert_all_blocks_free()
    assert samples == one_by_one(cluster, prompt(45), sampled(4, 14))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_samples_for_which_there_is_no_room_when_they_part_wait_in_host_memory(family, tiny_checkpoint):
    """Others have grown into it while the prompt was computed."""
    cluster = LocalCluster(tiny_checkpoint(family), decode_blocks=14, block_size=8, max_num_batched_tokens=4)
    (decode,) = cluster.decode.values()
    cluster.submit("long", prompt(23, 1), sampled(1, 60))
    while not cluster.tokens["long"]:
        cluster.step()
    cluster.submit("r", prompt(45), sampled(5, 6))
    while len(cluster.tokens["r"]) < 5:
        assert decode.load.preempted == 0
        cluster.step()
    while decode.load.waiting:
        cluster.step()
    assert 0 < decode.load.preempted < 5
    cluster.run()
    samples = by_sample(cluster, "r")
    assert samples == one_by_one(cluster, prompt(45), sampled(5, 6))
    cluster.assert_all_blocks_free()


def test_steps_ahead_and_prefix_hits(tiny_checkpoint):
    cluster = LocalCluster(tiny_checkpoint("llama"), steps_ahead=2, prefill_steps_ahead=1)
    expected = one_by_one(cluster, prompt(70), sampled(3))
    cluster.submit("again", prompt(70), sampled(3))
    cluster.submit("longer", prompt(70) + expected[1][:5], sampled(2))
    cluster.run()
    assert by_sample(cluster, "again") == expected
    assert cluster.decode_reports["again"].cached_tokens == 64
    assert by_sample(cluster, "longer") == one_by_one(cluster, prompt(70) + expected[1][:5], sampled(2))
    cluster.assert_all_blocks_free()


def test_samples_end_each_for_itself(tiny_checkpoint):
    """One by a stop token, maybe its first one; the others go on to their limit, and the finish reasons say so."""
    cluster = LocalCluster(tiny_checkpoint("llama"))
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
def test_one_sample_is_stopped_and_the_others_go_on(when, tiny_checkpoint):
    cluster = LocalCluster(tiny_checkpoint("llama"), max_num_batched_tokens=16)
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


def test_a_request_is_aborted_with_all_of_its_samples(tiny_checkpoint):
    cluster = LocalCluster(tiny_checkpoint("gemma2"), max_num_batched_tokens=16, steps_ahead=1)
    for steps in (0, 2, 6, 12):
        cluster.submit(f"after {steps}", prompt(40), sampled(4, 40))
        for _ in range(steps):
            cluster.step()
        cluster.abort(f"after {steps}")
        cluster.run()
        cluster.assert_all_blocks_free()


def test_what_does_not_fit_is_refused_with_the_value_and_the_limit(tiny_checkpoint):
    cluster = LocalCluster(tiny_checkpoint("llama"), max_num_seqs=4, decode_blocks=6)
    cluster.submit("places", prompt(10), sampled(5))
    cluster.submit("blocks", prompt(70), sampled(4))
    cluster.run()
    assert isinstance(cluster.failures["places"], CapacityError)
    assert "n is 5" in str(cluster.failures["places"])
    assert "at most 4" in str(cluster.failures["places"])
    assert "n = 4 samples need 8 KV blocks, a decode worker has 6" in str(cluster.failures["blocks"])
    with pytest.raises(InvalidRequestError, match="n is 0"):
        SamplingParams(n=0)

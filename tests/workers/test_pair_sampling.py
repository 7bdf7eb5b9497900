"""The handoff changes nothing in what is sampled: the first token, from prefill, obeys the same parameters."""

from __future__ import annotations

import random

import pytest

from cache_groups import group_caches
from long_tails import slow_unless
from workers.messages import TokenOutput
from workers.runner.model_runner import ModelRunner, Row
from workers.sampling.sampler import sample
from workers.sampling.state import SamplingState, finish_reason
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

PROMPT = [random.Random(21).randrange(3, 512) for _ in range(45)]
MAX_MODEL_LEN = 512

CASES = {
    "temperature": {"temperature": 1.3},
    "top_p": {"top_p": 0.4},
    "top_k": {"top_k": 3},
    "min_p": {"min_p": 0.2},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.5},
    "repetition": {"repetition_penalty": 1.8},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.8, "frequency_penalty": 0.7},
    "all": {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.2},
    "logprobs": {"temperature": 0.9, "logprobs": 4},
}


def in_one_process(model, sampling: SamplingParams) -> list[TokenOutput]:
    """The same request on one runner: no handoff, nothing else in the batch."""
    runner = ModelRunner(model, group_caches(model, MAX_MODEL_LEN // model.block_size))
    blocks = [range(MAX_MODEL_LEN // model.block_size)]
    state = SamplingState(sampling, as_token_ids(PROMPT), frozenset(model.config.eos_token_ids), MAX_MODEL_LEN)
    outputs: list[TokenOutput] = []
    tokens, start = PROMPT, 0
    while not outputs or outputs[-1].finish_reason is None:
        (chosen,) = sample(runner.forward([Row(tokens, start, blocks)]), [state])
        state.output_token_ids.append(chosen.token_id)
        outputs.append(TokenOutput("r", *chosen, finish_reason(state), attempt_id="r"))
        start += len(tokens)
        tokens = [chosen.token_id]
    return outputs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", slow_unless((0).__eq__, [0, 1]))
def test_the_handoff_changes_nothing(case, seed, tiny_checkpoint, local_cluster):
    cluster = local_cluster(tiny_checkpoint("llama"), max_num_batched_tokens=20)
    sampling = SamplingParams(seed=seed, max_tokens=24, ignore_eos=True, **CASES[case])
    cluster.submit("other", PROMPT[:30], SamplingParams(seed=9, max_tokens=12, ignore_eos=True))
    cluster.submit("r", PROMPT, sampling)
    cluster.run()
    expected = in_one_process(cluster.model, sampling)
    got = cluster.tokens["r"]
    assert [output.token_id for output in got] == [output.token_id for output in expected]
    assert got[-1].finish_reason == expected[-1].finish_reason
    for output, reference in zip(got, expected, strict=True):
        assert (output.logprob is None) == ("logprobs" not in CASES[case])
        if output.logprob is not None:
            assert output.logprob == pytest.approx(reference.logprob, abs=1e-4)
            assert [top.token_id for top in output.top_logprobs] == [top.token_id for top in reference.top_logprobs]


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 5])
def test_the_first_token_obeys_min_tokens_too(min_tokens, tiny_checkpoint, local_cluster):
    """Every token that greedy decoding would choose ends the text, so only `min_tokens` keeps it going."""
    cluster = local_cluster(tiny_checkpoint("llama"))
    greedy = in_one_process(cluster.model, SamplingParams(temperature=0.0, seed=0, max_tokens=8, ignore_eos=True))
    stops = tuple({output.token_id for output in greedy})
    sampling = SamplingParams(
        temperature=0.0, seed=0, max_tokens=20, ignore_eos=True, stop_token_ids=stops, min_tokens=min_tokens
    )
    cluster.submit("r", PROMPT, sampling)
    cluster.run()
    got = cluster.token_ids("r")
    assert got == [output.token_id for output in in_one_process(cluster.model, sampling)]
    assert not set(got[:min_tokens]) & set(stops)
    if min_tokens == 0:
        assert got == [greedy[0].token_id]

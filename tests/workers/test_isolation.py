"""One sequence's broken logits are its own affair."""

from __future__ import annotations

import pytest
import torch

from workers.errors import SamplingError
from workers.sampling.results import SampledToken
from workers.sampling.sampler import launch_sample, sample
from workers.sampling.state import SamplingState
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

PARAMS = [
    SamplingParams(temperature=0.0, seed=1),
    SamplingParams(temperature=0.8, seed=2, top_k=10),
    SamplingParams(temperature=0.0, seed=3, logprobs=2),
    SamplingParams(temperature=1.0, seed=4, repetition_penalty=1.2, top_p=0.9),
]


def states() -> list[SamplingState]:
    return [SamplingState(params, as_token_ids((1, 2)), frozenset({0}), 100) for params in PARAMS]


def logits() -> torch.Tensor:
    return torch.randn(4, 50, generator=torch.Generator().manual_seed(0))


def sample_isolated(logits: torch.Tensor, states: list[SamplingState]) -> list[SampledToken | SamplingError]:
    return launch_sample(logits, states).tokens(states)


def test_a_sound_batch_is_sampled_as_ever():
    assert sample_isolated(logits(), states()) == sample(logits(), states())


def test_an_empty_batch():
    assert sample_isolated(torch.empty(0, 50), []) == []


@pytest.mark.parametrize("broken", [{0}, {1}, {3}, {0, 2}, {0, 1, 2, 3}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_others_get_the_tokens_they_would_have_got(broken, value):
    expected = sample(logits(), states())
    bad = logits()
    for row in broken:
        bad[row, 7] = value
    results = sample_isolated(bad, states())
    for row, result in enumerate(results):
        if row in broken:
            assert isinstance(result, SamplingError)
            assert "NaN or infinity" in str(result)
        else:
            assert result == expected[row]


def test_a_row_in_which_everything_is_masked():
    bad = logits()
    bad[1] = float("-inf")
    results = sample_isolated(bad, states())
    assert [type(result) for result in results] == [SampledToken, SamplingError, SampledToken, SampledToken]

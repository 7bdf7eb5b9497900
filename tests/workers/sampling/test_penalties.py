"""Penalties against transformers (repetition) and plain loops (frequency, presence)."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from workers.sampling.params import SamplingParams
from workers.sampling.penalties import TokenHistory, apply_penalties

VOCAB_SIZE = 50


def reference(logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    penalised: list[float] = logits.tolist()
    for token in set(prompt + output):
        scale = params.repetition_penalty
        penalised[token] = penalised[token] / scale if penalised[token] > 0 else penalised[token] * scale
    for token, count in Counter(output).items():
        penalised[token] -= params.frequency_penalty * count
        penalised[token] -= params.presence_penalty
    return penalised


def history_of(prompt: list[int], output: list[int]) -> TokenHistory:
    history = TokenHistory(prompt)
    history.update(output)
    return history


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(repetition_penalty=0.5),
        SamplingParams(frequency_penalty=0.8),
        SamplingParams(presence_penalty=-1.5),
        SamplingParams(repetition_penalty=1.2, frequency_penalty=-0.3, presence_penalty=1.1),
    ],
    ids=["repetition", "repetition below 1", "frequency", "presence", "all"],
)
def test_each_penalty_equals_a_plain_loop(params: SamplingParams) -> None:
    rng = random.Random(3)
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(20)]
    output = [rng.randrange(VOCAB_SIZE) for _ in range(30)]
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    expected = reference(logits[0], params, prompt, output)
    apply_penalties(logits, [0], [params], [history_of(prompt, output)])
    torch.testing.assert_close(logits[0], torch.tensor(expected))


def test_repetition_equals_transformers() -> None:
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    tokens = [1, 2, 3, 3, 7]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), logits.clone())
    apply_penalties(logits, [0], [SamplingParams(repetition_penalty=1.3)], [history_of(tokens[:3], tokens[3:])])
    torch.testing.assert_close(logits, expected)


def test_rows_of_a_batch_are_penalised_on_their_own() -> None:
    batch = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    before = batch.clone()
    params = [SamplingParams(presence_penalty=1.0), SamplingParams(repetition_penalty=2.0)]
    texts = [([], [5, 5, 6]), ([5, 9], [])]
    apply_penalties(batch, [3, 1], params, [history_of(*text) for text in texts])
    torch.testing.assert_close(batch[3], torch.tensor(reference(before[3], params[0], *texts[0])))
    torch.testing.assert_close(batch[1], torch.tensor(reference(before[1], params[1], *texts[1])))
    assert torch.equal(batch[[0, 2]], before[[0, 2]])


def test_history_follows_tokens_that_are_added_and_taken_back() -> None:
    history = TokenHistory([4, 4, 2])
    output = [4, 7]
    history.update(output)
    output.append(7)
    history.update(output)
    assert dict(zip(history.token_ids.tolist(), history.output_counts.tolist(), strict=True)) == {2: 0, 4: 1, 7: 2}
    history.update([7])
    assert dict(zip(history.token_ids.tolist(), history.output_counts.tolist(), strict=True)) == {2: 0, 4: 0, 7: 1}


def test_masked_tokens_stay_masked() -> None:
    logits = torch.full((1, VOCAB_SIZE), float("-inf"))
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=-2.0, presence_penalty=-2.0)
    apply_penalties(logits, [0], [params], [history_of([1], [2, 2])])
    assert torch.equal(logits, torch.full((1, VOCAB_SIZE), float("-inf")))

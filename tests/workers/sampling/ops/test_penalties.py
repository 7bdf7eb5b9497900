"""Masks and penalties by marks, against transformers (repetition) and plain loops (frequency, presence)."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from workers.sampling.ops.penalties import OUTPUT, PROMPT, STOP, TokenMarks, apply_marks
from workers.sampling.ops.row_params import pack, unpack
from workers.sampling.state import SamplingState
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

VOCAB_SIZE = 50
CPU = torch.device("cpu")


def reference(logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    penalised: list[float] = logits.tolist()
    for token in set(prompt + output):
        scale = params.repetition_penalty
        penalised[token] = penalised[token] / scale if penalised[token] > 0 else penalised[token] * scale
    for token, count in Counter(output).items():
        penalised[token] -= params.frequency_penalty * count
        penalised[token] -= params.presence_penalty
    return penalised


def state(prompt: list[int], output: list[int], **params: Any) -> SamplingState:
    return SamplingState(SamplingParams(seed=0, **params), as_token_ids(prompt), frozenset({2}), 1000, output)


def marked(logits: torch.Tensor, states: list[SamplingState]) -> torch.Tensor:
    marks = TokenMarks(VOCAB_SIZE, CPU)
    slots = marks.claim(states)
    num_output = torch.tensor([len(s.output_token_ids) for s in states])
    return apply_marks(logits, marks.tensor[slots], unpack(pack(states, slots, VOCAB_SIZE)), num_output)


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.5},
        {"frequency_penalty": 0.8},
        {"presence_penalty": -1.5},
        {"repetition_penalty": 1.2, "frequency_penalty": -0.3, "presence_penalty": 1.1},
    ],
    ids=str,
)
def test_each_penalty_equals_a_plain_loop(params: dict[str, float]) -> None:
    rng = random.Random(3)
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(20)]
    output = [rng.randrange(VOCAB_SIZE) for _ in range(30)]
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    sequence = state(prompt, output, **params)
    expected = torch.tensor([reference(logits[0], sequence.params, prompt, output)])
    torch.testing.assert_close(marked(logits, [sequence]), expected)


def test_repetition_equals_transformers() -> None:
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    tokens = [1, 2, 3, 3, 7]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), logits.clone())
    torch.testing.assert_close(marked(logits, [state(tokens[:3], tokens[3:], repetition_penalty=1.3)]), expected)


def test_rows_of_a_batch_are_penalised_on_their_own() -> None:
    batch = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    states = [state([], [5, 5, 6], presence_penalty=1.0), state([5, 9], [], repetition_penalty=2.0)]
    expected = [
        reference(row, s.params, list(s.prompt_token_ids), s.output_token_ids)
        for row, s in zip(batch, states, strict=True)
    ]
    torch.testing.assert_close(marked(batch, states), torch.tensor(expected))


def test_masked_tokens_stay_masked() -> None:
    logits = torch.full((1, VOCAB_SIZE), float("-inf"))
    sequence = state([1], [2, 2], repetition_penalty=2.0, frequency_penalty=-2.0, presence_penalty=-2.0)
    assert torch.equal(marked(logits, [sequence]), logits)


def test_stop_tokens_are_masked_until_there_are_enough() -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    params = {"min_tokens": 2, "stop_token_ids": (7, 10**9), "ignore_eos": True}
    masked = marked(logits, [state([2], [5], **params), state([2], [5, 7], **params)])
    assert (masked == float("-inf")).nonzero().tolist() == [[0, 7]]


def test_marks_of_a_sequence_and_of_who_has_its_slot_next() -> None:
    marks = TokenMarks(VOCAB_SIZE, CPU)
    assert marks.tensor.numel() == 0, "nobody needs any"
    (first,) = marks.claim([state([4, 4, 9], [9, 3, 3], repetition_penalty=2.0)])
    expected = {2: STOP, 4: PROMPT, 9: PROMPT + OUTPUT, 3: 2 * OUTPUT}
    assert {i: int(marks.tensor[first, i]) for i in marks.tensor[first].nonzero().flatten().tolist()} == expected
    marks.release(first)
    (second,) = marks.claim([state([4, 4], [], presence_penalty=1.0)])
    assert second == first
    assert marks.tensor[second].nonzero().flatten().tolist() == [2], "only the repetition penalty looks at the prompt"


def test_more_sequences_than_slots_keep_what_is_marked() -> None:
    marks = TokenMarks(VOCAB_SIZE, CPU)
    slots = [marks.claim([state([], [token], presence_penalty=1.0)])[0] for token in range(3, 40)]
    assert len(set(slots)) == 37
    for token, slot in zip(range(3, 40), slots, strict=True):
        assert int(marks.tensor[slot, token]) == OUTPUT

"""Masks and biases on the device: the kernels against their plain torch twins, and these against the definition."""

from __future__ import annotations

import os
import random
from typing import Any
from unittest import mock

import pytest
import torch

from workers.sampling.ops.choice_rows import ChoiceRows
from workers.sampling.ops.greedy import greedy_sample_torch
from workers.sampling.ops.penalties import TokenMarks
from workers.sampling.ops.restrictions import num_words, restrict, unpack_bits
from workers.sampling.ops.row_params import NO_SLOT, pack, unpack
from workers.sampling.ops.sample_tokens import sample_tokens, sample_tokens_torch
from workers.sampling.ops.token_bias import TokenBias
from workers.sampling.state import SamplingState
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF = float("inf")
MASKED: dict[str, Any] = {"bad_words_token_ids": ((1, 2),)}
BIASED: dict[str, Any] = {"logit_bias": ((3, 5.0), (7, -100.0), (11, 0.37)), "bad_words_token_ids": ((4,),)}
FEW: dict[str, Any] = {"allowed_token_ids": (5, 9, 60)}
CASES: list[dict[str, Any]] = [
    {**MASKED, "temperature": 0.0},
    {**BIASED, "temperature": 0.0},
    MASKED,
    {**MASKED, "top_k": 3},
    {**MASKED, "top_k": 200},
    {**MASKED, "top_p": 0.8, "temperature": 0.5},
    {**MASKED, "min_p": 0.05, "presence_penalty": 1.0, "repetition_penalty": 1.3},
    {**BIASED, "top_p": 0.7},
    {**BIASED, **MASKED, "top_k": 40, "top_p": 0.9, "logprobs": 3},
    {**FEW, "top_k": 50},
    {**FEW, "top_p": 0.999},
    {**FEW, "min_tokens": 50, "frequency_penalty": 0.5, "temperature": 0.0},
    {"temperature": 0.0},
    {},
]


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def choose():
    """The kernels' launch, which the interpreter runs where there is no GPU."""
    with mock.patch.dict(os.environ, {} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"}):
        language = pytest.importorskip("triton.language")
        from workers.sampling.ops.triton import sample_tokens as kernels
    if DEVICE.type == "cpu" and type(language.sum).__name__ != "InterpretedFunction":
        pytest.skip("Triton was imported to compile: needs TRITON_INTERPRET=1 or a CUDA device")
    return kernels.launch_sample_tokens


def state(seed: int, **params: Any) -> SamplingState:
    sampling = SamplingParams(**{"seed": seed, **params})
    return SamplingState(sampling, as_token_ids((1, 2, 3)), frozenset({0}), 10_000, [5, 6, 5])


def rows_of(states: list[SamplingState], vocab_size: int, masks: torch.Tensor) -> ChoiceRows:
    marks, bias = TokenMarks(vocab_size, DEVICE), TokenBias(vocab_size, DEVICE)
    slots = [marks.claim([s])[0] if s.needs_marks_after(3) else NO_SLOT for s in states]
    bias_slots = [bias.claim([s])[0] if s.biased else NO_SLOT for s in states]
    lens = torch.full((len(states),), 7, dtype=torch.int32, device=DEVICE)
    words = pack(states, slots, vocab_size, bias_slots).to(DEVICE)
    return ChoiceRows(words, lens, marks.tensor, bias.tensor, masks)


def random_masks(count: int, vocab_size: int) -> torch.Tensor:
    rng = random.Random(vocab_size)
    words = [[rng.getrandbits(32) & rng.getrandbits(32) for _ in range(num_words(vocab_size))] for _ in range(count)]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32).to(DEVICE)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, torch.float32), (4200, torch.bfloat16)], ids=str)
def test_kernels_choose_what_the_twin_chooses(choose, vocab_size: int, dtype: torch.dtype) -> None:
    states = [state(n, **case) for n, case in enumerate(CASES)]
    masks = random_masks(len(states), vocab_size)
    masks[3] = 0
    masks[3, 2] = 1 << 5  # one token is left: fewer than top-k
    masks[4] = 0  # none is left
    logits = 2.0 * torch.randn(len(states), vocab_size, generator=torch.Generator().manual_seed(1))
    logits = logits.to(dtype).to(DEVICE)
    rows, twin = rows_of(states, vocab_size, masks), rows_of(states, vocab_size, masks)
    tokens = greedy_sample_torch(logits)
    expected = tokens.clone()
    choose(logits, rows, tokens)
    sample_tokens_torch(logits, twin, expected)
    assert tokens.tolist() == expected.tolist()
    assert torch.equal(rows.marks, twin.marks)
    assert tokens[3] == 69
    assert tokens[4] == -1
    assert set(tokens[9:12].tolist()) <= {5, 9, 60}
    allowed = unpack_bits(masks, vocab_size)
    assert all(allowed[row, tokens[row]] for row in (0, 2, 3, 5, 6, 8))


def test_scores_are_those_of_the_definition() -> None:
    states = [state(0, **{**BIASED, **MASKED}), state(0), state(0, **FEW)]
    masks = random_masks(3, 77)
    logits = torch.randn(3, 77, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    rows = rows_of(states, 77, masks)
    scores = restrict(logits.clone(), rows, unpack(rows.words))
    for token in range(77):
        bias = {3: 5.0, 7: -100.0, 11: 0.37, 4: -INF}.get(token, 0.0)
        allowed = (int(masks[0, token // 32]) >> (token % 32)) & 1
        assert scores[0, token].item() == pytest.approx(logits[0, token].item() + bias if allowed else -INF)
        assert scores[2, token].item() == (logits[2, token].item() if token in (5, 9, 60) else -INF)
    assert torch.equal(scores[1], logits[1]), "a row that asks for nothing is left alone"


@pytest.mark.parametrize("wrong", ["bias", "masks"])
def test_what_does_not_fit_is_refused(wrong: str) -> None:
    rows = rows_of([state(0, **BIASED)], 77, random_masks(1, 77))
    other = rows_of([state(0, **BIASED)], 300, random_masks(1, 300))
    changed = ChoiceRows(rows.words, rows.seq_lens, rows.marks, **{wrong: getattr(other, wrong)})
    with pytest.raises(ValueError, match=wrong):
        sample_tokens(torch.zeros(1, 77, device=DEVICE), changed, torch.zeros(1, dtype=torch.int64, device=DEVICE))

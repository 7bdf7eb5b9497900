"""Choosing tokens on the device: the kernels against their plain torch twins, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from long_tails import slow_unless
from workers.sampling.ops.choice_rows import ChoiceRows
from workers.sampling.ops.greedy import greedy_sample_torch
from workers.sampling.ops.noise import gumbel_noise, noise_keys
from workers.sampling.ops.penalties import TokenMarks
from workers.sampling.ops.row_params import NO_SLOT, pack
from workers.sampling.ops.sample_tokens import sample_tokens, sample_tokens_torch
from workers.sampling.ops.top_logprobs import top_logprobs_torch
from workers.sampling.sampler import sample
from workers.sampling.state import SamplingState
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    """As workers run all of this."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def kernels() -> SimpleNamespace:
    """The launch functions, of kernels that the interpreter runs where there is no GPU."""
    with mock.patch.dict(os.environ, {} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"}):
        language = pytest.importorskip("triton.language")
        from workers.sampling.ops.triton import candidates, rows, sample_tokens, top_logprobs
    for function in (language.sum, rows.gumbel):
        if DEVICE.type == "cpu" and type(function).__name__ != "InterpretedFunction":
            pytest.skip("Triton was imported to compile: needs TRITON_INTERPRET=1 or a CUDA device")
    return SimpleNamespace(
        choose=sample_tokens.launch_sample_tokens,
        logprobs=top_logprobs.launch_top_logprobs,
        candidates=candidates.find_candidates,
    )


def state(output: tuple[int, ...] = (), prompt: tuple[int, ...] = (1, 2, 3), **params: Any) -> SamplingState:
    sampling = SamplingParams(**{"seed": 0, **params})
    return SamplingState(sampling, as_token_ids(prompt), frozenset({0}), 10_000, list(output))


def rows_of(states: list[SamplingState], vocab_size: int, **flags: bool) -> ChoiceRows:
    marks = TokenMarks(vocab_size, DEVICE)
    marked = [s for s in states if s.needs_marks_after(len(s.output_token_ids))]
    slot = dict(zip(map(id, marked), marks.claim(marked), strict=True))
    words = pack(states, [slot.get(id(s), NO_SLOT) for s in states], vocab_size)
    lens = [len(s.prompt_token_ids) + len(s.output_token_ids) + 1 for s in states]
    return ChoiceRows(words.to(DEVICE), torch.tensor(lens, dtype=torch.int32, device=DEVICE), marks.tensor, **flags)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype).to(DEVICE)


def check(kernels: SimpleNamespace, logits: torch.Tensor, states: list[SamplingState], **flags: bool) -> list[int]:
    """The kernels choose and count what the twin does."""
    rows, twin = (rows_of(states, logits.shape[1], **flags) for _ in range(2))
    tokens = greedy_sample_torch(logits)
    expected = tokens.clone()
    before = logits.clone()
    kernels.choose(logits, rows, tokens)
    sample_tokens_torch(logits, twin, expected)
    assert tokens.tolist() == expected.tolist()
    assert torch.equal(rows.marks, twin.marks)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    return tokens.tolist()


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.3},
    "top_k 1": {"top_k": 1},
    "top_k": {"top_k": 20},
    "top_k of many": {"top_k": 700},
    "top_k of all": {"top_k": 10**9},
    "top_p": {"top_p": 0.8},
    "tiny top_p": {"top_p": 1e-9},
    "top_p of almost all": {"top_p": 0.9999},
    "min_p": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "cold top_p": {"top_p": 0.95, "temperature": 0.05},
    "hot top_p": {"top_p": 0.9, "temperature": 30.0},
    "top_k and top_p": {"top_k": 50, "top_p": 0.9, "temperature": 0.7},
    "all filters": {"top_k": 30, "top_p": 0.95, "min_p": 0.02, "temperature": 1.2},
    "min_p and top_p": {"top_p": 0.7, "min_p": 0.03},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2, "top_k": 40},
    "greedy penalties": {"temperature": 0.0, "repetition_penalty": 0.7, "frequency_penalty": -0.5},
    "min_tokens": {"min_tokens": 40, "stop_token_ids": (5, 17, 10**6), "top_p": 0.9},
    "penalties and temperature": {"presence_penalty": 1.5, "temperature": 0.9},
}


SIZES = [
    *((vocab_size, torch.float32) for vocab_size in (1, 77)),
    (300, torch.float16),
    (4200, torch.bfloat16),
    *((vocab_size, dtype) for vocab_size in (128256, 151936) for dtype in DTYPES if DEVICE.type == "cuda"),
]


@pytest.mark.parametrize(("vocab_size", "dtype"), SIZES)
def test_kernels_choose_what_the_twin_chooses(kernels: SimpleNamespace, vocab_size: int, dtype: torch.dtype) -> None:
    """All cases in one batch; in 16 bits many logits are equal."""
    rng = random.Random(vocab_size)
    output = tuple(rng.randrange(vocab_size) for _ in range(30))
    prompt = tuple(rng.randrange(vocab_size) for _ in range(20))
    states = [state(output[:n], prompt, **{**case, "seed": n}) for n, case in enumerate(CASES.values(), 5)]
    check(kernels, randn(len(states), vocab_size, dtype=dtype, seed=vocab_size), states)


WIDE: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 6000},
    "top_k of all": {"top_k": 10**9},
    "top_p": {"top_p": 0.8},
    "top_p of almost all": {"top_p": 0.9999},
    "hot top_p": {"top_p": 0.95, "temperature": 5.0},
    "min_p": {"min_p": 0.01},
    "min_p and top_p": {"top_p": 0.97, "min_p": 0.02},
    "top_k and top_p": {"top_k": 5000, "top_p": 0.9},
    "penalties": {"top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "none": {"temperature": 1.5},
}


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.0), (torch.bfloat16, 0.01)])
def test_wide_rows_are_cut_by_bins(kernels: SimpleNamespace, dtype: torch.dtype, scale: float) -> None:
    """There are more candidates than are listed, and beside them a row of few; at a scale of 0.01 all are alike."""
    states = [state((4, 5), **case, seed=seed) for seed, case in enumerate(WIDE.values())]
    logits = randn(len(states), 9000, dtype=dtype, seed=3, scale=scale)
    logits[-1] *= 40
    check(kernels, logits, states)


@pytest.mark.parametrize("case", ["top_k", "top_p", "min_p and top_p", "penalties"])
def test_an_edge_of_too_many_equal_tokens(kernels: SimpleNamespace, case: str) -> None:
    """They cannot be listed, either: the row itself is searched."""
    logits = torch.zeros(1, 9000, dtype=torch.bfloat16, device=DEVICE)
    logits[0, 5::9] = 0.5
    check(kernels, logits, [state((4, 5), **WIDE[case], seed=9) for _ in logits])


@pytest.mark.parametrize("params", [{"top_p": 0.5}, {"top_p": 0.95}, {"top_k": 5000}], ids=str)
@pytest.mark.parametrize("scale", [0.001, 0.05, 1.0])
def test_the_edge_of_a_wide_row_is_short(kernels: SimpleNamespace, scale: float, params: dict[str, Any]) -> None:
    logits = randn(1, 20000, scale=scale, seed=5)
    found = kernels.candidates(logits, rows_of([state(**params)], 20000), greedy_sample_torch(logits), raw=False)
    first, per_unit = found.bounds[0, 4:].tolist()
    bins = ((first - logits[0]) * per_unit).clamp(0, found.weights.shape[1] - 1).ceil()
    mass = (logits[0] - logits[0].max()).double().exp()
    weight, needed = (mass, params["top_p"] * mass.sum()) if "top_p" in params else (mass > 0, params["top_k"])
    order = logits[0].argsort(descending=True)
    edge = bins[order[int((weight[order].cumsum(0) < needed).sum())]]
    assert 0 < edge < found.weights.shape[1]
    assert int((bins == edge).sum()) < 100


@pytest.mark.parametrize("case", ["top_k", "top_p", "min_p", "penalties"])
def test_a_row_that_is_wider_than_it_looks(kernels: SimpleNamespace, case: str) -> None:
    """All of its candidates lie in few tiles, but there are more than are listed."""
    logits = randn(1, 20000, scale=0.5)
    logits[:, 4700:] -= 30.0
    check(kernels, logits, [state((4, 5), **({"top_k": 30} if case == "top_k" else WIDE[case]), seed=3)])


def test_of_equal_tokens_on_the_edge_of_a_wide_row_the_first_stay(kernels: SimpleNamespace) -> None:
    """Of three thousand each with the logits 1.5, 1 and 0, the first and the lower third of the second are kept."""
    logits = torch.tensor([1.5, 1.0, 0.0], device=DEVICE).repeat(6, 3000)
    kept = 3000 * math.exp(1.5) + 1000 * math.e
    top_p = kept / (kept + 2000 * math.e + 3000)
    tokens = check(kernels, logits, [state(top_p=top_p, seed=seed) for seed in range(len(logits))])
    assert {token % 3 for token in tokens} == {0, 1}
    assert max(token for token in tokens if token % 3 == 1) <= 3000


def test_few_candidates_are_listed(kernels: SimpleNamespace) -> None:
    params = [{"top_k": 20}, {"top_p": 0.9}, {"top_p": 0.9, "min_p": 0.05}, {"min_p": 0.05}]
    states = [state(**p) for p in params]
    logits = randn(len(states), 9000, scale=8.0)
    tokens = greedy_sample_torch(logits)
    found = kernels.candidates(logits, rows_of(states, 9000), tokens, raw=False)
    probabilities = logits.softmax(-1).sort(-1, descending=True).values
    nucleus = int((probabilities[1].cumsum(-1) < 0.9).sum()) + 1
    likely = int((logits[3] >= logits[3].max() + torch.tensor(0.05).log()).sum())
    least = [20, nucleus, 1, likely]
    for count, at_least in zip(found.counts.tolist(), least, strict=True):
        assert at_least <= count <= max(64, 8 * at_least)


@pytest.mark.parametrize(
    "params", [{"top_k": 3}, {"top_p": 0.3}, {"top_k": 400, "top_p": 0.5}, {"min_p": 0.5}], ids=str
)
def test_equal_logits_at_the_border(kernels: SimpleNamespace, params: dict[str, Any]) -> None:
    logits = torch.zeros(1, 600, device=DEVICE)
    logits[0, ::7] = 1.0
    logits[0, 3:5] = -0.0
    drawn = {check(kernels, logits, [state(**params, seed=seed)])[0] for seed in range(6)}
    assert len(drawn) > 2
    if params == {"top_p": 0.3}:  # of the 86 larger ones, the first
        assert all(token % 7 == 0 and token < 600 * 0.9 for token in drawn)


def test_noise_of_the_kernel_is_that_of_the_twin(kernels: SimpleNamespace) -> None:
    """Flat logits leave the choice to the noise alone, over seeds and indices with every bit in use."""
    seeds = [0, 1, 2**31, 2**32, 2**63, 2**64 - 1, 0x123456789ABCDEF]
    states = [state((7,) * index, seed=seed) for seed in seeds for index in (0, 1, 30)]
    tokens = check(kernels, torch.zeros(len(states), 1000, device=DEVICE), states)
    words = pack(states, [NO_SLOT] * len(states), 1000)
    streams = words[:, :2].reshape(-1).view(torch.int64)
    keys = noise_keys(streams, torch.tensor([len(s.output_token_ids) for s in states]))
    assert tokens == gumbel_noise(keys, 1000).argmax(-1).tolist()
    assert len(set(tokens)) > 18


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: the interpreter is too slow for so many")
def test_draws_of_the_kernel_follow_the_softmax(kernels: SimpleNamespace) -> None:
    probs = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005])
    count = 20_000
    states = [state(seed=seed) for seed in range(count)]
    logits = probs.log().to(DEVICE).expand(count, -1).contiguous()
    tokens = greedy_sample_torch(logits)
    kernels.choose(logits, rows_of(states, 8), tokens)
    found = torch.bincount(tokens.cpu(), minlength=8)
    assert float(((found - probs * count) ** 2 / (probs * count)).sum()) < 7 + 6 * 14**0.5


@pytest.mark.parametrize(
    "values",
    slow_unless(
        lambda param: param.id == "both",
        [
            pytest.param((NAN, INF), id="both"),
            pytest.param((NAN, NAN), id="nan"),
            pytest.param((INF, INF), id="inf"),
        ],
    ),
)
def test_rows_without_a_token_harm_nobody(kernels: SimpleNamespace, values: tuple[float, float]) -> None:
    states = [state((1, 2), **case) for case in CASES.values() for _ in range(3)]
    logits = randn(len(states), 300)
    logits[1::6, 77], logits[4::6, 77] = values
    logits[2::3] = -INF
    tokens = check(kernels, logits, states)
    assert set(tokens[1::3]) == set(tokens[2::3]) == {-1}
    assert min(tokens[::3]) >= 0


def test_a_row_in_which_everything_is_masked(kernels: SimpleNamespace) -> None:
    stops = {"min_tokens": 9, "stop_token_ids": (1, 2), "temperature": 1.0}
    states = [state(**stops), state(**stops, top_k=2), state(**{**stops, "temperature": 0.0}), state()]
    tokens = check(kernels, randn(4, 3), states)
    assert tokens[:3] == [-1] * 3
    assert tokens[3] >= 0


def test_a_batch_without_filters_needs_no_candidates(kernels: SimpleNamespace) -> None:
    logits = randn(3, 500)
    free = [state(seed=1), state(temperature=0.0), state(temperature=0.0, presence_penalty=1.0)]
    check(kernels, logits, free, any_filtered=False)
    check(kernels, logits, [state(top_k=9), state(top_p=0.5), state(temperature=0.0)])


def test_what_a_row_gets_depends_on_nothing_else(kernels: SimpleNamespace) -> None:
    states = [state((3,), **{**case, "seed": 2}) for case in CASES.values()]
    logits = randn(len(states), 500, dtype=torch.bfloat16)
    together = check(kernels, logits, states)
    for row in range(len(states)):
        alone = greedy_sample_torch(logits[row : row + 1])
        kernels.choose(logits[row : row + 1], rows_of([states[row]], 500), alone)
        assert alone.tolist() == [together[row]]


def test_marks_count_from_step_to_step(kernels: SimpleNamespace) -> None:
    """The device's own counts stand where counting the whole output again would."""
    params = {"temperature": 0.0, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
    sequence = state(**params)
    rows = rows_of([sequence], 60)
    logits = randn(1, 60)
    for _ in range(12):
        tokens = greedy_sample_torch(logits)
        kernels.choose(logits, rows, tokens)
        assert tokens.tolist() == [sample(logits, [sequence])[0].token_id]
        sequence.output_token_ids += tokens.tolist()
        rows.seq_lens.add_(1)
        assert torch.equal(rows.marks, rows_of([sequence], 60).marks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 4, 3000])
def test_logprobs_kernel_equals_its_twin(kernels: SimpleNamespace, vocab_size: int, dtype: torch.dtype) -> None:
    states = [state(logprobs=n) for n in (0, None, 1, 5, 20)]
    logits = randn(len(states), vocab_size, dtype=dtype)
    words = rows_of(states, vocab_size).words
    tokens = torch.tensor([vocab_size // 2, 0, 0, -1, vocab_size - 1], device=DEVICE)
    most = min(20, vocab_size)
    found, expected = kernels.logprobs(logits, words, tokens, most), top_logprobs_torch(logits, words, tokens, most)
    for row, wanted in ((0, 0), (2, 1), (4, most)):
        torch.testing.assert_close(found.chosen[row], expected.chosen[row], rtol=1e-5, atol=1e-5)
        assert torch.equal(found.token_ids[row, :wanted], expected.token_ids[row, :wanted])
        torch.testing.assert_close(found.values[row, :wanted], expected.values[row, :wanted], rtol=1e-5, atol=1e-5)


def test_logprobs_of_equal_logits_come_by_id(kernels: SimpleNamespace) -> None:
    logits = torch.zeros(1, 6000, device=DEVICE)
    words = rows_of([state(logprobs=7)], 6000).words
    found = kernels.logprobs(logits, words, torch.tensor([3], device=DEVICE), 7)
    assert found.token_ids.tolist() == [list(range(7))]
    torch.testing.assert_close(found.values, torch.full((1, 7), 6000.0, device=DEVICE).log().neg())


def test_arguments_that_do_not_fit_are_refused() -> None:
    rows, tokens = rows_of([state()] * 2, 8), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    logits = torch.zeros(2, 8, device=DEVICE)
    for arguments, named in (
        ((logits.T, rows, tokens), "logits of shape"),
        ((logits, rows, tokens.int()), "tokens of"),
        ((logits, rows_of([state()], 8), tokens), "words of shape"),
        ((logits, rows_of([state()] * 2, 9), tokens), "marks of shape"),
    ):
        with pytest.raises(ValueError, match=named):
            sample_tokens(*arguments)
